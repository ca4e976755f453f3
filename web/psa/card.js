// @ts-check
/** The card on User Safety Profile: whose boundaries this node brings in, and which they are. */

import { levelLabel } from './editor.js'
import { button, chips, h, strictness } from './elements.js'
import { defaultReference, shownName } from './settings.js'
import { problemOf } from './store.js'
import { openEditor } from './tab.js'
import { t } from './words.js'

const WIDTH = 345
const HEIGHT = 235

/**
 * @typedef {import('@comfyorg/comfyui-frontend-types').LGraphNode} LGraphNode
 * @typedef {import('@comfyorg/comfyui-frontend-types').IBaseWidget & {value: string}} Reference
 */

/** @param {LGraphNode} node @param {import('./store.js').ProfileStore} store */
export function addCard(node, store) {
  const reference = /** @type {Reference} */ (node.widgets?.find((widget) => widget.name === 'profile_id'))
  // The card's own picker shows names instead of ids.
  reference.hidden = true
  reference.options.hidden = true
  reference.value = defaultReference() // a workflow that is opened overwrites it

  const picker = h('select', { class: 'psa-picker', 'aria-label': t('whose_boundaries'), onchange: () => {
    reference.value = picker.value
    reference.callback?.(picker.value)
    show()
  } })
  const body = h('div', { class: 'psa-card-body', 'aria-live': 'polite' })
  const editButton = button(t('edit_short'), () => openEditor(shownId()))
  const card = h('div', {
    class: 'psa-card',
    onkeydown: (/** @type {KeyboardEvent} */ event) => event.stopPropagation() // keys are ComfyUI's shortcuts
  }, picker, body,
    h('div', { class: 'psa-buttons' }, editButton, button(t('new_short'), () => openEditor(null))))
  // Its value is never saved: what is in it belongs to nobody but its owner.
  const widget = node.addDOMWidget('psa_card', 'psa-card', card, {
    serialize: false,
    getMinHeight: () => HEIGHT,
    getValue: () => '',
    setValue: () => {}
  })
  widget.serialize = false

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
    const missing = !names.has(reference.value)
    if (missing) names.set(reference.value, t('not_here'))
    picker.replaceChildren(...[...names].map(([value, label]) => h('option', { value }, label)))
    picker.value = reference.value
    const level = levels.find(({ id }) => id === reference.value)
    const id = shownId()
    editButton.disabled = Boolean(level) || missing || id === null
    try {
      if (store.problem) throw new Error(store.problem)
      if (missing) throw new Error(t('missing_profile'))
      if (!level && id === null) throw new Error(t('no_active_profile'))
      const decisions = level ? level.decisions : (await store.read(/** @type {string} */ (id))).decisions
      if (number !== asked) return
      body.replaceChildren(strictness(decisions), chips(decisions))
    } catch (error) {
      if (number === asked) body.replaceChildren(h('p', { class: 'psa-problem', role: 'alert' }, problemOf(error)))
    }
  }

  // Copying makes nodes that are never added.
  const added = node.onAdded
  node.onAdded = function (...given) {
    added?.apply(this, given)
    store.addEventListener('change', show)
    show()
  }
  const removed = node.onRemoved
  node.onRemoved = function (...given) {
    store.removeEventListener('change', show)
    removed?.apply(this, given)
  }
  const configured = node.onConfigure
  node.onConfigure = function (...given) {
    configured?.apply(this, given)
    fit()
    show()
  }

  function fit() {
    const [width, height] = node.computeSize()
    node.setSize([Math.max(node.size[0], width, WIDTH), Math.max(node.size[1], height)])
  }

  fit()
}
