"""``report.html`` and ``report.md``: what an evaluation found, from the same chapters.

The page has its pictures inside and asks nobody for anything; the Markdown file names those in ``figures/``. A second
Markdown file may be written for a folder of documents. An earlier report stays until all of the new one is made.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
    document = results.settings.document
    with _new_pictures(folder / FIGURES) as figures:
        chapters = make_chapters(results, figures)
        texts = {
            folder / name: _render(template, results, chapters, FIGURES)
            for name, template in ((MARKDOWN, "report.md.jinja"), (PAGE, "report.html.jinja"))
        }
        if document is not None:
            texts |= _document(document, results, chapters)
            with _new_pictures(_beside(document)) as images:
                _reduce(figures, images)
    for path, text in texts.items():
        with replacing(path) as aside:
            aside.write_text(text, encoding="utf-8")
    return folder / PAGE


@contextmanager
def _new_pictures(folder: Path) -> Iterator[Path]:
    """Yield a folder aside; if the block succeeds, the pictures in it take the place of all those in ``folder``."""
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    aside.mkdir(parents=True)
    try:
        yield aside
        folder.mkdir(exist_ok=True)
        names = {picture.name for picture in aside.iterdir()}
        for name in names:
            (aside / name).replace(folder / name)
        for earlier in folder.glob("*.png"):
            if earlier.name not in names:
                earlier.unlink()
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _document(document: Path, results: Results, chapters: list[Chapter]) -> dict[Path, str]:
    """Return what people read, without the chapter of all numbers, and the numbers of its first table."""
    shown = results.shown((measure, asked) for _, measure, asked in headline(results))
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in shown)
    read = [chapter for chapter in chapters if chapter.title != ALL_NUMBERS]
    images = _beside(document).relative_to(document.parent).as_posix()
    return {
        document.with_suffix(".json"): f"[\n{lines}\n]\n",
        document: _render("report.md.jinja", results, read, images),
    }


def _beside(document: Path) -> Path:
    """Return where a document's pictures lie."""
    return document.parent / "images" / document.stem


def _reduce(figures: Path, images: Path) -> None:
    """Write each figure with a palette, a fraction as large."""
    for figure in figures.glob("*.png"):
        with PIL.Image.open(figure) as image:
            # Bright signs are in few pixels: other ways to choose 256 colours leave them out.
            palette = image.convert("RGB").quantize(256, PIL.Image.Quantize.FASTOCTREE)
            palette.save(images / figure.name, "PNG", optimize=True)


def _render(template: str, results: Results, chapters: list[Chapter], images: str) -> str:
    """Return a text in which pictures are named in the folder ``images``, or stand themselves."""
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
    environment.filters["beside"] = lambda path: f"{images}/{path.name}"
    return environment.get_template(template).render(title=results.settings.title, chapters=chapters)


def _number(text: str) -> Markup:
    """Set the interval behind a number small."""
    return Markup(_INTERVAL.sub(r'<span class="ci">\1</span>', str(escape(text))))
