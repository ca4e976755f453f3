// @ts-check
/** This pack's words in the language of ComfyUI, from ``locales/``, which ComfyUI serves for all packs. */

import { api } from '../../../scripts/api.js'
import { app } from '../../../scripts/app.js'

/** @type {Record<string, any>} Per language what all packs have in their files, of any shape. */
let languages = {}

export async function loadWords() {
  languages = await (await api.fetchApi('/i18n')).json()
}

/** @returns {string} ComfyUI's language now. */
export function language() {
  return String(app.extensionManager.setting.get('Comfy.Locale') ?? 'en')
}

/** @param {string} key @param {Record<string, string | number>} [values] */
export function t(key, values = {}) {
  const locale = language()
  const text = find(locale, key) ?? find(locale.split('-')[0], key) ?? find('en', key) ?? key
  return text.replace(/\{(\w+)\}/g, (/** @type {string} */ whole, /** @type {string} */ name) =>
    String(values[name] ?? whole)
  )
}

/** A word of the server (a category, a reason), or itself where there is none. @param {string} group @param {string} word */
export function tWord(group, word) {
  const key = `${group}.${word.toLowerCase().replace(/[^a-z0-9]+/g, '_')}`
  const found = t(key)
  return found === key ? word : found
}

/** @param {string} locale @param {string} key @returns {string | undefined} */
function find(locale, key) {
  return key.split('.').reduce((/** @type {any} */ place, part) => place?.[part], languages[locale]?.psa)
}
