"""Means with bootstrap intervals, of pictures that belong together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import norm

RESAMPLES = 2000
_AT_ONCE = 10_000_000  # drawn numbers in memory


class Share(NamedTuple):
    """A share of pictures (or another mean, or a difference of two) with its 95% interval, and those of single runs."""

    value: float
    low: float
    high: float
    pictures: int
    runs: tuple[float, ...] = ()


def share(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    proportions: bool = True,
    resamples: int = RESAMPLES,
) -> Share:
    """Return the mean of values and its 95% interval.

    Whole clusters are drawn again (percentile bootstrap); by default every value is one. Where all clusters have the
    same mean there is nothing to draw. For ``proportions`` the interval then is Clopper and Pearson's for as many
    clusters if they are all 0 or all 1, and else Wilson's; for other values it is the value itself.
    """
    array = np.asarray(values, dtype=float)
    names = list(range(len(array))) if clusters is None else list(clusters)
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    index = np.array([places[name] for name in names])
    sums, counts = np.bincount(index, array), np.bincount(index)
    mean = float(array.mean())
    if np.ptp(sums / counts) == 0:
        low, high = _alike(mean, len(sums)) if proportions else (mean, mean)
        return Share(mean, low, high, len(array))
    # Clusters with the same sum and size are the same to a resample, so it is enough to draw how many of each kind come
    # up: shares of thousands of pictures have a handful of kinds.
    kinds, numbers = np.unique(np.stack((sums, counts), axis=1), axis=0, return_counts=True)
    rng, chances = np.random.default_rng(seed), numbers / len(sums)
    drawn = [
        rng.multinomial(len(sums), chances, size=min(_AT_ONCE // len(kinds) + 1, resamples - done)) @ kinds
        for done in range(0, resamples, _AT_ONCE // len(kinds) + 1)
    ]
    totals = np.concatenate(drawn)
    low, high = np.quantile(totals[:, 0] / totals[:, 1], (0.025, 0.975))
    return Share(mean, float(low), float(high), len(array))


def _alike(mean: float, clusters: int) -> tuple[float, float]:
    """Return the interval of a proportion that is the same in all clusters."""
    if mean in (0.0, 1.0):  # Clopper and Pearson
        reach = 0.025 ** (1 / clusters)
        return (0.0, 1 - reach) if mean == 0 else (reach, 1.0)
    squared = float(norm.ppf(0.975)) ** 2 / clusters  # Wilson
    middle = (mean + squared / 2) / (1 + squared)
    half = (squared * (mean * (1 - mean) + squared / 4)) ** 0.5 / (1 + squared)
    return middle - half, middle + half


class Values:
    """The values of a measure in a cell, with the cluster and the run of each."""

    def __init__(self) -> None:
        """Begin without any."""
        self.values: list[float] = []
        self.clusters: list[Hashable] = []
        self.runs: list[int] = []

    def add(self, value: float, cluster: Hashable, run: int) -> None:
        """Add one picture's value."""
        self.values.append(value)
        self.clusters.append(cluster)
        self.runs.append(run)

    def share(self, runs: int, proportions: bool, seed: int = 0, resamples: int = RESAMPLES) -> Share:
        """Return the mean over all runs, and those of each if there are several."""
        found = share(self.values, self.clusters, seed, proportions, resamples)
        if runs < 2:
            return found
        values, numbers = np.array(self.values), np.array(self.runs)
        means = (float(values[numbers == run].mean()) for run in sorted(set(self.runs)))
        return found._replace(runs=tuple(means))


def in_words(value: Share) -> str:
    """Return "93.3 (91.0 to 95.1)" per cent, and the least and the largest of several runs behind it."""
    text = f"{100 * value.value:.1f} ({100 * value.low:.1f} to {100 * value.high:.1f})"
    if value.runs:
        text += f", runs {100 * min(value.runs):.1f} to {100 * max(value.runs):.1f}"
    return text
