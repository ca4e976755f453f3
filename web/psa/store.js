// @ts-check
/**
 * The private store on the server (nodes/routes.py), and what this page keeps of it: names and ids. A profile is asked
 * for when it is edited or a card shows what it bans, and not kept.
 */

import { api } from '../../../scripts/api.js'
import { t } from './words.js'

/**
 * @typedef {{id: string, name: string, revision: string, active: boolean, problem: string | null,
 *   restorable: boolean}} Entry
 * @typedef {{category: string, banned: boolean, reasons: string[]}} Decision
 * @typedef {Record<string, 'ban' | 'allow' | 'rule'>} Overrides
 * @typedef {{name: string, age: number | null, gender: string | null, religion: string | null,
 *   physical_condition: string | null, mental_condition: string | null, overrides: Overrides, notes: string}} Profile
 * @typedef {{id: string, revision: string, profile: Profile, decisions: Decision[]}} Stored
 * @typedef {{id: string, label: string, profile: Profile, decisions: Decision[]}} Level
 * @typedef {{base: string, kinds: ('constant' | 'gated' | 'text')[], layers: number, encoder: string}} AdapterFacts
 * @typedef {{file: {format: string, format_version: number}, categories: string[], genders: string[], religions: string[], physical_conditions: string[],
 *   mental_conditions: string[], max_age: number, levels: Level[]}} Presets
 */

/** An answer of the server that says what is wrong, in words for the artist. */
export class StoreProblem extends Error {
  /** @param {string} message @param {number} status */
  constructor(message, status) {
    super(message)
    this.status = status
  }

  /** Whether what was read is no longer what is there. */
  get outdated() {
    return this.status === 404 || this.status === 409
  }
}

/** Fires "change" whenever the list, or a profile, may have changed. */
export class ProfileStore extends EventTarget {
  constructor() {
    super()
    /** @type {Entry[]} */
    this.entries = []
    /** @type {string | null} Why the list cannot be had. */
    this.problem = null
    /** @type {Level[]} Empty until the presets are there. */
    this.levels = []
    this._asked = 0
    /** @type {Promise<Presets> | null} */
    this._presets = null
  }

  /** @returns {Entry | undefined} */
  get active() {
    return this.entries.find((entry) => entry.active)
  }

  async refresh() {
    const number = ++this._asked
    /** @type {{entries: Entry[], problem: string | null}} */
    let found
    try {
      found = { entries: (await this._ask('GET', '/profiles')).profiles, problem: null }
    } catch (error) {
      found = { entries: [], problem: problemOf(error) }
    }
    if (number !== this._asked) return // an older list that answers late
    const same = JSON.stringify(found) === JSON.stringify({ entries: this.entries, problem: this.problem })
    Object.assign(this, found)
    if (!same || number === 1) this.dispatchEvent(new Event('change'))
  }

  /** @returns {Promise<Presets>} */
  presets() {
    this._presets ??= this._ask('GET', '/presets').then(
      (presets) => {
        this.levels = presets.levels
        return presets
      },
      (error) => {
        this._presets = null // to be asked for again
        throw error
      }
    )
    return this._presets
  }

  /** What an adapter file says about itself. @param {string} name @returns {Promise<AdapterFacts>} */
  adapter(name) {
    return this._ask('GET', `/adapter?name=${encodeURIComponent(name)}`)
  }

  /** @param {string} id @returns {Promise<Stored>} */
  read(id) {
    return this._ask('GET', `/profiles/${encodeURIComponent(id)}`)
  }

  /** @param {Profile} profile @returns {Promise<Decision[]>} */
  async preview(profile) {
    return (await this._ask('POST', '/preview', { profile })).decisions
  }

  /** @param {Profile} profile @returns {Promise<Stored>} */
  create(profile) {
    return this._change('POST', '/profiles', { profile })
  }

  /** @param {Stored} stored The version that was read. @param {Profile} profile @returns {Promise<Stored>} */
  save(stored, profile) {
    return this._change('PUT', `/profiles/${stored.id}`, { profile, revision: stored.revision })
  }

  /** @param {string} id */
  remove(id) {
    return this._change('DELETE', `/profiles/${id}`)
  }

  /** Undo a deletion. @param {Stored} stored @param {boolean} active Whether to make it the active one. */
  async putBack(stored, active) {
    await this._change('PUT', `/profiles/${stored.id}`, { profile: stored.profile, revision: null }).catch((error) => {
      throw error.outdated ? new StoreProblem(t('is_back'), 0) : error
    })
    if (active) await this.activate(stored.id)
  }

  /** @param {string} id */
  activate(id) {
    return this._change('POST', `/profiles/${id}/activate`, {})
  }

  /** @param {string} id */
  restore(id) {
    return this._change('POST', `/profiles/${id}/restore`, {})
  }

  /** @param {string} method @param {string} path @param {object} [body] */
  async _change(method, path, body) {
    try {
      return await this._ask(method, path, body)
    } finally {
      await this.refresh()
    }
  }

  /** @param {string} method @param {string} path @param {object} [body] @returns {Promise<any>} Of JSON. */
  async _ask(method, path, body) {
    const answer = await api.fetchApi(`/psa${path}`, {
      method,
      cache: 'no-store',
      ...(body && { body: JSON.stringify(body), headers: { 'Content-Type': 'application/json' } })
    }).catch(() => { throw new StoreProblem(t('no_answer'), 0) })
    const content = await answer.json().catch(() => ({}))
    if (!answer.ok) throw new StoreProblem(sayStatus(answer.status) ?? content.error ?? answer.statusText, answer.status)
    return content
  }
}

/** What happens to artists, in their language; the rest is said by the server. @param {number} status */
function sayStatus(status) {
  if (status === 404) return t('gone')
  if (status === 409) return t('changed_elsewhere')
}

/** @param {unknown} error */
export function problemOf(error) {
  return error instanceof Error ? error.message : String(error)
}
