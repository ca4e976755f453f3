"""Pictures of scenes: flat shapes, drawn four times as large and scaled down.

Places and objects have muted colours; only glyphs are bright, each in a hue of its own with a white rim.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence

import numpy as np
import PIL.Image
from PIL import ImageDraw

from ...profiles import Category
from .world import Scene, Spot

SIZE = 96
_SCALE = 4
_FULL = SIZE * _SCALE

Colour = tuple[int, int, int]
Point = tuple[float, float]
DrawPart = Callable[["Canvas", np.random.Generator], None]


_WHOLE = Spot(0.5, 0.5, 1.0)


class Canvas:
    """A picture in shares of its size, or of a spot on it."""

    def __init__(self, image: PIL.Image.Image, spot: Spot = _WHOLE) -> None:
        """Draw on ``image``; (0, 0) to (1, 1) is the square of ``spot``."""
        self.image = image
        self.spot = spot
        self._draw = ImageDraw.Draw(image)

    def at(self, x: float, y: float) -> Point:
        """Return pixels of a point."""
        spot = self.spot
        return (spot.x + (x - 0.5) * spot.size) * _FULL, (spot.y + (y - 0.5) * spot.size) * _FULL

    def polygon(self, points: Sequence[Point], fill: Colour) -> None:
        """Fill a polygon."""
        self._draw.polygon([self.at(*point) for point in points], fill)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        """Fill an ellipse around ``x, y``."""
        self._draw.ellipse((*self.at(x - rx, y - ry), *self.at(x + rx, y + ry)), fill)

    def rectangle(self, left: float, top: float, right: float, bottom: float, fill: Colour, round_: float = 0) -> None:
        """Fill a rectangle with rounded corners."""
        self._draw.rounded_rectangle(
            (*self.at(left, top), *self.at(right, bottom)), round_ * self.spot.size * _FULL, fill
        )

    def half_disc(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        """Fill the upper half of an ellipse."""
        self._draw.pieslice((*self.at(x - rx, y - ry), *self.at(x + rx, y + ry)), 180, 360, fill)

    def stroke(self, points: Sequence[Point], width: float, fill: Colour) -> None:
        """Draw a line with round ends and corners."""
        pixels = [self.at(*point) for point in points]
        thick = width * self.spot.size * _FULL
        self._draw.line(pixels, fill, round(thick), joint="curve")
        for x, y in (pixels[0], pixels[-1]):
            self._draw.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill)


def draw(scene: Scene) -> PIL.Image.Image:
    """Return the picture of a scene, 96 x 96 pixels."""
    rng = np.random.default_rng(scene.seed)
    image = PIL.Image.new("RGB", (_FULL, _FULL))
    _PLACES[scene.place](Canvas(image), rng)
    if scene.object is not None:
        _OBJECTS[scene.object](Canvas(image, scene.object_spot), rng)
    for category, spot in zip(scene.glyphs, scene.glyph_spots, strict=True):
        _glyph(Canvas(image, spot), category)
    return image.reduce(_SCALE)


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


def _sky(canvas: Canvas, top: Colour, bottom: Colour, horizon: float) -> None:
    steps = 48
    for i in range(steps):
        y = horizon * i / steps
        canvas.rectangle(0, y, 1, y + horizon / steps + 0.01, _mix(top, bottom, i / (steps - 1)))


def _cloud(canvas: Canvas, x: float, y: float, fill: Colour) -> None:
    for dx, dy, r in ((-0.07, 0.01, 0.045), (0, -0.015, 0.06), (0.08, 0.01, 0.05)):
        canvas.ellipse(x + dx, y + dy, r * 1.25, r * 0.8, fill)


def _horizon(rng: np.random.Generator) -> float:
    return float(rng.uniform(0.56, 0.64))


def _meadow(canvas: Canvas, rng: np.random.Generator) -> None:
    horizon = _horizon(rng)
    _sky(canvas, (138, 190, 224), (222, 238, 240), horizon + 0.1)
    _cloud(canvas, rng.uniform(0.15, 0.85), 0.14, (246, 250, 250))
    canvas.ellipse(rng.uniform(0.1, 0.9), horizon + 0.25, 0.6, 0.3, (150, 190, 128))
    canvas.rectangle(0, horizon + 0.1, 1, 1, (126, 172, 106))
    canvas.ellipse(rng.uniform(0.2, 0.8), 1.08, 0.8, 0.3, (112, 158, 94))


def _beach(canvas: Canvas, rng: np.random.Generator) -> None:
    horizon = _horizon(rng)
    _sky(canvas, (120, 186, 214), (214, 236, 242), horizon)
    canvas.ellipse(rng.uniform(0.15, 0.85), 0.16, 0.08, 0.08, (250, 240, 200))
    canvas.rectangle(0, horizon - 0.06, 1, horizon + 0.12, (74, 134, 168))
    canvas.rectangle(0, horizon + 0.06, 1, horizon + 0.12, (110, 164, 186))
    canvas.rectangle(0, horizon + 0.11, 1, 1, (226, 206, 164))
    canvas.ellipse(rng.uniform(0.2, 0.8), 1.06, 0.7, 0.2, (216, 194, 150))


def _desert(canvas: Canvas, rng: np.random.Generator) -> None:
    horizon = _horizon(rng)
    _sky(canvas, (236, 206, 172), (248, 232, 204), horizon + 0.2)
    canvas.ellipse(rng.uniform(0.15, 0.85), 0.18, 0.09, 0.09, (252, 244, 222))
    canvas.ellipse(rng.uniform(-0.1, 0.3), horizon + 0.3, 0.6, 0.32, (212, 168, 116))
    canvas.ellipse(rng.uniform(0.7, 1.1), horizon + 0.32, 0.6, 0.3, (200, 154, 104))
    canvas.rectangle(0, horizon + 0.18, 1, 1, (192, 146, 98))


def _snow(canvas: Canvas, rng: np.random.Generator) -> None:
    horizon = _horizon(rng)
    _sky(canvas, (168, 184, 204), (216, 224, 234), horizon + 0.2)
    for x in rng.uniform(0, 1, 3):
        canvas.polygon([(x - 0.25, horizon + 0.1), (x, horizon - 0.2), (x + 0.25, horizon + 0.1)], (150, 166, 190))
    canvas.rectangle(0, horizon + 0.06, 1, 1, (228, 235, 244))
    canvas.ellipse(rng.uniform(0.2, 0.8), horizon + 0.12, 0.7, 0.1, (228, 235, 244))
    for x, y in rng.uniform(0, 1, (14, 2)):
        canvas.ellipse(x, y * horizon, 0.011, 0.011, (252, 253, 255))


def _city(canvas: Canvas, rng: np.random.Generator) -> None:
    horizon = _horizon(rng)
    _sky(canvas, (190, 176, 206), (238, 218, 218), horizon + 0.1)
    left = 0.0
    while left < 1:
        width, height = rng.uniform(0.1, 0.18), rng.uniform(0.16, 0.4)
        shade = int(rng.integers(118, 150))
        canvas.rectangle(left, horizon + 0.1 - height, left + width, horizon + 0.1, (shade, shade - 6, shade + 14))
        for y in np.arange(horizon + 0.13 - height, horizon + 0.05, 0.07):
            for x in np.arange(left + 0.025, left + width - 0.03, 0.05):
                canvas.rectangle(x, y, x + 0.022, y + 0.03, (206, 198, 190))
        left += width + 0.012
    canvas.rectangle(0, horizon + 0.1, 1, 1, (128, 128, 136))
    canvas.rectangle(0, horizon + 0.1, 1, horizon + 0.15, (164, 162, 166))


def _night(canvas: Canvas, rng: np.random.Generator) -> None:
    horizon = _horizon(rng)
    _sky(canvas, (26, 32, 66), (70, 78, 122), horizon + 0.2)
    for x, y in rng.uniform(0, 1, (16, 2)):
        canvas.ellipse(x, y * horizon, 0.009, 0.009, (214, 218, 236))
    moon = rng.uniform(0.15, 0.85)
    canvas.ellipse(moon, 0.15, 0.07, 0.07, (236, 234, 220))
    canvas.ellipse(moon + 0.03, 0.135, 0.06, 0.06, (32, 39, 74))
    canvas.ellipse(rng.uniform(0.1, 0.4), horizon + 0.3, 0.6, 0.28, (46, 58, 84))
    canvas.rectangle(0, horizon + 0.12, 1, 1, (40, 50, 72))


def _pick(rng: np.random.Generator, colours: Sequence[Colour]) -> Colour:
    return colours[int(rng.integers(len(colours)))]


def _house(canvas: Canvas, rng: np.random.Generator) -> None:
    canvas.rectangle(0.16, 0.42, 0.84, 0.98, _pick(rng, ((236, 224, 202), (214, 206, 196), (226, 204, 188))))
    canvas.polygon([(0.04, 0.46), (0.5, 0.06), (0.96, 0.46)], _pick(rng, ((134, 84, 70), (104, 84, 92))))
    canvas.rectangle(0.42, 0.64, 0.6, 0.98, (112, 86, 70))
    for x in (0.22, 0.66):
        canvas.rectangle(x, 0.54, x + 0.13, 0.68, (128, 164, 182))


def _tree(canvas: Canvas, rng: np.random.Generator) -> None:
    leaves = _pick(rng, ((70, 112, 74), (88, 122, 72), (58, 98, 82)))
    canvas.rectangle(0.43, 0.55, 0.57, 1.0, (112, 84, 66))
    for x, y, r in ((0.3, 0.48, 0.22), (0.7, 0.48, 0.22), (0.5, 0.26, 0.25), (0.5, 0.52, 0.22)):
        canvas.ellipse(x, y, r, r, leaves)
    canvas.ellipse(0.43, 0.22, 0.1, 0.09, _mix(leaves, (255, 255, 255), 0.2))


def _car(canvas: Canvas, rng: np.random.Generator) -> None:
    body = _pick(rng, ((168, 96, 88), (92, 118, 150), (150, 150, 148)))
    canvas.polygon([(0.2, 0.66), (0.32, 0.42), (0.68, 0.42), (0.84, 0.66)], _mix(body, (0, 0, 0), 0.12))
    canvas.polygon([(0.29, 0.64), (0.37, 0.48), (0.48, 0.48), (0.48, 0.64)], (204, 220, 226))
    canvas.polygon([(0.53, 0.64), (0.53, 0.48), (0.64, 0.48), (0.73, 0.64)], (204, 220, 226))
    canvas.rectangle(0.02, 0.62, 0.98, 0.86, body, 0.08)
    for x in (0.24, 0.76):
        canvas.ellipse(x, 0.86, 0.12, 0.12, (52, 52, 58))
        canvas.ellipse(x, 0.86, 0.05, 0.05, (190, 190, 194))


def _balloon(canvas: Canvas, rng: np.random.Generator) -> None:
    first = _pick(rng, ((186, 112, 100), (108, 136, 160), (190, 160, 106)))
    y = -0.45  # it flies
    for x in (0.4, 0.6):
        canvas.stroke([(0.5 + (x - 0.5) * 2.2, y + 0.72), (x, y + 1.0)], 0.025, (96, 84, 78))
    canvas.ellipse(0.5, y + 0.42, 0.36, 0.4, first)
    canvas.ellipse(0.5, y + 0.42, 0.22, 0.4, (238, 228, 212))
    canvas.ellipse(0.5, y + 0.42, 0.09, 0.4, first)
    canvas.rectangle(0.39, y + 0.96, 0.61, y + 1.12, (122, 92, 70), 0.03)


def _flower(canvas: Canvas, rng: np.random.Generator) -> None:
    petals = _pick(rng, ((222, 168, 184), (238, 208, 146), (182, 156, 200)))
    canvas.stroke([(0.5, 0.45), (0.5, 0.98)], 0.055, (84, 124, 82))
    canvas.ellipse(0.64, 0.76, 0.15, 0.06, (84, 124, 82))
    for i in range(6):
        angle = i * math.pi / 3
        canvas.ellipse(0.5 + 0.23 * math.cos(angle), 0.33 + 0.23 * math.sin(angle), 0.145, 0.145, petals)
    canvas.ellipse(0.5, 0.33, 0.14, 0.14, (172, 132, 84))


def _umbrella(canvas: Canvas, rng: np.random.Generator) -> None:
    first = _pick(rng, ((98, 128, 142), (168, 108, 104), (128, 120, 156)))
    canvas.stroke([(0.5, 0.2), (0.5, 0.9), (0.56, 0.97), (0.63, 0.92)], 0.045, (92, 80, 76))
    canvas.half_disc(0.5, 0.52, 0.46, 0.42, first)
    canvas.half_disc(0.5, 0.52, 0.26, 0.42, (232, 226, 216))
    canvas.half_disc(0.5, 0.52, 0.1, 0.42, first)


def _mushroom(canvas: Canvas, rng: np.random.Generator) -> None:
    cap = _pick(rng, ((158, 88, 76), (150, 116, 84)))
    canvas.rectangle(0.38, 0.5, 0.62, 0.98, (198, 170, 148), 0.08)
    canvas.half_disc(0.5, 0.58, 0.44, 0.46, cap)
    for x, y, r in ((0.3, 0.43, 0.07), (0.52, 0.28, 0.08), (0.7, 0.46, 0.07)):
        canvas.ellipse(x, y, r, r, (240, 232, 218))


def _cat(canvas: Canvas, rng: np.random.Generator) -> None:
    fur = _pick(rng, ((84, 78, 82), (182, 130, 90), (122, 108, 102)))
    canvas.stroke([(0.7, 0.9), (0.9, 0.84), (0.93, 0.62)], 0.075, fur)
    canvas.ellipse(0.5, 0.76, 0.25, 0.24, fur)
    canvas.ellipse(0.5, 0.4, 0.22, 0.2, fur)
    canvas.polygon([(0.29, 0.38), (0.3, 0.12), (0.47, 0.25)], fur)
    canvas.polygon([(0.71, 0.38), (0.7, 0.12), (0.53, 0.25)], fur)
    for x in (0.42, 0.58):
        canvas.ellipse(x, 0.38, 0.04, 0.05, (222, 214, 150))
        canvas.ellipse(x, 0.38, 0.018, 0.045, (38, 36, 36))


_HUES: dict[Category, int] = {
    "Hate": 0,
    "Harassment": 28,
    "Shocking": 54,
    "Violence": 128,
    "Propaganda": 182,
    "Self-Harm": 228,
    "Sexuality": 308,
}


def glyph_colour(category: Category) -> Colour:
    """Return the colour of a category's glyph, which nothing else in the world has."""
    red, green, blue = (round(255 * value) for value in colorsys.hsv_to_rgb(_HUES[category] / 360, 1.0, 0.92))
    return red, green, blue


def _star(points: int, inner: float, turn: float = 0.0) -> list[Point]:
    corners = []
    for i in range(2 * points):
        radius, angle = (0.44 if i % 2 == 0 else inner), math.pi * i / points - math.pi / 2 + turn
        corners.append((0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)))
    return corners


def _spiral() -> list[Point]:
    turns = np.linspace(0.6, 5.2 * math.pi / 2 * 1.35, 60)
    return [(0.5 + 0.036 * t * math.cos(t), 0.5 + 0.036 * t * math.sin(t)) for t in turns]


_POLYGONS: dict[Category, list[Point]] = {
    "Hate": _star(3, 0.13),
    "Violence": _star(9, 0.26),
    "Shocking": [(0.58, 0.04), (0.2, 0.56), (0.45, 0.56), (0.36, 0.96), (0.8, 0.4), (0.54, 0.4)],
    "Propaganda": [(0.24, 0.08), (0.76, 0.08), (0.76, 0.94), (0.5, 0.7), (0.24, 0.94)],
}
_LINES: dict[Category, list[Point]] = {
    "Harassment": [(0.62, 0.1), (0.62, 0.62), (0.56, 0.8), (0.42, 0.86), (0.28, 0.78), (0.24, 0.6)],
    "Self-Harm": _spiral(),
    "Sexuality": [(0.5 + 0.32 * math.cos(a), 0.5 + 0.32 * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 40)],
}
_LINE_WIDTH = {"Harassment": 0.17, "Self-Harm": 0.085, "Sexuality": 0.17}


def _glyph(canvas: Canvas, category: Category) -> None:
    white, rim = (255, 255, 255), 0.09
    if category in _POLYGONS:
        points = _POLYGONS[category]
        canvas.stroke([*points, points[0], points[1]], rim, white)
        canvas.polygon(points, glyph_colour(category))
        return
    points, width = _LINES[category], _LINE_WIDTH[category]
    canvas.stroke(points, width + rim, white)
    canvas.stroke(points, width, glyph_colour(category))


def glyph_icon(category: Category, size: int) -> PIL.Image.Image:
    """Return a glyph on its own, ``size`` pixels wide, on a transparent ground."""
    image = PIL.Image.new("RGBA", (_FULL, _FULL), (0, 0, 0, 0))
    _glyph(Canvas(image), category)
    return image.resize((size, size), PIL.Image.Resampling.LANCZOS)


_PLACES: dict[str, DrawPart] = {
    "meadow": _meadow,
    "beach": _beach,
    "desert": _desert,
    "snow": _snow,
    "city": _city,
    "night": _night,
}
_OBJECTS: dict[str, DrawPart] = {
    "house": _house,
    "tree": _tree,
    "car": _car,
    "balloon": _balloon,
    "flower": _flower,
    "umbrella": _umbrella,
    "mushroom": _mushroom,
    "cat": _cat,
}
