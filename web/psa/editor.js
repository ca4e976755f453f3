// @ts-check
/** The editor of one profile: attributes that may stay unsaid, and what follows from them while one types. */

import { app } from '../../../scripts/app.js'
import { button, chips, h, levelLabel, strictness } from './elements.js'
import { StoreProblem, problemOf } from './store.js'
import { t, tWord } from './words.js'

/**
 * @typedef {import('./store.js').Profile} Profile
 * @typedef {import('./store.js').Presets} Presets
 * @typedef {import('./store.js').Decision} Decision
 */

/** @type {('gender' | 'religion' | 'physical_condition' | 'mental_condition')[]} */
const ATTRIBUTES = ['gender', 'religion', 'physical_condition', 'mental_condition']
const OWN_WORDS = ' own words'
const PAUSE = 150 // milliseconds without a key before the preview is asked for

/** @returns {Profile} */
export function emptyProfile() {
  return {
    name: '',
    age: null,
    gender: null,
    religion: null,
    physical_condition: null,
    mental_condition: null,
    overrides: {},
    notes: ''
  }
}

let count = 0

/**
 * @param {import('./store.js').ProfileStore} store
 * @param {Presets} presets
 * @param {Profile} given
 * @param {{title: string, save: (profile: Profile) => Promise<void>, saveAsNew: (profile: Profile) => Promise<void>,
 *   cancel: () => void}} options
 * @returns {{element: HTMLElement, changed: () => boolean, mayLeave: () => Promise<boolean>}}
 */
export function editor(store, presets, given, { title, save, saveAsNew, cancel }) {
  const prefix = `psa-editor-${++count}`
  let profile = { ...given, overrides: { ...given.overrides } }
  let asked = 0
  let changed = false
  /** @type {Promise<void> | null} */
  let saving = null
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let waiting

  const meter = h('div', { class: 'psa-meter' })
  const categories = h('div', { class: 'psa-categories' })
  const problem = h('p', { class: 'psa-problem', role: 'alert' }) // of the preview
  const refusal = h('p', { class: 'psa-problem', role: 'alert' }) // of the last attempt to save
  const fields = h('div', { class: 'psa-fields' })

  /** @param {Partial<Profile>} change */
  function update(change) {
    profile = { ...profile, ...change }
    changed = true
    clearTimeout(waiting)
    waiting = setTimeout(preview, PAUSE)
  }

  /** What the server would refuse, in the artist's language. @returns {string} */
  function wrong() {
    const { age } = profile
    const right = age === null || (Number.isInteger(age) && age >= 0 && age <= presets.max_age)
    return right ? '' : t('age_wrong', { max: presets.max_age })
  }

  async function preview() {
    const number = ++asked
    problem.textContent = wrong()
    if (problem.textContent) return
    try {
      const decisions = await store.preview(profile)
      if (number !== asked) return // a later one is on its way
      meter.replaceChildren(strictness(decisions), chips(decisions))
      showReasons(decisions)
    } catch (error) {
      if (number === asked) problem.textContent = problemOf(error)
    }
  }

  /** @param {Decision[]} decisions */
  function showReasons(decisions) {
    for (const { category, banned, reasons } of decisions) {
      const place = categories.querySelector(`[data-category="${category}"] .psa-why`)
      const why = reasons.map((reason) => tWord('reasons', reason)).join(', ')
      if (place) place.textContent = `${t(banned ? 'banned' : 'allowed')}${why && ` (${why})`}`
    }
  }

  function drawFields() {
    const ageField = h('input', {
      id: `${prefix}-age`, type: 'number', min: 0, max: presets.max_age, step: 1, value: profile.age,
      placeholder: t('rather_not_say'), inputmode: 'numeric',
      // What is no number counts as a wrong one, and not as unsaid.
      oninput: () => update({ age: ageField.validity.badInput ? -1 : ageField.value === '' ? null : Number(ageField.value) })
    })
    const nameField = h('input', {
      id: `${prefix}-name`, type: 'text', maxlength: 200, value: profile.name, placeholder: t('unnamed'),
      autocomplete: 'off', oninput: () => update({ name: nameField.value })
    })
    const notesField = h('textarea', {
      id: `${prefix}-notes`, rows: 3, maxlength: 5000, oninput: () => update({ notes: notesField.value })
    }, profile.notes)
    fields.replaceChildren(
      row('name', nameField),
      row('age', ageField),
      ...ATTRIBUTES.map(attributeRow),
      row('notes', notesField, t('help.notes'))
    )
    categories.replaceChildren(...presets.categories.map(categoryRow))
  }

  /** @param {string} name @param {HTMLElement} field @param {string} [help] */
  function row(name, field, help) {
    const described = help ? `${prefix}-${name}-help` : null
    if (described) field.setAttribute('aria-describedby', described)
    return h('div', { class: 'psa-row' },
      h('label', { for: field.id }, t(`attributes.${name}`)),
      field,
      help ? h('small', { id: described }, help) : null)
  }

  /** @param {typeof ATTRIBUTES[number]} name */
  function attributeRow(name) {
    const offers = presets[/** @type {const} */ ({
      gender: 'genders', religion: 'religions', physical_condition: 'physical_conditions',
      mental_condition: 'mental_conditions'
    })[name]]
    const value = profile[name]
    const own = value !== null && !offers.includes(value)
    const words = h('input', {
      type: 'text', maxlength: 200, value: own ? value : '', hidden: !own, autocomplete: 'off',
      'aria-label': `${t(`attributes.${name}`)}: ${t('own_words')}`,
      oninput: () => update({ [name]: words.value || null })
    })
    const choice = h('select', {
      id: `${prefix}-${name}`,
      onchange: () => {
        words.hidden = choice.value !== OWN_WORDS
        if (!words.hidden) words.focus()
        update({ [name]: choice.value === OWN_WORDS ? words.value || null : choice.value || null })
      }
    },
    h('option', { value: '' }, t('rather_not_say')),
    ...offers.map((offer) => h('option', { value: offer }, tWord('values', offer))),
    h('option', { value: OWN_WORDS }, t('own_words')))
    choice.value = own ? OWN_WORDS : value ?? ''
    const found = row(name, choice)
    found.append(words)
    return found
  }

  /** @param {string} category */
  function categoryRow(category) {
    const name = `${prefix}-${category}`
    const current = profile.overrides[category] ?? 'rule'
    return h('fieldset', { class: 'psa-category', 'data-category': category },
      h('legend', {}, tWord('categories', category)),
      h('div', { class: 'psa-choices' }, .../** @type {const} */ (['rule', 'ban', 'allow']).map((choice) =>
        h('label', {},
          h('input', {
            type: 'radio', name, value: choice, checked: choice === current,
            onchange: () => update({ overrides: { ...profile.overrides, [category]: choice } })
          }),
          h('span', {}, t(`overrides.${choice}`))))),
      h('span', { class: 'psa-why', 'aria-live': 'polite' }))
  }

  const levels = h('select', {
    id: `${prefix}-level`,
    onchange: () => {
      const level = presets.levels.find(({ id }) => id === levels.value)
      if (!level) return
      profile = { ...level.profile, name: profile.name, notes: profile.notes, overrides: { ...level.profile.overrides } }
      levels.value = ''
      changed = true
      drawFields()
      preview()
    }
  },
  h('option', { value: '' }, t('choose_level')),
  ...presets.levels.map((level) => h('option', { value: level.id }, levelLabel(level))))

  const saveButton = h('button', { type: 'submit', class: 'psa-button primary' }, t('save'))

  /** @param {Event} event */
  async function submit(event) {
    event.preventDefault()
    refusal.replaceChildren()
    if (wrong()) {
      problem.textContent = wrong()
      return
    }
    await attempt(save)
  }

  /** @param {(profile: Profile) => Promise<void>} store What to do with what was typed. */
  async function attempt(store) {
    form.inert = true // what is typed meanwhile would be lost
    saving = store(profile)
    try {
      await saving
      changed = false
    } catch (error) {
      refusal.replaceChildren(problemOf(error))
      if (error instanceof StoreProblem && error.outdated) {
        refusal.append(button(t('save_as_new'), () => attempt(saveAsNew)))
      }
    } finally {
      form.inert = false
      saving = null
    }
  }

  async function leave() {
    if (await mayLeave()) cancel()
  }

  /** Whether what was typed may go. @returns {Promise<boolean>} */
  async function mayLeave() {
    await saving?.catch(() => {})
    return !changed || Boolean(await app.extensionManager.dialog.confirm({ title, message: t('discard') }))
  }

  drawFields()
  preview()
  const form = h('form', {
    class: 'psa-editor', 'aria-label': title, novalidate: true, autocomplete: 'off', spellcheck: 'false', onsubmit: submit,
    onkeydown: (/** @type {KeyboardEvent} */ event) => {
      event.stopPropagation() // letters are ComfyUI's shortcuts
      if (event.key === 'Escape' && !event.isComposing) leave()
    }
  },
  h('h3', {}, title),
  row('level', levels),
  fields,
  h('h4', {}, t('what_follows')),
  meter,
  categories,
  problem,
  refusal,
  h('div', { class: 'psa-buttons' }, button(t('cancel'), leave), saveButton))
  return { element: form, changed: () => changed, mayLeave }
}
