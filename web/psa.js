// @ts-check
/** ComfyUI-PSA in the browser: the tab "Safety Profiles", cards on nodes, and the question when a profile is missing. */

import { app } from '../../scripts/app.js'
import { addApplyCard } from './psa/apply_card.js'
import { askForMissing } from './psa/missing.js'
import { addProfileCard } from './psa/profile_card.js'
import { profileSettings } from './psa/settings.js'
import { ProfileStore } from './psa/store.js'
import { profilesTab } from './psa/tab.js'
import { loadWords } from './psa/words.js'

const store = new ProfileStore()
const words = loadWords().catch(console.warn) // without them keys stand for words, and all else works

app.registerExtension({
  name: 'ComfyUI-PSA',
  settings: profileSettings(store),

  async setup() {
    const style = document.createElement('link')
    style.rel = 'stylesheet'
    style.href = new URL('./psa/psa.css', import.meta.url).href
    document.head.append(style)
    await words
    app.extensionManager.registerSidebarTab(profilesTab(store))
    store.presets().catch(console.warn)
    store.refresh()
    window.addEventListener('focus', () => store.refresh()) // other pages and programs change it, too
  },

  /** @param {import('@comfyorg/comfyui-frontend-types').LGraphNode} node */
  nodeCreated(node) {
    if (node.comfyClass === 'PSAUserProfile') addProfileCard(node, store)
    if (node.comfyClass === 'PSAApply') addApplyCard(node, store)
  },

  /** A workflow was opened. */
  afterConfigureGraph() {
    words.then(() => askForMissing(store)) // ComfyUI does not wait for the answer
  }
})
