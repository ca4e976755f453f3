"""Profiles in the browser: the tab "Safety Profiles" and its editor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import requests
from frontend import add_card, add_node, banned, open_tab, violations
from playwright.sync_api import Locator, Page, Route, expect

from comfyui_psa.profiles import Profile, ProfileStore
from comfyui_psa.training.comfyui import ComfyUIServer

MARKER = "Zorblaxism"


@pytest.fixture
def page(empty_page: Page) -> Page:
    return empty_page


def test_a_first_profile_is_made_in_one_go(page: Page, store: ProfileStore) -> None:
    card = add_card(page)
    expect(card.get_by_role("alert")).to_contain_text("No profile is active")
    tab = open_tab(page)
    tab.get_by_role("button", name="Make my profile").click()
    tab.get_by_label("Name").fill("Evening")
    expect(tab.get_by_role("meter")).to_have_attribute("aria-valuenow", "0")
    tab.get_by_label("Age").fill("12")
    expect(tab.get_by_role("meter")).to_have_attribute("aria-valuenow", "3")
    tab.get_by_label("Religion", exact=True).select_option("In my own words")
    tab.get_by_label("Religion: In my own words").fill(MARKER)
    violence = tab.get_by_role("group", name="Violence")
    expect(violence).to_contain_text("banned (under 18)")
    violence.get_by_label("Allow").check()
    expect(violence).to_contain_text("allowed (your own choice)")
    tab.get_by_role("button", name="Save").click()
    expect(tab.get_by_role("button", name="Evening is the active profile")).to_be_visible()

    (entry,) = store.entries()
    assert store.resolve("active").id == entry.id
    assert store.read(entry.id).profile == Profile(
        name="Evening", age=12, religion=MARKER, overrides={"Violence": "allow"}
    )
    expect(card.get_by_role("meter")).to_have_attribute("aria-valuetext", "bans 2 of 7")
    assert banned(card) == ["Self-Harm", "Sexuality"]


def test_a_profile_is_renamed_and_goes_back_to_the_rules(page: Page, store: ProfileStore) -> None:
    stored = store.create(Profile(name="Evening", age=12, overrides={"Violence": "allow"}))
    tab = open_tab(page)
    tab.get_by_role("button", name="Edit Evening").click()
    tab.get_by_label("Name").fill("Morning")
    violence = tab.get_by_role("group", name="Violence")
    expect(violence.get_by_label("Allow")).to_be_checked()
    violence.get_by_label("By rule").check()
    expect(violence).to_contain_text("banned (under 18)")
    tab.get_by_role("button", name="Save").click()
    expect(tab.get_by_role("button", name="Make Morning the active profile")).to_be_visible()
    expected = Profile(name="Morning", age=12, overrides={"Violence": "rule"})
    assert store.read(stored.id).profile == expected


def test_nothing_has_to_be_said(page: Page) -> None:
    tab = open_tab(page)
    tab.get_by_role("button", name="Make my profile").click()
    for attribute in ("Gender", "Religion", "Physical condition", "Mental condition"):
        choice = tab.get_by_label(attribute, exact=True)
        expect(choice).to_have_value("")
        expect(choice.locator("option:checked")).to_have_text("I'd rather not say")
    expect(tab.get_by_label("Age")).to_have_attribute("placeholder", "I'd rather not say")


def test_the_card_makes_a_profile(page: Page) -> None:
    add_card(page).get_by_role("button", name="New").click()
    expect(page.get_by_role("form", name="New profile")).to_be_visible()


def test_saying_nothing_is_an_answer_and_a_level_a_start(page: Page, store: ProfileStore) -> None:
    tab = open_tab(page)
    tab.get_by_role("button", name="Make my profile").click()
    expect(tab.get_by_label("Gender", exact=True)).to_have_value("")
    tab.get_by_label("Level").select_option("L5")
    expect(tab.get_by_role("meter")).to_have_attribute("aria-valuenow", "7")
    tab.get_by_role("button", name="Cancel").click()
    page.get_by_role("dialog").get_by_role("button", name="Confirm").click()
    assert store.entries() == ()
    tab.get_by_role("button", name="Make my profile").click()
    tab.get_by_role("button", name="Save").click()
    expect(tab.get_by_role("status")).to_contain_text("Unnamed is saved")
    assert store.resolve("active").profile == Profile()


def test_the_list_is_searched_and_its_profiles_copied_deleted_and_brought_back(page: Page, store: ProfileStore) -> None:
    work = store.create(Profile(name="Work", age=30))
    evening = store.create(Profile(name="Evening", age=12, notes=MARKER))
    store.activate(evening.id)
    tab = open_tab(page)
    tab.get_by_label("Search profiles").fill("wor")
    expect(tab.locator("[data-id]")).to_have_count(1)
    tab.get_by_label("Search profiles").fill("")

    tab.get_by_role("button", name="Duplicate Evening").click()
    expect(tab.get_by_role("button", name="Make Evening (copy) the active profile")).to_be_visible()
    copies = [store.read(entry.id).profile for entry in store.entries() if "copy" in entry.name]
    assert copies == [evening.profile.model_copy(update={"name": "Evening (copy)"})]

    tab.get_by_role("button", name="Delete Evening", exact=True).click()
    expect(tab.get_by_role("status")).to_contain_text("Evening is deleted")
    assert store.active_id() is None
    tab.get_by_role("button", name="Undo").click()
    expect(tab.get_by_role("button", name="Evening is the active profile")).to_be_visible()
    assert store.resolve("active").profile == evening.profile
    assert store.active_id() == evening.id

    tab.get_by_role("button", name="Make Work the active profile").click()
    expect(tab.get_by_role("button", name="Work is the active profile")).to_be_visible()
    assert store.active_id() == work.id


def test_a_profile_goes_into_a_file_and_comes_out_of_one(page: Page, store: ProfileStore, tmp_path: Path) -> None:
    stored = store.create(Profile(name="Evening", age=12, religion=MARKER))
    tab = open_tab(page)
    with page.expect_download() as started:
        tab.get_by_role("button", name="Export Evening to a file").click()
    started.value.save_as(tmp_path / "evening.json")
    assert json.loads((tmp_path / "evening.json").read_text(encoding="utf-8")) == {
        "format": "psa_profile",
        "format_version": 1,
        "profile": stored.profile.model_dump(),
    }
    tab.locator("input[type=file]").set_input_files(tmp_path / "evening.json")
    expect(tab.get_by_role("status")).to_contain_text("Evening is imported")
    assert [store.read(entry.id).profile for entry in store.entries()] == [stored.profile] * 2

    for name, content in {"text.json": "no JSON", "other.json": '{"format": "other"}'}.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        tab.locator("input[type=file]").set_input_files(tmp_path / name)
        expect(tab.get_by_role("status")).to_contain_text(f"{name} is no profile")
    wrong = {"format": "psa_profile", "format_version": 1, "profile": {"age": MARKER}}
    (tmp_path / "wrong.json").write_text(json.dumps(wrong), encoding="utf-8")
    tab.locator("input[type=file]").set_input_files(tmp_path / "wrong.json")
    expect(tab.get_by_role("status")).to_contain_text("age should be a whole number")
    assert len(store.entries()) == 2


def test_a_change_from_elsewhere_is_not_overwritten_and_what_was_typed_stays(page: Page, store: ProfileStore) -> None:
    stored = store.create(Profile(name="Evening", age=12))
    tab = open_tab(page)
    tab.get_by_role("button", name="Edit Evening").click()
    tab.get_by_label("Age").fill("40")
    elsewhere = store.save(stored, Profile(name="Evening", age=13))
    tab.get_by_role("button", name="Save").click()
    expect(tab.get_by_role("alert")).to_contain_text("changed by another program")
    expect(tab.get_by_label("Age")).to_have_value("40")
    assert store.read(stored.id) == elsewhere
    tab.get_by_role("button", name="Save as a new profile").click()
    expect(tab.get_by_role("status")).to_contain_text("Evening is saved")
    assert sorted(str(store.read(entry.id).profile.age) for entry in store.entries()) == ["13", "40"]


def test_what_is_typed_while_a_save_runs_is_not_lost(page: Page, store: ProfileStore) -> None:
    stored = store.create(Profile(name="Evening"))
    tab = open_tab(page)
    tab.get_by_role("button", name="Edit Evening").click()
    tab.get_by_label("Notes").fill("before")
    waiting: list[Route] = []

    def hold(route: Route) -> None:
        waiting.append(route)

    page.route("**/psa/profiles/*", hold)
    try:
        tab.get_by_role("button", name="Save").click()
        expect(tab.locator("form")).to_have_attribute("inert", "")
        tab.get_by_role("button", name="New profile").click()
        (saving,) = waiting
        saving.continue_()
    finally:
        page.unroute("**/psa/profiles/*", hold)
    expect(tab.get_by_role("form", name="New profile")).to_be_visible()
    assert store.read(stored.id).profile.notes == "before"


def test_a_list_that_answers_late_does_not_win(page: Page, store: ProfileStore) -> None:
    first, second = store.create(Profile(name="First")), store.create(Profile(name="Second"))
    store.activate(second.id)
    tab = open_tab(page)
    expect(tab.get_by_role("button", name="Second is the active profile")).to_be_visible()
    page.evaluate(
        """() => {
            const real = window.fetch;
            window.fetch = async (...asked) => {
                window.fetch = real;
                const answer = await real(...asked);
                await new Promise((go) => { window.goOn = go; });
                return answer;
            };
            window.dispatchEvent(new Event('focus'));
        }"""
    )
    tab.get_by_role("button", name="Make First the active profile").click()
    expect(tab.get_by_role("button", name="First is the active profile")).to_be_visible()
    page.evaluate("async () => { window.goOn(); await new Promise((done) => setTimeout(done)); }")
    expect(tab.get_by_role("button", name="First is the active profile")).to_be_visible()
    assert store.active_id() == first.id


def test_a_damaged_profile_is_said_so_and_its_earlier_version_comes_back(page: Page, store: ProfileStore) -> None:
    stored = store.save(store.create(Profile(name="Before")), Profile(name="After"))
    (store.root / f"{stored.id}.json").write_bytes(b"{")
    tab = open_tab(page)
    expect(tab.locator(".psa-damaged")).to_contain_text("is damaged")
    tab.get_by_role("button", name="Bring back the version before").click()
    expect(tab.get_by_role("button", name="Make Before the active profile")).to_be_visible()
    assert store.read(stored.id).profile == Profile(name="Before")


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_everybody_can_use_it(page: Page, store: ProfileStore, theme: str) -> None:
    """Names for screen readers, roles and contrast, by axe-core's rules, in every state of tab and cards."""
    page.evaluate("(theme) => app.ui.settings.setSettingValueAsync('Comfy.ColorPalette', theme)", theme)
    page.wait_for_function(
        """(dark) => {
            const colour = getComputedStyle(document.documentElement).getPropertyValue('--comfy-menu-bg');
            return (parseInt(colour.slice(1, 3), 16) < 128) === dark;
        }""",
        arg=theme == "dark",
    )
    tab, card = open_tab(page), add_card(page)

    def check(*shown: Locator) -> None:
        for one in shown:
            expect(one).to_be_visible()
        assert violations(page, ".psa-tab", ".psa-card") == []

    check(tab.get_by_role("button", name="Make my profile"), card.get_by_role("alert"))  # nobody is active
    damaged = store.create(Profile(name="Damaged"))
    (store.root / f"{damaged.id}.json").write_bytes(b"{")
    store.activate(store.create(Profile(name="Evening", age=12)).id)
    page.evaluate("() => window.dispatchEvent(new Event('focus'))")
    check(tab.locator(".psa-damaged"), card.get_by_role("meter"))
    tab.get_by_role("button", name="Edit Evening").click()
    expect(tab.get_by_role("meter")).to_have_attribute("aria-valuenow", "3")
    tab.get_by_label("Age").fill("300")
    check(tab.get_by_role("alert").filter(has_text="whole number"))
    tab.get_by_role("button", name="Cancel").click()
    page.get_by_role("dialog").get_by_role("button", name="Confirm").click()
    tab.get_by_role("button", name="Delete Evening").click()
    check(tab.get_by_role("button", name="Undo"))
    add_node(page, "PSAApply")
    badge = page.get_by_role("group", name="What PSA does here").get_by_role("status")
    expect(badge).to_have_text("Acts at strength 1")
    check(badge)
    page.evaluate("() => { app.graph.nodes.find((node) => node.type === 'PSAApply').widgets[0].value = 0; }")
    expect(badge).to_have_text("Off: strength 0 is the base model")
    check(badge)


def test_it_is_used_by_keyboard(page: Page, store: ProfileStore) -> None:
    """Letters are ComfyUI's shortcuts; in the editor they are letters."""
    tab = open_tab(page)
    tab.get_by_role("button", name="Make my profile").focus()
    page.keyboard.press("Enter")
    expect(tab.get_by_label("Name")).to_be_focused()
    page.keyboard.type("rwq")
    expect(tab.get_by_label("Name")).to_have_value("rwq")
    page.keyboard.press("Enter")
    expect(tab.get_by_role("button", name="rwq is the active profile")).to_be_focused()
    tab.get_by_role("button", name="Edit rwq").focus()
    page.keyboard.press("Enter")
    expect(tab.get_by_role("form")).to_be_visible()
    page.keyboard.press("Escape")
    expect(tab.get_by_role("form")).to_have_count(0)


def test_what_was_typed_is_not_thrown_away_unasked(page: Page, store: ProfileStore) -> None:
    store.create(Profile(name="Evening"))
    tab = open_tab(page)
    tab.get_by_role("button", name="Edit Evening").click()
    tab.get_by_label("Age").fill("12")
    for leave, answer, stays in (("Cancel", "Cancel", 1), ("New profile", "Cancel", 1), ("Cancel", "Confirm", 0)):
        tab.get_by_role("button", name=leave).click()
        page.get_by_role("dialog").get_by_role("button", name=answer).click()
        expect(tab.get_by_role("form", name="Edit Evening")).to_have_count(stays)


def test_what_was_typed_is_there_again_when_the_tab_is(page: Page, store: ProfileStore) -> None:
    store.create(Profile(name="Evening"))
    tab = open_tab(page)
    tab.get_by_role("button", name="Edit Evening").click()
    tab.get_by_label("Notes").fill("half a sentence")
    page.get_by_role("button", name="Safety Profiles").first.click()
    expect(tab).to_have_count(0)
    open_tab(page)
    expect(tab.get_by_label("Notes")).to_have_value("half a sentence")
    tab.get_by_role("button", name="Save").click()
    expect(tab.get_by_role("status")).to_contain_text("Evening is saved")
    assert [store.read(entry.id).profile.notes for entry in store.entries()] == ["half a sentence"]


@pytest.mark.parametrize("age", ["-3", "12.5", "1000"])
def test_a_wrong_age_is_said_at_once_and_not_saved(page: Page, store: ProfileStore, age: str) -> None:
    stored = store.create(Profile(name="Evening", age=12))
    tab = open_tab(page)
    tab.get_by_role("button", name="Edit Evening").click()
    tab.get_by_label("Age").fill(age)
    expect(tab.get_by_role("alert").filter(has_text="The age is a whole number from 0 to")).to_be_visible()
    tab.get_by_role("button", name="Save").click()
    expect(tab.get_by_role("form")).to_be_visible()
    assert store.read(stored.id) == stored


def test_undo_leaves_alone_who_has_become_active(page: Page, store: ProfileStore) -> None:
    first, second = store.create(Profile(name="First")), store.create(Profile(name="Second"))
    store.activate(first.id)
    tab = open_tab(page)
    tab.get_by_role("button", name="Delete First").click()
    tab.get_by_role("button", name="Make Second the active profile").click()
    expect(tab.get_by_role("button", name="Second is the active profile")).to_be_visible()
    tab.get_by_role("button", name="Undo").click()
    expect(tab.get_by_role("button", name="Make First the active profile")).to_be_visible()
    assert store.active_id() == second.id


def test_the_language_is_comfyuis(browser: Page, server: ComfyUIServer, store: ProfileStore) -> None:
    assert browser.context.browser
    requests.post(f"{server.url}/settings", json={"Comfy.Locale": "fr"}, timeout=30).raise_for_status()
    page = browser.context.browser.new_page()
    try:
        page.goto(server.url)
        page.get_by_role("button", name="Profils de sécurité").first.click()
        expect(page.get_by_role("button", name="Créer mon profil")).to_be_visible()
    finally:
        page.close()
        requests.post(f"{server.url}/settings", json={"Comfy.Locale": "en"}, timeout=30).raise_for_status()


def test_another_language_is_spoken_at_once_but_not_in_the_middle_of_a_profile(page: Page, store: ProfileStore) -> None:
    speak = "(language) => app.extensionManager.setting.set('Comfy.Locale', language)"
    tab = page.locator(".psa-tab")
    open_tab(page).get_by_role("button", name="Make my profile").click()
    tab.get_by_label("Name").fill("Evening")
    try:
        page.evaluate(speak, "fr")
        expect(tab.get_by_label("Name")).to_have_value("Evening")
        tab.get_by_role("button", name="Save").click()
        expect(tab.get_by_placeholder("Chercher un profil")).to_be_visible()
        expect(page.get_by_role("button", name="Profils de sécurité").first).to_be_visible()
        assert [entry.name for entry in store.entries()] == ["Evening"]
    finally:
        page.evaluate(speak, "en")
    expect(tab.get_by_placeholder("Search profiles")).to_be_visible()
