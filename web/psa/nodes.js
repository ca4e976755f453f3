// @ts-check
/** What the cards on nodes have in common: where they sit, and when they look again. */

import { app } from '../../../scripts/app.js'

/** @typedef {import('@comfyorg/comfyui-frontend-types').LGraphNode} LGraphNode */

const WIDTH = 345
export const ALWAYS = 0 // LiteGraph's modes
export const NEVER = 2
export const BYPASS = 4

/**
 * Put a card below a node's widgets. Nothing of it is ever saved: what is in it belongs to nobody but who sees it.
 *
 * @param {LGraphNode} node @param {HTMLElement} card @param {number} height Of the card, in pixels, at least.
 */
export function putCard(node, card, height) {
  card.addEventListener('keydown', (event) => event.stopPropagation()) // keys are ComfyUI's shortcuts
  const widget = node.addDOMWidget('psa_card', 'psa-card', card, {
    serialize: false,
    getMinHeight: () => height,
    getValue: () => '',
    setValue: () => {}
  })
  widget.serialize = false

  function fit() {
    const [width, least] = node.computeSize()
    node.setSize([Math.max(node.size[0], width, WIDTH), Math.max(node.size[1], least)])
  }
  after(node, 'onConfigure', fit)
  fit()
}

/**
 * Do something while a node is in the graph. Copying makes nodes that never are, and some frontends forget to tell nodes
 * in subgraphs that they were removed.
 *
 * @param {LGraphNode} node @param {() => () => void} start Returns what stops it.
 */
export function whileShown(node, start) {
  /** @type {(() => void)[]} */
  let stops = []
  function end() {
    for (const stop of stops.splice(0)) stop()
  }
  after(node, 'onAdded', () => {
    if (stops.length > 0) return
    // From the next frame on: by then a subgraph is in the graph as well.
    let next = requestAnimationFrame(function look() {
      if (isInGraph(node)) next = requestAnimationFrame(look)
      else end()
    })
    stops = [start(), () => cancelAnimationFrame(next)]
  })
  after(node, 'onRemoved', end)
}

/** @param {LGraphNode} node @returns {boolean} */
function isInGraph(node) {
  const { graph } = node
  if (!graph || graph.getNodeById(node.id) !== node) return false
  return graph === app.graph || hosts(graph).some(isInGraph)
}

/** The nodes that stand for a subgraph, wherever they are. @param {unknown} subgraph @returns {LGraphNode[]} */
function hosts(subgraph) {
  const graphs = [app.graph, ...(app.graph.subgraphs?.values() ?? [])]
  const nodes = /** @type {LGraphNode[]} */ (graphs.flatMap((graph) => graph.nodes))
  return nodes.filter((node) => 'subgraph' in node && node.subgraph === subgraph)
}

/** A node's mode, or that of what it is in. @param {LGraphNode} node @returns {number} One of LiteGraph's. */
export function effectiveMode(node) {
  if (node.mode !== ALWAYS || !node.graph || node.graph === app.graph) return node.mode
  const modes = hosts(node.graph).map(effectiveMode)
  return modes.length > 0 && modes.every((mode) => mode !== ALWAYS) ? modes[0] : node.mode
}

/**
 * Call ``show`` now, and whenever ``look`` returns something else in a frame that the browser draws.
 *
 * @param {() => unknown} look @param {() => void} show @returns {() => void} What stops it.
 */
export function follow(look, show) {
  /** @type {unknown} */
  let seen
  let next = 0
  function frame() {
    next = requestAnimationFrame(frame) // first: a graph that is being rebuilt may refuse to be looked at
    const now = look()
    if (now === seen) return
    seen = now
    show()
  }
  frame()
  return () => cancelAnimationFrame(next)
}

/**
 * Do more when ComfyUI calls a node, whatever else listens there.
 *
 * @param {any} node Or widget: whatever ComfyUI calls. @param {string} name @param {(...given: any[]) => void} more
 */
export function after(node, name, more) {
  const before = node[name]
  node[name] = function (/** @type {any[]} */ ...given) {
    const answer = before?.apply(this, given)
    more(...given)
    return answer
  }
}

/** Whether another node gives what a widget would. @param {LGraphNode} node @param {string} name */
export function isLinked(node, name) {
  const slot = node.findInputSlot(name)
  return slot >= 0 && node.isInputConnected(slot)
}

/** The node that gives an input, behind reroutes. @param {LGraphNode} node @param {string} name @returns {LGraphNode | null} */
export function inputNode(node, name) {
  let from = node.getInputNode(node.findInputSlot(name))
  while (from?.type === 'Reroute') from = from.getInputNode(0)
  return /** @type {LGraphNode | null} */ (from)
}
