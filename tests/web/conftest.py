"""Pages of ComfyUI, opened once for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from frontend import NEWEST, open_page
from playwright.sync_api import Page, expect
from studio import COMFYUI, Studio, empty_store

from comfyui_psa.profiles import ProfileStore
from comfyui_psa.training.comfyui import ComfyUIServer, prepare_base

# The frontend that ComfyUI 0.3.75 comes with, and the newest one.
FRONTENDS: dict[str, tuple[str, ...]] = {"1.32": (), "1.58": NEWEST}


@pytest.fixture(scope="module", params=[False, True], ids=["canvas", "nodes2"])
def page(request: pytest.FixtureRequest, studio: Studio) -> Iterator[Page]:
    """The studio's ComfyUI, in both renderers."""
    with open_page(studio.server.url, request.param) as page:
        yield page


@pytest.fixture(scope="module", params=list(FRONTENDS))
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUIServer]:
    """A ComfyUI with this pack and nothing else, with an old and a new frontend."""
    base = prepare_base(tmp_path_factory.mktemp("profiles"))
    with ComfyUIServer(COMFYUI, base, *FRONTENDS[request.param]) as running:
        yield running


@pytest.fixture(scope="module", params=[False, True], ids=["canvas", "nodes2"])
def browser(request: pytest.FixtureRequest, server: ComfyUIServer) -> Iterator[Page]:
    """Its page, in both renderers."""
    with open_page(server.url, request.param) as page:
        yield page


@pytest.fixture
def store(server: ComfyUIServer) -> Iterator[ProfileStore]:
    """Its store, empty."""
    with empty_store(server) as store:
        yield store


@pytest.fixture
def empty_page(browser: Page, store: ProfileStore) -> Page:
    """Its page with an empty graph, no editor and no tab open."""
    editor = browser.locator(".psa-editor")
    if editor.count():
        editor.get_by_role("button", name="Cancel").click()
        question = browser.get_by_role("dialog")
        expect(question.or_(browser.get_by_label("Search profiles"))).to_be_visible()
        if question.count():
            question.get_by_role("button", name="Confirm").click()
        expect(editor).to_have_count(0)
    browser.evaluate(
        """() => {
            app.graph.clear();
            const tab = app.extensionManager.sidebarTab;
            if (tab.activeSidebarTabId) tab.toggleSidebarTab(tab.activeSidebarTabId);
        }"""
    )
    return browser
