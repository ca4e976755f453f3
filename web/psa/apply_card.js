// @ts-check
/** The card on Apply PSA: whether it acts at all, and what the last run applied. It knows nothing of the user. */

import { h } from './elements.js'
import { after, everyFrame, isLinked, putCard, whileShown } from './nodes.js'
import { t } from './words.js'

const HEIGHT = 150
const NEVER = 2 // LiteGraph's modes
const BYPASS = 4

/**
 * @typedef {{adapter: string, base: string, kinds: ('constant' | 'gated' | 'text')[], layers: number, encoder: string,
 *   strength: number}} Applied What the node says of a run, see nodes/apply.py.
 */

/** @param {import('@comfyorg/comfyui-frontend-types').LGraphNode} node */
export function addApplyCard(node) {
  /** @type {Applied | null} */
  let applied = null
  const badge = h('p', { class: 'psa-badge', role: 'status' })
  const facts = h('div', { class: 'psa-card-body' })
  putCard(node, h('div', { class: 'psa-card', role: 'group', 'aria-label': t('what_applies') }, badge, facts), HEIGHT)

  const widget = node.widgets?.find(({ name }) => name === 'strength')
  /** @returns {number | undefined} What the next run takes; where another node says it, what the last one took. */
  function strength() {
    return isLinked(node, 'strength') ? applied?.strength : Number(widget?.value)
  }

  function show() {
    const value = strength()
    const why = node.mode === BYPASS ? 'is_bypassed' : node.mode === NEVER ? 'is_muted' : value === 0 ? 'is_off' : null
    badge.classList.toggle('psa-off', why !== null)
    badge.replaceChildren(
      h('i', { class: `pi pi-${why ? 'exclamation-triangle' : 'shield'}`, 'aria-hidden': 'true' }),
      h('span', {}, why ? t(why) : value === undefined ? t('acts') : t('acts_at', { strength: Number(value.toFixed(2)) }))
    )
    facts.replaceChildren(applied ? factsOf(applied) : h('p', { class: 'psa-quiet' }, t('not_run')))
  }

  after(node, 'onExecuted', (/** @type {{psa?: Applied[]} | null} */ output) => {
    if (!output?.psa?.length) return
    applied = output.psa[0]
    show()
  })

  let seen = ''
  // ComfyUI tells nobody that a node was bypassed.
  whileShown(node, () => everyFrame(() => {
    const now = `${node.mode} ${strength()}`
    if (now === seen) return
    seen = now
    show()
  }))
}

/** @param {Applied} applied */
function factsOf({ adapter, base, kinds, layers, encoder }) {
  const where = [
    layers > 0 ? t('layers', { layers }) : null,
    kinds.includes('text') ? t('the_prompt') : null
  ].filter(Boolean)
  const rows = [
    ['adapter', adapter],
    ['base', base],
    ['acts_on', where.join(', ') || t('none')],
    ['encoder', encoder]
  ]
  return h('dl', { class: 'psa-facts' },
    ...rows.flatMap(([key, value]) => [h('dt', {}, t(`facts.${key}`)), h('dd', { title: value }, value)]))
}
