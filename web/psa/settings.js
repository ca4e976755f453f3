// @ts-check
/** The settings of this pack in the dialog of ComfyUI; their names in other languages are in settings.json of locales/. */

import { app } from '../../../scripts/app.js'
import { profileName } from './elements.js'
import { t } from './words.js'

/** @typedef {import('@comfyorg/comfyui-frontend-types').SettingParams} SettingParams */

// The types know the ids of ComfyUI's own settings alone.
const SHOW_NAMES = /** @type {SettingParams['id']} */ (/** @type {string} */ ('PSA.ShowNames'))
const DEFAULT_PROFILE = /** @type {SettingParams['id']} */ (/** @type {string} */ ('PSA.DefaultProfile'))

/** @param {import('./store.js').ProfileStore} store @returns {SettingParams[]} */
export function profileSettings(store) {
  return [
    {
      id: SHOW_NAMES,
      category: ['PSA', 'Profiles', 'ShowNames'],
      name: 'Show the names of profiles in nodes',
      tooltip: 'Off: others who look at your screen, or at a picture of it, see no name.',
      type: 'boolean',
      defaultValue: true,
      onChange: () => store.dispatchEvent(new Event('change'))
    },
    {
      id: DEFAULT_PROFILE,
      category: ['PSA', 'Profiles', 'DefaultProfile'],
      name: 'Profile of new nodes',
      tooltip: 'What a new User Safety Profile refers to.',
      type: 'combo',
      defaultValue: 'active',
      // Read whenever the dialog is opened.
      get options() {
        return [
          { value: 'active', text: t('active_profile_short') },
          ...store.entries.map((entry) => ({ value: entry.id, text: profileName(entry.name) })),
          ...store.levels.map((level) => level.id)
        ]
      }
    }
  ]
}

/** The name of a profile, or where names are not to be shown what tells it from others. @param {import('./store.js').Entry} entry */
export function shownName(entry) {
  return app.extensionManager.setting.get(SHOW_NAMES) === false ? `#${entry.id.slice(0, 4)}` : profileName(entry.name)
}

/** What a new node refers to: what was chosen, if it is still there. @param {import('./store.js').ProfileStore} store */
export function defaultReference(store) {
  const chosen = app.extensionManager.setting.get(DEFAULT_PROFILE)
  const known = store.levels.some(({ id }) => id === chosen) || store.entries.some(({ id }) => id === chosen)
  return known ? String(chosen) : 'active'
}
