// @ts-check
/** The card on User Safety Profile: whose boundaries this node brings in, and which they are. */

import { button, chips, h, levelLabel, strictness } from './elements.js'
import { after, putCard, whileShown } from './nodes.js'
import { defaultReference, shownName } from './settings.js'
import { problemOf } from './store.js'
import { openEditor } from './tab.js'
import { t } from './words.js'

const HEIGHT = 235

/**
 * @typedef {import('@comfyorg/comfyui-frontend-types').LGraphNode} LGraphNode
 * @typedef {import('@comfyorg/comfyui-frontend-types').IBaseWidget & {value: string}} Reference
 */

/** @param {LGraphNode} node @param {import('./store.js').ProfileStore} store */
export function addProfileCard(node, store) {
  const reference = /** @type {Reference} */ (node.widgets?.find((widget) => widget.name === 'profile_id'))
  // The card's own picker shows names instead of ids.
  reference.hidden = true
  reference.options.hidden = true
  reference.value = defaultReference(store) // a workflow that is opened overwrites it

  const picker = h('select', { class: 'psa-picker', 'aria-label': t('whose_boundaries'), onchange: () => {
    reference.value = picker.value
    reference.callback?.(picker.value)
  } })
  const body = h('div', { class: 'psa-card-body', 'aria-live': 'polite' })
  const editButton = button(t('edit_short'), () => openEditor(shownId()))
  putCard(node, h('div', { class: 'psa-card' }, picker, body,
    h('div', { class: 'psa-buttons' }, editButton, button(t('new_short'), () => openEditor(null)))), HEIGHT)

  function shownId() {
    return reference.value === 'active' ? store.active?.id ?? null : reference.value
  }

  let asked = 0
  async function show() {
    const number = ++asked
    const presets = await store.presets().catch(() => null)
    if (number !== asked) return
    const levels = presets?.levels ?? []
    const names = new Map([
      ['active', t('active_profile', { name: store.active ? shownName(store.active) : t('none') })],
      ...store.entries.map((entry) => /** @type {[string, string]} */ ([entry.id, shownName(entry)])),
      ...levels.map((level) => /** @type {[string, string]} */ ([level.id, levelLabel(level)]))
    ])
    const unknown = !names.has(reference.value)
    const missing = unknown && presets !== null && !store.problem
    if (unknown) names.set(reference.value, t(missing ? 'not_here' : 'not_known'))
    picker.replaceChildren(...[...names].map(([value, label]) => h('option', { value }, label)))
    picker.value = reference.value
    const level = levels.find(({ id }) => id === reference.value)
    const id = shownId()
    editButton.disabled = Boolean(level) || unknown || id === null
    try {
      if (store.problem) throw new Error(store.problem)
      if (presets === null) throw new Error(t('no_answer'))
      if (missing) throw new Error(t('missing_profile'))
      if (!level && id === null) throw new Error(t('no_active_profile'))
      const decisions = level ? level.decisions : (await store.read(/** @type {string} */ (id))).decisions
      if (number !== asked) return
      body.replaceChildren(strictness(decisions), chips(decisions))
    } catch (error) {
      if (number === asked) body.replaceChildren(h('p', { class: 'psa-problem', role: 'alert' }, problemOf(error)))
    }
  }

  after(reference, 'callback', show)
  after(node, 'onConfigure', show)
  whileShown(node, () => {
    store.addEventListener('change', show)
    show()
    return () => store.removeEventListener('change', show)
  })
}
