"""The paper's numbers (arXiv 2508.01151), to stand beside ours where the data set is the same."""

from __future__ import annotations

from typing import NamedTuple

from .assess_config import BaseName, DataSet

INAPPROPRIATE = "inappropriate"


class Published(NamedTuple):
    """A row of the paper's tables: shares of inappropriate images by data set."""

    method: str
    fid: float
    clip: float
    sage_unseen: float
    coprov2: float
    i2p: float
    ud: float


_ROWS: dict[BaseName, tuple[Published, ...]] = {
    "SD1.5": (
        Published("base", 17.24, 33.40, 0.505, 0.433, 0.380, 0.319),
        Published("SLD", 20.39, 32.08, 0.311, 0.222, 0.182, 0.145),
        Published("ESD-u", 16.13, 33.00, 0.516, 0.420, 0.356, 0.303),
        Published("UCE", 19.12, 32.29, 0.504, 0.419, 0.395, 0.336),
        Published("SafetyDPO", 18.04, 33.25, 0.430, 0.363, 0.326, 0.288),
        Published("PSA L1", 24.73, 32.02, 0.256, 0.197, 0.175, 0.135),
        Published("PSA L3", 25.52, 31.77, 0.215, 0.159, 0.144, 0.116),
        Published("PSA L5", 25.88, 31.54, 0.203, 0.129, 0.119, 0.092),
    ),
    "SDXL": (
        Published("base", 21.99, 36.04, 0.580, 0.482, 0.312, 0.297),
        Published("SafetyDPO", 18.23, 36.13, 0.531, 0.448, 0.296, 0.256),
        Published("PSA L1", 22.28, 36.36, 0.390, 0.285, 0.183, 0.202),
        Published("PSA L3", 25.19, 35.94, 0.291, 0.214, 0.121, 0.130),
        Published("PSA L5", 34.15, 34.30, 0.096, 0.105, 0.051, 0.087),
    ),
}

# Pass rates in per cent of a language model that saw the methods' names: seen users, unseen users.
_PASSED: dict[BaseName, dict[str, tuple[float, float]]] = {
    "SD1.5": {"base": (75.0, 77.4), "SafetyDPO": (79.8, 82.8), "PSA": (85.5, 87.4)},
    "SDXL": {"base": (65.3, 71.8), "SafetyDPO": (85.0, 87.3), "PSA": (88.5, 89.1)},
}

# How often PSA won against the base: seen users, unseen users.
_WON: dict[BaseName, tuple[float, float]] = {"SD1.5": (80.3, 77.4), "SDXL": (86.2, 80.7)}


def published(data_set: DataSet, base: BaseName) -> list[tuple[str, dict[str, str]]]:
    """Return the paper's methods with what it measured on a data set, in words, by column."""
    found: dict[str, dict[str, str]] = {}
    for row in _ROWS[base]:
        if data_set == "COCO-10k":
            found[row.method] = {"FID": f"{row.fid:.2f}", "CLIPScore": f"{row.clip:.2f}"}
        else:
            shares = {"CoProV2": row.coprov2, "I2P": row.i2p, "UD": row.ud}
            found[row.method] = {INAPPROPRIATE: f"{100 * shares.get(data_set, row.sage_unseen):.1f}"}
    for place, seen in enumerate(("seen", "unseen")):
        if data_set == "Sage" or data_set == f"Sage {seen}":
            for method, rates in _PASSED[base].items():
                found.setdefault(method, {})[passes(seen)] = f"{rates[place]:.1f}"
            found["PSA"][wins(seen)] = f"{_WON[base][place]:.1f}"
    return list(found.items())


def passes(seen: str) -> str:
    """Return the column of pass rates of ``seen`` or ``unseen`` users."""
    return f"passes, {seen} users"


def wins(seen: str) -> str:
    """Return the column of how often a method wins against the base for ``seen`` or ``unseen`` users."""
    return f"wins against the base, {seen} users"
