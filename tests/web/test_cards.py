"""The cards on User Safety Profile and Apply PSA, and the question when a workflow names a profile that is missing."""

from __future__ import annotations

from typing import Any

import pytest
from examples import example
from frontend import add_card, add_node, banned, open_tab, violations
from playwright.sync_api import Locator, Page, expect

from comfyui_psa.profiles import Profile, ProfileStore

MARKER = "Zorblaxism"


@pytest.fixture
def page(empty_page: Page) -> Page:
    return empty_page


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
        page.evaluate("() => void app.graph.add(LiteGraph.createNode('PSAUserProfile'))")
        picker = page.locator(".psa-card").get_by_role("combobox")
        expect(picker).to_have_value("L4")
        expect(picker.locator("option").first).to_have_text(f"The active profile (#{stored.id[:4]})")
        expect(picker).not_to_contain_text(MARKER)
        page.evaluate("() => app.extensionManager.setting.set('PSA.ShowNames', true)")
        expect(picker).to_contain_text(MARKER)
    finally:
        page.evaluate("() => app.extensionManager.setting.set('PSA.ShowNames', true)")
        page.evaluate("() => app.extensionManager.setting.set('PSA.DefaultProfile', 'active')")


def open_with_reference(page: Page, reference: str) -> None:
    """Open first steps, as people do, under the profile with this reference."""
    workflow = example("psa_first_steps")
    (node,) = (node for node in workflow["nodes"] if node["type"] == "PSASafetyLevel")
    node |= {"type": "PSAUserProfile", "widgets_values": [reference]}
    page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)


def profile_card(page: Page) -> Locator:
    return page.locator(".psa-card").filter(has=page.get_by_role("combobox"))


MISSING = "0123456789abcdef"


def test_a_workflow_that_names_a_missing_profile_asks_whose_boundaries_and_draws_nothing_before(
    page: Page, store: ProfileStore
) -> None:
    store.activate(store.create(Profile(name="Mine", overrides={"Hate": "ban"})).id)
    open_with_reference(page, MISSING)
    dialog = page.get_by_role("dialog", name="Whose boundaries?")
    expect(dialog).to_contain_text("a profile that is not on this computer")
    assert prompt(page)["profile_id"] == MISSING
    assert violations(page, ".psa-dialog") == []
    dialog.get_by_role("button", name="Decide later").click()
    expect(dialog).to_have_count(0)
    card = profile_card(page)
    expect(card.get_by_role("alert")).to_contain_text("a profile that is not on this computer")
    expect(card.get_by_role("combobox").locator("option:checked")).to_have_text(
        "A profile that is not on this computer"
    )
    assert prompt(page)["profile_id"] == MISSING
    refused = page.evaluate(
        """() => app.graphToPrompt().then((prompt) => app.api.queuePrompt(0, prompt))
            .then(() => 'queued', (error) => JSON.stringify(error.response))"""
    )
    assert "psa profile list" in refused

    open_with_reference(page, f"{MISSING[:-1]}0")
    expect(dialog.get_by_role("combobox").locator("option:checked")).to_have_text("The active profile (Mine)")
    dialog.get_by_role("button", name="Use it").click()
    expect(dialog).to_have_count(0)
    assert prompt(page)["profile_id"] == "active"
    expect(card.get_by_role("meter")).to_have_attribute("aria-valuetext", "bans 1 of 7")


def test_without_a_profile_of_ones_own_it_offers_levels_or_to_make_one(page: Page, store: ProfileStore) -> None:
    open_with_reference(page, f"{MISSING[:-1]}1")
    dialog = page.get_by_role("dialog", name="Whose boundaries?")
    dialog.get_by_role("combobox").select_option("L4")
    dialog.get_by_role("button", name="Use it").click()
    assert prompt(page)["profile_id"] == "L4"

    open_with_reference(page, f"{MISSING[:-1]}2")
    dialog.get_by_role("button", name="Make my profile").click()
    assert prompt(page)["profile_id"] == "active"
    expect(page.get_by_role("form", name="New profile")).to_be_visible()


def test_a_profile_that_is_here_is_not_asked_about(page: Page, store: ProfileStore) -> None:
    stored = store.create(Profile(name="Mine"))
    for reference in (stored.id, "active", "L2", f"{MISSING[:-1]}3"):
        open_with_reference(page, reference)
        expect(profile_card(page).get_by_role("combobox")).to_have_value(reference)
        if reference != f"{MISSING[:-1]}3":
            expect(page.locator(".psa-dialog")).to_have_count(0)
    # Questions come in the order of the workflows: by now one of those before would be there.
    expect(page.locator(".psa-dialog")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.locator(".psa-dialog")).to_have_count(0)


def test_apply_psa_shows_what_it_does(page: Page) -> None:
    page.evaluate("(workflow) => app.loadGraphData(workflow)", example("psa_first_steps"))
    card = page.get_by_role("group", name="What PSA does here")
    expect(card.get_by_role("status")).to_have_text("Acts at strength 1")
    assert facts(card) == {
        "Adapter": "psa_miniature.safetensors",
        "Base": "PSA Miniature",
        "Acts on": "the prompt",
        "Encoder": "attributes-1",
    }
    assert violations(page, ".psa-card") == []

    set_widget(page, "PSAApply", "strength", 0.8)
    expect(card.get_by_role("status")).to_have_text("Acts at strength 0.8")
    set_widget(page, "PSALoadAdapter", "adapter_name", "psa_miniature_constant.safetensors")
    expect(card).to_contain_text("psa_miniature_constant.safetensors")
    assert facts(card)["Acts on"] == "17 cross-attention layers"
    set_widget(page, "PSALoadAdapter", "adapter_name", "elsewhere.safetensors")
    expect(card.get_by_role("alert")).to_contain_text('There is no adapter "elsewhere.safetensors" on this machine')
    page.evaluate("() => void app.graph.remove(app.graph.nodes.find((node) => node.type === 'PSALoadAdapter'))")
    expect(card).to_contain_text("Connect “Load PSA Adapter”")


def test_a_compiled_profile_is_named_in_place_of_an_adapter(page: Page) -> None:
    page.evaluate("(workflow) => app.loadGraphData(workflow)", example("psa_first_steps"))
    page.evaluate(
        """() => {
            const apply = app.graph.nodes.find((node) => node.type === 'PSAApply');
            app.graph.remove(app.graph.nodes.find((node) => node.type === 'PSALoadAdapter'));
            const loader = LiteGraph.createNode('PSALoadCompiledProfile');
            app.graph.add(loader);
            loader.widgets[0].value = 'mine.safetensors';
            loader.connect(0, apply, apply.findInputSlot('embedding'));
        }"""
    )
    card = page.get_by_role("group", name="What PSA does here")
    expect(card).to_contain_text("mine.safetensors")
    assert card.locator("dt").all_inner_texts() == ["Compiled profile"]


def test_behind_save_compiled_profile_the_card_tells_of_its_adapter(page: Page) -> None:
    """And behind Load Compiled Profile, in the row that is muted, of the file."""
    page.evaluate("(workflow) => app.loadGraphData(workflow)", example("psa_compiled"))
    cards = page.get_by_role("group", name="What PSA does here")
    expect(cards.filter(has_text="psa_miniature.safetensors")).to_have_count(1)
    expect(cards.filter(has_text="level_5.safetensors")).to_have_count(1)


def in_a_subgraph(page: Page) -> None:
    """Open first steps with Encode Safety Profile and Apply PSA in a subgraph."""
    page.evaluate(
        """async (workflow) => {
            await app.loadGraphData(workflow);
            const inside = app.graph.nodes.filter((node) => ['PSAApply', 'PSAEncodeProfile'].includes(node.type));
            app.graph.convertToSubgraph(new Set(inside));
            await app.loadGraphData(app.graph.serialize());
        }""",
        example("psa_first_steps"),
    )


def test_in_a_subgraph_the_badge_is_that_of_what_it_is_in(page: Page) -> None:
    in_a_subgraph(page)
    page.evaluate(
        """() => {
            const node = app.graph.nodes.find((node) => node.subgraph);
            app.canvas.openSubgraph(node.subgraph, node);
        }"""
    )
    card = page.get_by_role("group", name="What PSA does here")
    expect(card.get_by_role("status")).to_have_text("Acts at strength 1")
    expect(card).to_contain_text("comes from outside")
    for mode, said in ((4, "Bypassed: no boundaries apply"), (2, "Muted"), (0, "Acts at strength 1")):
        page.evaluate("""(mode) => { app.graph.nodes.find((node) => node.subgraph).mode = mode; }""", mode)
        expect(card.get_by_role("status")).to_contain_text(said)
    page.evaluate("() => app.canvas.setGraph(app.graph)")


def test_nothing_goes_on_for_nodes_that_are_gone(page: Page) -> None:
    """Frontend 1.32 does not tell nodes in subgraphs that a workflow was closed."""
    for _ in range(3):
        in_a_subgraph(page)
    page.evaluate("() => app.graph.clear()")
    loops = page.evaluate(
        """async () => {
            const frames = (n) => new Promise((done) => {
                const step = () => n-- > 0 ? real.call(window, step) : done();
                step();
            });
            const real = window.requestAnimationFrame;
            await frames(5);
            let ours = 0;
            window.requestAnimationFrame = (then) => {
                ours += String(new Error().stack).includes('/psa/');
                return real.call(window, then);
            };
            await frames(5);
            window.requestAnimationFrame = real;
            return ours;
        }"""
    )
    assert loops == 0


def facts(card: Locator) -> dict[str, str]:
    expect(card.locator("dd")).to_have_count(4)
    return dict(zip(card.locator("dt").all_inner_texts(), card.locator("dd").all_inner_texts(), strict=True))


def set_widget(page: Page, node_type: str, name: str, value: object) -> None:
    page.evaluate(
        """([type, name, value]) => {
            const node = app.graph.nodes.find((node) => node.type === type);
            node.widgets.find((widget) => widget.name === name).value = value;
        }""",
        [node_type, name, value],
    )


def test_apply_psa_says_clearly_when_it_does_nothing(page: Page) -> None:
    add_node(page, "PSAApply")
    set_widget(page, "PSAApply", "strength", 0)
    badge = page.get_by_role("group", name="What PSA does here").get_by_role("status")
    expect(badge).to_have_text("Off: strength 0 is the base model")
    page.locator("#graph-canvas").press("Control+b")
    expect(badge).to_have_text("Bypassed: no boundaries apply")
    page.locator("#graph-canvas").press("Control+b")
    expect(badge).to_have_text("Off: strength 0 is the base model")
    page.locator("#graph-canvas").press("Control+m")
    expect(badge).to_have_text("Muted: this node does not run")


def test_apply_psa_follows_a_strength_that_is_a_number_elsewhere(page: Page) -> None:
    add_node(page, "PSAApply")
    page.evaluate(
        """() => {
            const [apply] = app.graph.nodes;
            const [near, far] = [1, 2].map((place) => {
                const number = LiteGraph.createNode('PrimitiveFloat');
                number.pos = [-400, 300 * place];
                app.graph.add(number);
                return number;
            });
            near.connect(0, apply, apply.inputs.findIndex((input) => input.name === 'strength'));
            near.widgets[0].value = 0;
            window.goFar = () => far.connect(0, near, near.inputs.findIndex((input) => input.name === 'value'));
        }"""
    )
    badge = page.get_by_role("group", name="What PSA does here").get_by_role("status")
    expect(badge).to_have_text("Off: strength 0 is the base model")
    set_widget(page, "PrimitiveFloat", "value", 0.5)
    expect(badge).to_have_text("Acts at strength 0.5")
    page.evaluate("() => { app.graph.nodes.find((node) => node.type === 'PrimitiveFloat').mode = 4; }")
    expect(badge).to_have_text("Acts at strength 1")
    page.evaluate("() => { app.graph.nodes.find((node) => node.type === 'PrimitiveFloat').mode = 0; }")
    page.evaluate("() => { window.goFar(); }")
    expect(badge).to_have_text("The strength comes from another node")


def test_apply_psa_says_that_its_strength_changes_on_the_way(page: Page) -> None:
    add_node(page, "PSAApply")
    badge = page.get_by_role("group", name="What PSA does here").get_by_role("status")
    expect(badge).to_have_text("Acts at strength 1")
    set_widget(page, "PSAApply", "schedule", "cosine")
    expect(badge).to_have_text("Acts at strength 1, along a curve")


def prompt(page: Page) -> dict[str, Any]:
    """The inputs of the only User Safety Profile, as they are queued."""
    queued = page.evaluate("async () => Object.values((await app.graphToPrompt()).output)")
    (node,) = (node for node in queued if node["class_type"] == "PSAUserProfile")
    inputs: dict[str, Any] = node["inputs"]
    return inputs
