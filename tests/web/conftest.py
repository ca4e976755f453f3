"""Pages of ComfyUI, opened once for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from frontend import open_page
from playwright.sync_api import Page
from studio import Studio


@pytest.fixture(scope="module", params=[False, True], ids=["canvas", "nodes2"])
def page(request: pytest.FixtureRequest, studio: Studio) -> Iterator[Page]:
    """The studio's ComfyUI, in both renderers."""
    with open_page(studio.server.url, request.param) as page:
        yield page
