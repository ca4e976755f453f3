// @ts-check
/** Elements by a call, and the pieces that tab, editor and card have in common. */

import { t, tWord } from './words.js'

/**
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, any>} [attributes] Those that begin with "on" are listeners, each of its own event; null and
 *   false are left out.
 * @param {...(Node | string | null | undefined)} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value)
    else if (value === true) element.setAttribute(name, '')
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, String(value))
  }
  element.append(...children.filter((child) => child !== null && child !== undefined))
  return element
}

/** @param {string} icon A PrimeIcons name. @param {string} label @param {() => void} action */
export function iconButton(icon, label, action) {
  return h(
    'button',
    { type: 'button', class: 'psa-icon', title: label, 'aria-label': label, onclick: action },
    h('i', { class: `pi pi-${icon}`, 'aria-hidden': 'true' })
  )
}

/** @param {string} label @param {() => void} action @param {string} [kind] "primary" or nothing. */
export function button(label, action, kind = '') {
  return h('button', { type: 'button', class: `psa-button ${kind}`, onclick: action }, label)
}

/** What is banned: marked by a sign and struck out, not by colour alone. @param {import('./store.js').Decision[]} decisions */
export function chips(decisions) {
  return h(
    'ul',
    { class: 'psa-chips' },
    ...decisions.map(({ category, banned }) =>
      h(
        'li',
        { class: banned ? 'psa-banned' : 'psa-allowed' },
        h('i', { class: `pi pi-${banned ? 'ban' : 'check'}`, 'aria-hidden': 'true' }),
        h('span', { class: 'psa-hidden' }, t(banned ? 'banned' : 'allowed') + ': '),
        h('span', { class: 'psa-word' }, tWord('categories', category))
      )
    )
  )
}

/** @param {import('./store.js').Decision[]} decisions */
export function strictness(decisions) {
  const banned = decisions.filter((decision) => decision.banned).length
  const label = t('strictness', { banned, all: decisions.length })
  return h(
    'div',
    { class: 'psa-strictness', role: 'meter', 'aria-label': label, 'aria-valuemin': 0, 'aria-valuenow': banned,
      'aria-valuemax': decisions.length, 'aria-valuetext': label },
    h('span', { class: 'psa-bars', 'aria-hidden': 'true' },
      ...decisions.map((_, place) => h('span', { class: place < banned ? 'psa-full' : '' }))),
    h('span', {}, label)
  )
}

/** @param {string} name */
export function profileName(name) {
  return name || t('unnamed')
}

/** @param {import('./store.js').Level} level */
export function levelLabel(level) {
  const banned = level.decisions.filter((decision) => decision.banned)
  if (banned.length === 0) return `${level.id} – ${t('bans_nothing')}`
  if (banned.length === level.decisions.length) return `${level.id} – ${t('bans_everything')}`
  const names = banned.map((decision) => tWord('categories', decision.category)).join(', ')
  return `${level.id} – ${t('bans', { categories: names })}`
}
