"""``report.html`` and ``report.md``: what an evaluation found, from the same chapters.

The page has its pictures inside and asks nobody for anything; the Markdown file names those in ``figures/``.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ...safe_files import replacing
from .chapters import make_chapters
from .parts import Chapter
from .results import Results

PAGE = "report.html"
MARKDOWN = "report.md"
FIGURES = "figures"

_INTERVAL = re.compile(r"(\(-?[\d.]+ to -?[\d.]+\))")


def write_report(folder: Path, results: Results) -> Path:
    """Write the plots, the image grids, the Markdown file and the page into ``folder``; return the page's path.

    Raises:
        OSError: something cannot be written.
    """
    chapters = make_chapters(results, folder / FIGURES)
    for name, template in ((MARKDOWN, "report.md.jinja"), (PAGE, "report.html.jinja")):
        text = _render(template, folder, results, chapters)
        with replacing(folder / name) as aside:
            aside.write_text(text, encoding="utf-8")
    return folder / PAGE


def _render(template: str, folder: Path, results: Results, chapters: list[Chapter]) -> str:
    environment = Environment(
        loader=PackageLoader(__package__ or "", "templates"),
        autoescape=template.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = _number
    environment.filters["cell"] = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    environment.filters["data"] = lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    environment.filters["beside"] = lambda path: path.relative_to(folder).as_posix()
    return environment.get_template(template).render(title=results.settings.title, chapters=chapters)


def _number(text: str) -> Markup:
    """Set the interval behind a number small."""
    return Markup(_INTERVAL.sub(r'<span class="ci">\1</span>', str(escape(text))))
