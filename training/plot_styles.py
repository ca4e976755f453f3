"""How the lines of a plot are told apart."""

from __future__ import annotations

# Paul Tol's bright scheme, told apart by people who see colours differently; then other marks as well.
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#888888")
_MARKS = "osD^vPX*"
_LINES = ("-", "--", ":", "-.")  # one round of colours each


def style(number: int) -> tuple[str, str, str]:
    """Return the colour, the mark and the line of the n-th method; 28 of them differ in colour or line."""
    rounds, place = divmod(number, len(_COLOURS))
    return _COLOURS[place], _MARKS[number % len(_MARKS)], _LINES[rounds % len(_LINES)]
