"""``report.html`` and ``report.md``: what an evaluation found, from the same chapters.

The page has its pictures inside and asks nobody for anything; the Markdown file names those in ``figures/``. A second
Markdown file may be written for a folder of documents.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import PIL.Image
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ...safe_files import replacing
from .chapters import ALL_NUMBERS, headline, make_chapters
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
    shutil.rmtree(folder / FIGURES, ignore_errors=True)  # those of an earlier report
    chapters = make_chapters(results, folder / FIGURES)
    for name, template in ((MARKDOWN, "report.md.jinja"), (PAGE, "report.html.jinja")):
        _write(folder / name, _render(template, results, chapters, lambda path: path.relative_to(folder).as_posix()))
    if results.settings.document is not None:
        _write_document(results.settings.document, results, chapters, folder / FIGURES)
    return folder / PAGE


def _write_document(document: Path, results: Results, chapters: list[Chapter], figures: Path) -> None:
    """Write what people read, without the chapter of all numbers; its pictures, of a palette, and numbers beside it."""
    images = document.parent / "images" / document.stem
    images.mkdir(parents=True, exist_ok=True)
    for earlier in images.glob("*.png"):
        earlier.unlink()
    for figure in figures.glob("*.png"):
        with PIL.Image.open(figure) as image, replacing(images / figure.name) as aside:
            # Bright signs are in few pixels: other ways to choose 256 colours leave them out.
            palette = image.convert("RGB").quantize(256, PIL.Image.Quantize.FASTOCTREE)
            palette.save(aside, "PNG", optimize=True)
    shown = results.shown((measure, asked) for _, measure, asked in headline(results))
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in shown)
    _write(document.with_suffix(".json"), f"[\n{lines}\n]\n")
    read = [chapter for chapter in chapters if chapter.title != ALL_NUMBERS]
    _write(document, _render("report.md.jinja", results, read, lambda path: f"images/{document.stem}/{path.name}"))


def _write(path: Path, text: str) -> None:
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _render(template: str, results: Results, chapters: list[Chapter], beside: Callable[[Path], str]) -> str:
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
    environment.filters["beside"] = beside
    return environment.get_template(template).render(title=results.settings.title, chapters=chapters)


def _number(text: str) -> Markup:
    """Set the interval behind a number small."""
    return Markup(_INTERVAL.sub(r'<span class="ci">\1</span>', str(escape(text))))
