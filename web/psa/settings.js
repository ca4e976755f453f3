// @ts-check
/** The settings of this pack in the dialog of ComfyUI; their names in other languages are in settings.json of locales/. */

import { app } from '../../../scripts/app.js'
import { profileName } from './elements.js'

const SHOW_NAMES = 'PSA.ShowNames'
const DEFAULT_PROFILE = 'PSA.DefaultProfile'

/** @param {import('./store.js').ProfileStore} store */
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
      options: () => [
        'active',
        ...store.entries.map((entry) => ({ value: entry.id, text: profileName(entry.name) })),
        ...store.levels.map((level) => level.id)
      ]
    }
  ]
}

/** The name of a profile, or where names are not to be shown what tells it from others. @param {import('./store.js').Entry} entry */
export function shownName(entry) {
  return app.ui.settings.getSettingValue(SHOW_NAMES) === false ? `#${entry.id.slice(0, 4)}` : profileName(entry.name)
}

/** @returns {string} */
export function defaultReference() {
  return app.ui.settings.getSettingValue(DEFAULT_PROFILE) ?? 'active'
}
