// @ts-check
/** The sidebar tab "Safety Profiles": list, search, make, change, import and export. */

import { app } from '../../../scripts/app.js'
import { editor, emptyProfile } from './editor.js'
import { button, h, iconButton, profileName } from './elements.js'
import { follow } from './nodes.js'
import { problemOf } from './store.js'
import { language, t } from './words.js'

export const TAB_ID = 'psa-profiles'

/**
 * @typedef {import('./store.js').ProfileStore} ProfileStore
 * @typedef {import('./store.js').Profile} Profile
 * @typedef {import('./store.js').Entry} Entry
 * @typedef {import('./store.js').Stored} Stored
 */

/**
 * Made once for each language: what was typed is there again when the tab is closed and opened.
 *
 * @type {ReturnType<typeof makeTab> | null}
 */
let tab = null
let translate = () => {}

/** Open the tab with a profile in the editor, or with a new one. @param {string | null} id */
export function openEditor(id) {
  const { command } = app.extensionManager
  const toggle = `Workspace.ToggleSidebarTab.${TAB_ID}` // ComfyUI makes this command for each tab
  if (!command.commands.find((known) => known.id === toggle)?.active?.()) command.execute(toggle)
  translate()
  tab?.edit(id)
}

/** @param {ProfileStore} store */
export function profilesTab(store) {
  let made = tab = makeTab(store)
  let stop = () => {}

  /** Speak ComfyUI's language, which may have changed; while something is edited or can be undone, wait. */
  translate = () => {
    if (made.language === language() || made.isBusy()) return
    made.end()
    made = tab = makeTab(store)
    const shown = app.extensionManager.getSidebarTabs().find(({ id }) => id === TAB_ID)
    if (shown) shown.title = shown.tooltip = t('tab')
  }

  return {
    id: TAB_ID,
    icon: 'pi pi-shield',
    title: t('tab'),
    tooltip: t('tab'),
    type: /** @type {const} */ ('custom'),
    /** @param {HTMLElement} place */
    render(place) {
      stop()
      stop = follow(() => `${language()} ${made.isBusy()}`, () => {
        translate()
        if (!place.contains(made.element)) place.replaceChildren(made.element)
      })
      made.focus()
      const { element } = made
      element.setAttribute('aria-busy', 'true')
      store.refresh().finally(() => element.removeAttribute('aria-busy')) // other programs change it, too
    },
    destroy() {
      stop()
      made.element.remove()
    }
  }
}

/** @param {ProfileStore} store */
function makeTab(store) {
  const list = h('ul', { class: 'psa-list' })
  const said = h('div', { class: 'psa-said', role: 'status' })
  const search = h('input', {
    type: 'search', class: 'psa-search', placeholder: t('search'), 'aria-label': t('search'), oninput: showList,
    onkeydown: (/** @type {KeyboardEvent} */ event) => event.stopPropagation()
  })
  const file = h('input', { type: 'file', accept: '.json,application/json', hidden: true, onchange: importFile })
  const body = h('div', { class: 'psa-body' })
  /** @type {ReturnType<typeof editor> | null} */
  let open = null
  /** @type {string | null} Whom, if an editor is open. */
  let editing = null
  const heading = h('div', { class: 'psa-heading' },
    h('h2', {}, t('tab')),
    iconButton('plus', t('new_profile'), () => edit(null)),
    iconButton('download', t('import'), () => file.click()),
    file)
  const element = h('section', { class: 'psa-tab', 'aria-label': t('tab') }, heading, body, said)

  /** @param {string} message @param {string} [undoLabel] @param {() => Promise<void>} [undo] */
  function say(message, undoLabel, undo) {
    said.replaceChildren(h('span', {}, message))
    if (undoLabel && undo) {
      said.append(button(undoLabel, async () => {
        try {
          await undo()
          said.replaceChildren()
        } catch (error) {
          say(problemOf(error), undoLabel, undo) // what can be undone exists here alone
        }
      }))
    }
  }

  /** @param {() => Promise<unknown>} action */
  async function attempt(action) {
    try {
      await action()
    } catch (error) {
      say(problemOf(error))
    }
  }

  /** @param {string} [id] Of the profile on which the keyboard goes on. */
  function showOverview(id) {
    open = null
    body.replaceChildren(search, list)
    showList()
    focusEntry(id, 0)
  }

  /** @param {string | undefined} id @param {number} place Of the button in its line. */
  function focusEntry(id, place) {
    const entry = list.querySelector(`[data-id="${id}"]`) ?? list
    const target = entry.querySelectorAll('button')[place] ?? list.querySelector('button')
    if (element.isConnected) target?.focus()
  }

  let shown = ''
  function showList() {
    const wanted = search.value.trim().toLowerCase()
    const toShow = JSON.stringify([store.problem, store.entries, wanted])
    if (toShow === shown) return // so that the keyboard stays where it is
    shown = toShow
    /** @type {HTMLElement | null} */
    const line = list.querySelector('[data-id]:focus-within')
    const place = [...(line?.querySelectorAll('button') ?? [])].findIndex((one) => one === document.activeElement)
    fillList(wanted)
    if (line) focusEntry(line.dataset.id, place)
  }

  /** @param {string} wanted What names have to contain. */
  function fillList(wanted) {
    if (store.problem) {
      list.replaceChildren(h('li', { class: 'psa-problem', role: 'alert' }, store.problem))
      return
    }
    if (store.entries.length === 0) {
      list.replaceChildren(h('li', { class: 'psa-welcome' },
        h('p', {}, t('welcome')),
        h('p', {}, t('welcome_private')),
        button(t('make_my_profile'), () => edit(null), 'primary')))
      return
    }
    const found = store.entries.filter((entry) => profileName(entry.name).toLowerCase().includes(wanted))
    list.replaceChildren(...found.map(entryLine))
    if (found.length === 0) list.append(h('li', {}, t('none_found')))
  }

  /** @param {Entry} entry */
  function entryLine(entry) {
    const name = profileName(entry.name)
    if (entry.problem) {
      return h('li', { class: 'psa-entry psa-damaged', 'data-id': entry.id },
        h('p', { class: 'psa-problem' }, entry.problem),
        h('div', { class: 'psa-buttons' },
          entry.restorable ? button(t('restore'), () => attempt(() => store.restore(entry.id)), 'primary') : null,
          button(t('set_aside'), () => attempt(() => store.remove(entry.id)))))
    }
    return h('li', { class: `psa-entry ${entry.active ? 'psa-active' : ''}`, 'data-id': entry.id },
      h('button', {
        type: 'button', class: 'psa-name', 'aria-current': entry.active ? 'true' : null,
        'aria-label': t(entry.active ? 'is_active' : 'activate', { name }),
        onclick: () => attempt(() => store.activate(entry.id))
      },
      h('i', { class: `pi pi-${entry.active ? 'check-circle' : 'circle'}`, 'aria-hidden': 'true' }),
      h('span', {}, name),
      entry.active ? h('small', {}, t('active')) : null),
      h('span', { class: 'psa-actions' },
        iconButton('pencil', t('edit', { name }), () => edit(entry.id)),
        iconButton('copy', t('duplicate', { name }), () => attempt(() => duplicate(entry))),
        iconButton('upload', t('export', { name }), () => attempt(() => exportFile(entry))),
        iconButton('trash', t('delete', { name }), () => attempt(() => remove(entry)))))
  }

  /** @param {string | null} id */
  async function edit(id) {
    await attempt(async () => {
      if (open && editing === id) return
      if (open && !(await open.mayLeave())) return
      const presets = await store.presets()
      let stored = id === null ? null : await store.read(id)
      const isNew = stored === null
      open = editor(store, presets, stored?.profile ?? emptyProfile(), {
        title: stored ? t('edit', { name: profileName(stored.profile.name) }) : t('new_profile'),
        save: async (profile) => {
          stored = stored ? await store.save(stored, profile) : await store.create(profile)
          if (isNew && !store.problem && !store.active) await store.activate(stored.id)
          saved(stored)
        },
        saveAsNew: async (profile) => saved(await store.create(profile)),
        cancel: () => showOverview(stored?.id)
      })
      editing = id
      body.replaceChildren(open.element)
      focus()
    })
  }

  /** @param {Stored} stored */
  function saved({ id, profile }) {
    showOverview(id)
    say(t('saved', { name: profileName(profile.name) }))
  }

  function focus() {
    /** @type {HTMLInputElement | null} */
    const nameField = body.querySelector('.psa-fields input')
    nameField?.focus()
  }

  /** @param {Entry} entry */
  async function duplicate(entry) {
    const { profile } = await store.read(entry.id)
    await store.create({ ...profile, name: t('copy_of', { name: profileName(profile.name) }) })
  }

  /** @param {Entry} entry */
  async function remove(entry) {
    const stored = await store.read(entry.id)
    await store.remove(entry.id)
    say(t('deleted', { name: profileName(entry.name) }), t('undo'), () =>
      store.putBack(stored, entry.active && !store.active))
  }

  /** @param {Entry} entry */
  async function exportFile(entry) {
    const { profile } = await store.read(entry.id)
    const content = JSON.stringify({ ...(await store.presets()).file, profile }, null, 2)
    const url = URL.createObjectURL(new Blob([content], { type: 'application/json' }))
    h('a', { href: url, download: `${profileName(profile.name)}.psa.json` }).click()
    URL.revokeObjectURL(url)
    say(t('exported'))
  }

  async function importFile() {
    const chosen = file.files?.[0]
    file.value = ''
    if (!chosen) return
    await attempt(async () => {
      const content = await chosen.text().then(JSON.parse).catch(() => null)
      const { format, format_version: version } = (await store.presets()).file
      if (content?.format !== format || content.format_version !== version || typeof content.profile !== 'object') {
        throw new Error(t('no_profile_file', { file: chosen.name }))
      }
      const stored = await store.create(content.profile)
      say(t('imported', { name: profileName(stored.profile.name) }))
    })
  }

  const listening = new AbortController()
  store.addEventListener('change', showList, listening)
  window.addEventListener('beforeunload', (event) => {
    if (open?.changed()) event.preventDefault() // the browser asks
  }, listening)
  body.replaceChildren(search, list)
  showList()
  return { element, edit, focus, language: language(), isBusy: () => open !== null || said.querySelector('button') !== null, end: () => listening.abort() }
}
