"""Pages of ComfyUI, opened once for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache

import pytest
from frontend import NEWEST, Pages, open_chromium
from playwright.sync_api import Browser, Page, expect
from studio import COMFYUI, Studio, empty_store

from comfyui_psa.profiles import ProfileStore
from comfyui_psa.training.comfyui import ComfyUIServer, prepare_base

# The frontend that ComfyUI 0.3.75 comes with, and the newest one.
FRONTENDS: dict[str, tuple[str, ...]] = {"1.32": (), "1.58": NEWEST}
RENDERERS = ("canvas", "nodes2")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    with open_chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def pages(chromium: Browser) -> Pages:
    return Pages(chromium)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], ComfyUIServer]]:
    """A ComfyUI with this pack and nothing else, for each frontend; each is started once."""
    with ExitStack() as stack:

        @cache
        def start(frontend: str) -> ComfyUIServer:
            base = prepare_base(tmp_path_factory.mktemp("profiles"))
            return stack.enter_context(ComfyUIServer(COMFYUI, base, *FRONTENDS[frontend]))

        yield start


@pytest.fixture(params=RENDERERS)
def page(request: pytest.FixtureRequest, studio: Studio, pages: Pages) -> Page:
    """The studio's ComfyUI, in both renderers."""
    return pages(studio.server.url, request.param == "nodes2")


@pytest.fixture(params=FRONTENDS)
def server(request: pytest.FixtureRequest, servers: Callable[[str], ComfyUIServer]) -> ComfyUIServer:
    """A ComfyUI with an old and with a new frontend."""
    return servers(request.param)


@pytest.fixture(params=RENDERERS)
def browser(request: pytest.FixtureRequest, server: ComfyUIServer, pages: Pages) -> Page:
    """Its page, in both renderers."""
    return pages(server.url, request.param == "nodes2")


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
