// @ts-check
/**
 * The question when a workflow names a profile that is not on this computer: whose boundaries instead? Until it is
 * answered the node keeps its reference, and the server refuses to run it.
 */

import { app } from '../../../scripts/app.js'
import { button, h, levelLabel } from './elements.js'
import { isLinked } from './nodes.js'
import { shownName } from './settings.js'
import { openEditor } from './tab.js'
import { t } from './words.js'

/** @type {Set<string>} What somebody wants to decide later: references, with the workflow that they are in. */
const later = new Set()

/** @param {import('./store.js').ProfileStore} store */
export async function askForMissing(store) {
  if (references(app.graph).length === 0) return
  const [presets] = await Promise.all([store.presets().catch(() => null), store.refresh()])
  if (!presets || store.problem) return // the card says so
  const known = new Set(['active', ...store.entries.map(({ id }) => id), ...presets.levels.map(({ id }) => id)])
  const graph = app.graph
  const missing = references(graph).filter(({ value }) => !known.has(value) && !later.has(`${graph.id} ${value}`))
  if (missing.length === 0) return

  const { active } = store
  const choice = h('select', { class: 'psa-picker', 'aria-label': t('whose_boundaries'), autofocus: true },
    active ? h('option', { value: 'active' }, t('active_profile', { name: shownName(active) })) : null,
    ...presets.levels.map((level) => h('option', { value: level.id }, levelLabel(level))))
  /** @param {string} reference */
  function use(reference) {
    for (const widget of missing) {
      widget.value = reference
      widget.callback?.(reference)
    }
    dialog.close()
  }
  const dialog = h('dialog', {
    class: 'psa-dialog', 'aria-labelledby': 'psa-missing-title',
    onkeydown: (/** @type {KeyboardEvent} */ event) => event.stopPropagation(), // keys are ComfyUI's shortcuts
    oncancel: decideLater,
    onclose: () => dialog.remove()
  },
  h('h2', { id: 'psa-missing-title' }, t('missing_title')),
  h('p', {}, t('missing_explained')),
  choice,
  h('div', { class: 'psa-buttons' },
    button(t('later'), () => { decideLater(); dialog.close() }),
    active ? null : button(t('make_my_profile'), () => { use('active'); openEditor(null) }),
    button(t('use_it'), () => use(choice.value), 'primary')))

  function decideLater() {
    for (const { value } of missing) later.add(`${graph.id} ${value}`)
  }

  document.querySelector('.psa-dialog')?.remove() // of the workflow before
  document.body.append(dialog)
  dialog.showModal()
}

/** The widgets that say whose boundaries apply, in subgraphs too. @param {any} graph @param {Set<any>} [seen] @returns {any[]} */
function references(graph, seen = new Set()) {
  if (!graph || seen.has(graph)) return []
  seen.add(graph)
  return graph.nodes.flatMap((/** @type {any} */ node) => {
    if (node.subgraph) return references(node.subgraph, seen)
    if (node.comfyClass !== 'PSAUserProfile') return []
    if (isLinked(node, 'profile_id')) return []
    return node.widgets.filter((/** @type {any} */ { name }) => name === 'profile_id')
  })
}
