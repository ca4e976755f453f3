// @ts-check
/** What the cards on nodes have in common: where they sit, and when they look again. */

/** @typedef {import('@comfyorg/comfyui-frontend-types').LGraphNode} LGraphNode */

const WIDTH = 345

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
 * Do something while a node is in a graph. Copying makes nodes that never are.
 *
 * @param {LGraphNode} node @param {() => () => void} start Returns what stops it.
 */
export function whileShown(node, start) {
  /** @type {(() => void) | null} */
  let stop = null
  after(node, 'onAdded', () => { stop ??= start() })
  after(node, 'onRemoved', () => {
    stop?.()
    stop = null
  })
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
    const now = look()
    if (now !== seen) {
      seen = now
      show()
    }
    next = requestAnimationFrame(frame)
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
