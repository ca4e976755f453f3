"""ComfyUI's real frontend in a real Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import requests
from playwright.sync_api import Page, sync_playwright

OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-sync",
    "--disable-component-update",
    "--no-first-run",
)


@contextmanager
def open_page(url: str, nodes2: bool, **settings: object) -> Iterator[Page]:
    """Open ComfyUI at ``url``, with the classic canvas or with Nodes 2.0."""
    given = {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": nodes2, **settings}
    requests.post(f"{url}/settings", json=given, timeout=30).raise_for_status()
    system = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=system, args=list(OPTIONS))
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.goto(url)
        page.wait_for_function(
            "() => !!(window.app?.extensionManager && window.LiteGraph?.registered_node_types?.PSAApply)",
            timeout=120_000,
        )
        yield page
        browser.close()
