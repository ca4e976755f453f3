"""Profiles in the browser: the tab, the editor and the card, and what of them gets into files that people share."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from frontend import open_page
from languages import LANGUAGES, read_words
from playwright.sync_api import Locator, Page, expect
from studio import COMFYUI, empty_store

from comfyui_psa.profiles import Profile, ProfileStore
from comfyui_psa.training.comfyui import PACK, ComfyUIServer, prepare_base

MARKER = "Zorblaxism"
expect.set_options(timeout=30_000)  # a machine that does something else besides


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUIServer]:
    with ComfyUIServer(COMFYUI, prepare_base(tmp_path_factory.mktemp("profiles"))) as running:
        yield running


@pytest.fixture(scope="module", params=[False, True], ids=["canvas", "nodes2"])
def browser(request: pytest.FixtureRequest, server: ComfyUIServer) -> Iterator[Page]:
    with open_page(server.url, request.param) as page:
        yield page


@pytest.fixture
def store(server: ComfyUIServer) -> Iterator[ProfileStore]:
    with empty_store(server) as store:
        yield store


@pytest.fixture
def page(browser: Page, store: ProfileStore) -> Page:
    """An empty graph, and no tab open."""
    browser.evaluate(
        """() => {
            app.graph.clear();
            const tab = app.extensionManager.sidebarTab;
            if (tab.activeSidebarTabId) tab.toggleSidebarTab(tab.activeSidebarTabId);
        }"""
    )
    return browser


def open_tab(page: Page) -> Locator:
    page.get_by_role("button", name="Safety Profiles").first.click()
    tab = page.get_by_role("region", name="Safety Profiles")
    expect(tab).to_be_visible()
    return tab


def add_card(page: Page, reference: str = "active") -> Locator:
    page.evaluate(
        """(reference) => {
            const node = LiteGraph.createNode('PSAUserProfile');
            app.graph.add(node);
            node.widgets.find((widget) => widget.name === 'profile_id').value = reference;
            node.onConfigure({});
            app.canvas.centerOnNode(node);
        }""",
        reference,
    )
    return page.locator(".psa-card")


def banned(place: Locator) -> list[str]:
    return place.locator(".psa-banned .psa-word").all_inner_texts()


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


def test_a_damaged_profile_is_said_so_and_its_earlier_version_comes_back(page: Page, store: ProfileStore) -> None:
    stored = store.save(store.create(Profile(name="Before")), Profile(name="After"))
    (store.root / f"{stored.id}.json").write_bytes(b"{")
    tab = open_tab(page)
    expect(tab.locator(".psa-damaged")).to_contain_text("is damaged")
    tab.get_by_role("button", name="Bring back the version before").click()
    expect(tab.get_by_role("button", name="Make Before the active profile")).to_be_visible()
    assert store.read(stored.id).profile == Profile(name="Before")


def test_the_card_follows_the_store_and_picks_a_profile_or_a_level(page: Page, store: ProfileStore) -> None:
    strict = store.create(Profile(name="Strict", overrides={"Hate": "ban"}))
    store.activate(strict.id)
    open_tab(page)
    card = add_card(page)
    picker = card.get_by_role("combobox", name="Whose boundaries")
    expect(picker.locator("option:checked")).to_have_text("The active profile (Strict)")
    expect(card.get_by_role("meter")).to_have_attribute("aria-valuetext", "bans 1 of 7")
    assert banned(card) == ["Hate"]
    picker.select_option("L5")
    expect(card.get_by_role("meter")).to_have_attribute("aria-valuetext", "bans 7 of 7")
    assert prompt(page)["profile_id"] == "L5"
    picker.select_option("Strict")
    expect(card.get_by_role("meter")).to_have_attribute("aria-valuetext", "bans 1 of 7")
    assert prompt(page)["profile_id"] == strict.id
    card.get_by_role("button", name="Edit").click()
    editor = page.get_by_role("form", name="Edit Strict")
    editor.get_by_role("group", name="Shocking").get_by_label("Ban").check()
    editor.get_by_role("button", name="Save").click()
    expect(card.get_by_role("meter")).to_have_attribute("aria-valuetext", "bans 2 of 7")


def test_names_stay_out_of_nodes_and_new_nodes_begin_with_another_profile_if_somebody_says_so(
    page: Page, store: ProfileStore
) -> None:
    stored = store.create(Profile(name=MARKER))
    store.activate(stored.id)
    page.evaluate("() => app.extensionManager.setting.set('PSA.ShowNames', false)")
    page.evaluate("() => app.extensionManager.setting.set('PSA.DefaultProfile', 'L4')")
    try:
        open_tab(page)
        page.evaluate("() => app.graph.add(LiteGraph.createNode('PSAUserProfile'))")
        picker = page.locator(".psa-card").get_by_role("combobox")
        expect(picker).to_have_value("L4")
        expect(picker.locator("option").first).to_have_text(f"The active profile (#{stored.id[:4]})")
        expect(picker).not_to_contain_text(MARKER)
        page.evaluate("() => app.extensionManager.setting.set('PSA.ShowNames', true)")
        expect(picker).to_contain_text(MARKER)
    finally:
        page.evaluate("() => app.extensionManager.setting.set('PSA.ShowNames', true)")
        page.evaluate("() => app.extensionManager.setting.set('PSA.DefaultProfile', 'active')")


def test_a_workflow_of_somebody_else_says_what_is_missing_and_draws_nothing(page: Page, store: ProfileStore) -> None:
    card = add_card(page, "0123456789abcdef")
    expect(card.get_by_role("alert")).to_contain_text("a profile that is not on this computer")
    expect(card.get_by_role("combobox").locator("option:checked")).to_have_text(
        "A profile that is not on this computer"
    )
    assert prompt(page)["profile_id"] == "0123456789abcdef"  # until somebody chooses
    card.get_by_role("combobox").select_option("L3")
    expect(card.get_by_role("meter")).to_be_visible()


def prompt(page: Page) -> dict[str, Any]:
    """The inputs of the only node, as they are queued."""
    (node,) = page.evaluate("async () => Object.values((await app.graphToPrompt()).output)")
    inputs: dict[str, Any] = node["inputs"]
    return inputs


def test_what_people_share_holds_the_reference_alone(page: Page, server: ComfyUIServer, store: ProfileStore) -> None:
    profile = Profile(name=MARKER, age=12, religion=MARKER, notes=MARKER)
    store.activate(store.create(profile).id)
    tab = open_tab(page)
    tab.get_by_role("button", name=f"Edit {MARKER}").click()
    card = add_card(page)
    expect(card).to_contain_text(MARKER)  # on the screen, and nowhere else
    expect(card.get_by_role("meter")).to_be_visible()
    saved = page.evaluate("() => app.graph.serialize()")
    assert saved["nodes"][0]["widgets_values"] == ["active"]
    exported = page.evaluate("async () => JSON.stringify(await app.graphToPrompt())")
    copied = page.evaluate(
        """() => {
            app.canvas.selectItems(app.graph.nodes);
            app.canvas.copyToClipboard();
            return JSON.stringify(Object.entries(localStorage)) + JSON.stringify(Object.entries(sessionStorage));
        }"""
    )
    for text in (json.dumps(saved), exported, copied):
        assert MARKER not in text
        assert "Self-Harm" not in text
    assert MARKER not in server.read_log()
    private = store.root.parent
    for path in server.base.rglob("*"):
        if path.is_file() and private not in path.parents:
            assert MARKER.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_everybody_can_use_it(page: Page, store: ProfileStore, theme: str) -> None:
    """Names for screen readers, roles and contrast, by axe-core's rules."""
    store.activate(store.create(Profile(name="Evening", age=12)).id)
    page.evaluate("(theme) => app.ui.settings.setSettingValueAsync('Comfy.ColorPalette', theme)", theme)
    tab = open_tab(page)
    card = add_card(page)
    expect(card.get_by_role("meter")).to_be_visible()
    assert violations(page) == []
    tab.get_by_role("button", name="Edit Evening").click()
    expect(tab.get_by_role("meter")).to_have_attribute("aria-valuenow", "3")
    assert violations(page) == []


def violations(page: Page) -> list[str]:
    found = Axe().run(page, context={"include": [[".psa-tab"], [".psa-card"]]})
    return [
        f"{violation['id']}: {node['html'][:200]} {node['failureSummary']}"
        for violation in found.response["violations"]
        for node in violation["nodes"]
    ]


def test_it_is_used_by_keyboard(page: Page, store: ProfileStore) -> None:
    """Letters are ComfyUI's shortcuts; in the editor they are letters."""
    tab = open_tab(page)
    tab.get_by_role("button", name="Make my profile").focus()
    page.keyboard.press("Enter")
    expect(tab.get_by_label("Name")).to_be_focused()
    page.keyboard.type("rwq")
    expect(tab.get_by_label("Name")).to_have_value("rwq")
    page.keyboard.press("Enter")
    expect(tab.get_by_role("button", name="rwq is the active profile")).to_be_visible()
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
    requests.post(f"{server.url}/settings", json={"Comfy.Locale": "de"}, timeout=30).raise_for_status()
    page = browser.context.browser.new_page()
    page.goto(server.url)
    page.get_by_role("button", name="Sicherheitsprofile").first.click()
    expect(page.get_by_role("button", name="Mein Profil anlegen")).to_be_visible()
    page.close()
    requests.post(f"{server.url}/settings", json={"Comfy.Locale": "en"}, timeout=30).raise_for_status()


def words(language: str) -> dict[str, str]:
    main = {key.removeprefix("psa."): text for key, text in read_words(language, "main").items()}
    return {**main, **read_words(language, "settings")}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_every_word(language: str) -> None:
    english, found = words("en"), words(language)
    assert found.keys() == english.keys()
    for key, text in found.items():
        assert text.strip()
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", english[key])), key
    if language != "en":
        assert sum(found[key] == english[key] for key in found) < len(found) / 5


def test_every_word_that_the_pages_use_is_there() -> None:
    used = {
        key
        for file in (PACK / "web" / "psa").glob("*.js")
        for key in re.findall(r"\bt\(\s*'([\w.]+)'", file.read_text(encoding="utf-8"))
    }
    assert len(used) > 40
    assert used <= words("en").keys()
