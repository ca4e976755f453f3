// @ts-check
/** ComfyUI-PSA in the browser: the tab "Safety Profiles", and the card on User Safety Profile. */

import { app } from '../../scripts/app.js'
import { addCard } from './psa/card.js'
import { profileSettings } from './psa/settings.js'
import { ProfileStore } from './psa/store.js'
import { profilesTab } from './psa/tab.js'
import { loadWords } from './psa/words.js'

const store = new ProfileStore()

app.registerExtension({
  name: 'ComfyUI-PSA',
  settings: profileSettings(store),

  async setup() {
    const style = document.createElement('link')
    style.rel = 'stylesheet'
    style.href = new URL('./psa/psa.css', import.meta.url).href
    document.head.append(style)
    await loadWords().catch(console.warn) // then keys stand for words, and all else works
    app.extensionManager.registerSidebarTab(profilesTab(store))
    store.presets().catch(console.warn)
    store.refresh()
  },

  /** @param {import('@comfyorg/comfyui-frontend-types').LGraphNode} node */
  nodeCreated(node) {
    if (node.comfyClass === 'PSAUserProfile') addCard(node, store)
  }
})
