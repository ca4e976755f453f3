// @ts-check
/** The card on Apply PSA: whether it acts at all, and what the adapter acts on. It knows nothing of the user. */

import { h } from './elements.js'
import { ALWAYS, BYPASS, NEVER, effectiveMode, follow, inputNode, isLinked, putCard, whileShown } from './nodes.js'
import { problemOf } from './store.js'
import { t } from './words.js'

const HEIGHT = 160
const NUMBERS = ['PrimitiveFloat', 'PrimitiveNode']

/**
 * @param {import('@comfyorg/comfyui-frontend-types').LGraphNode} node
 * @param {import('./store.js').ProfileStore} store
 */
export function addApplyCard(node, store) {
  const badge = h('p', { class: 'psa-badge', role: 'status' })
  const facts = h('div', { class: 'psa-card-body' })
  putCard(node, h('div', { class: 'psa-card', role: 'group', 'aria-label': t('what_applies') }, badge, facts), HEIGHT)

  /** @param {string} wanted */
  function widget(wanted) {
    return node.widgets?.find(({ name }) => name === wanted)?.value
  }

  /** @returns {boolean} Whether the strength changes on the way. */
  function isAlongACurve() {
    return isLinked(node, 'strengths') || isLinked(node, 'schedule') || widget('schedule') !== 'constant'
  }

  /** @returns {number | null} Null if another node says it, and not in a plain number. */
  function strength() {
    const source = isLinked(node, 'strength') ? inputNode(node, 'strength') : null
    // ComfyUI leaves a bypassed number out, and takes the node's own.
    if (!isLinked(node, 'strength') || (source && effectiveMode(source) !== ALWAYS)) return Number(widget('strength'))
    const plain = source && NUMBERS.includes(source.type) && !isLinked(source, 'value')
    return plain ? Number(source.widgets?.[0]?.value) : null
  }

  /** @returns {string | null} The file; null if it does not come from a Load PSA Adapter that can be seen from here. */
  function adapterName() {
    const compiler = isLinked(node, 'adapter') ? null : inputNode(node, 'embedding')
    const loader = inputNode(compiler?.type === 'PSACompileProfile' ? compiler : node, 'adapter')
    if (loader?.type !== 'PSALoadAdapter' || isLinked(loader, 'adapter_name')) return null
    const name = loader.widgets?.find((widget) => widget.name === 'adapter_name')?.value
    return typeof name === 'string' ? name : null
  }

  /** @returns {string | null} The compiled profile that stands in for an adapter, if it comes straight from its loader. */
  function compiledName() {
    const loader = isLinked(node, 'adapter') ? null : inputNode(node, 'embedding')
    if (loader?.type !== 'PSALoadCompiledProfile' || isLinked(loader, 'compiled_name')) return null
    const name = loader.widgets?.find((widget) => widget.name === 'compiled_name')?.value
    return typeof name === 'string' ? name : null
  }

  function showBadge() {
    const value = strength()
    const mode = effectiveMode(node)
    const why = mode === BYPASS ? 'is_bypassed' : mode === NEVER ? 'is_muted' : value === 0 ? 'is_off' : null
    badge.classList.toggle('psa-off', why !== null)
    badge.replaceChildren(
      h('i', { class: `pi pi-${why ? 'exclamation-triangle' : 'shield'}`, 'aria-hidden': 'true' }),
      h('span', {}, why ? t(why) : value === null ? t('acts')
        : t(isAlongACurve() ? 'acts_along' : 'acts_at', { strength: Number(value.toFixed(2)) }))
    )
  }

  let asked = 0
  async function showFacts() {
    const number = ++asked
    const name = adapterName()
    const compiled = compiledName()
    if (compiled !== null) {
      facts.replaceChildren(listOf([['compiled', compiled]]))
      return
    }
    if (name === null) {
      const why = isLinked(node, 'adapter') ? 'adapter_elsewhere' : 'no_adapter'
      facts.replaceChildren(h('p', { class: 'psa-quiet' }, t(why)))
      return
    }
    try {
      const found = await store.adapter(name)
      if (number === asked) facts.replaceChildren(factsOf(name, found))
    } catch (error) {
      if (number === asked) facts.replaceChildren(h('p', { class: 'psa-problem', role: 'alert' }, problemOf(error)))
    }
  }

  // ComfyUI tells nobody that a node was bypassed.
  whileShown(node, () => {
    const stops = [
      follow(() => `${effectiveMode(node)} ${strength()} ${isAlongACurve()}`, showBadge),
      follow(() => `${isLinked(node, 'adapter')} ${adapterName()} ${compiledName()}`, showFacts)
    ]
    return () => stops.forEach((stop) => stop())
  })
}

/** @param {string} name @param {import('./store.js').AdapterFacts} adapter */
function factsOf(name, { base, kinds, layers, encoder }) {
  const where = [layers > 0 ? t('layers', { layers }) : null, kinds.includes('text') ? t('the_prompt') : null]
  return listOf([
    ['adapter', name],
    ['base', base],
    ['acts_on', where.filter(Boolean).join(', ')],
    ['encoder', encoder]
  ])
}

/** @param {string[][]} rows */
function listOf(rows) {
  return h('dl', { class: 'psa-facts' },
    ...rows.flatMap(([key, value]) => [h('dt', {}, t(`facts.${key}`)), h('dd', { title: value }, value)]))
}
