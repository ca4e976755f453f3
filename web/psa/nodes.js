// @ts-check
/** What the cards on nodes have in common: where they sit, and when they look again. */

const WIDTH = 345

/**
 * Put a card below a node's widgets. Nothing of it is ever saved: what is in it belongs to nobody but who sees it.
 *
 * @param {any} node @param {HTMLElement} card @param {number} height Of the card, in pixels, at least.
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
 * Call ``show`` whenever a node that is in a graph may have to look different. Copying makes nodes that never are.
 *
 * @param {any} node @param {[EventTarget, string][]} events What else may change it. @param {() => void} show
 */
export function keepShown(node, events, show) {
  after(node, 'onAdded', () => {
    for (const [target, name] of events) target.addEventListener(name, show)
    show()
  })
  after(node, 'onRemoved', () => {
    for (const [target, name] of events) target.removeEventListener(name, show)
  })
  after(node, 'onConfigure', show)
}

/**
 * Do more when ComfyUI calls a node, whatever else listens there.
 *
 * @param {any} node @param {string} name @param {(...given: any[]) => void} more
 */
export function after(node, name, more) {
  const before = node[name]
  node[name] = function (/** @type {any[]} */ ...given) {
    const answer = before?.apply(this, given)
    more(...given)
    return answer
  }
}

/** Whether another node gives what a widget would. @param {any} node @param {string} name */
export function isLinked(node, name) {
  const slot = node.findInputSlot(name)
  return slot >= 0 && node.isInputConnected(slot)
}
