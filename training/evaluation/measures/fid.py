"""The Fréchet inception distance: how far a set of pictures is from real ones (Heusel et al., arXiv 1706.08500).

The number is torchmetrics'. A covariance of d features estimated from n pictures has rank n - 1 at most, and FID falls
with n until n is far above d; so fewer than 2 d pictures are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from scipy import linalg
from scipy.stats import t
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ...miniature.detector import Detector
from ..assess_config import FidSection
from ..gallery import Shown
from ..statistics import Share
from .measure import Better, Missing
from .sighting import open_detector
from .tensors import to_bytes
from .weights import DAMAGED, read_weights

_MINIATURE_SIZE = 96  # pixels
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


class Extractor(NamedTuple):
    """Maps bytes ``[batch, 3, height, width]`` to features ``[batch, dim]``."""

    network: nn.Module
    dim: int
    size: int | None  # pictures are scaled to it


class Fid:
    """FID of sets of pictures to one set of real ones."""

    better: Better = "lower"

    def __init__(self, config: FidSection, detector: Path, device: torch.device, batch_size: int, seed: int) -> None:
        """Read the real pictures.

        Raises:
            Missing: pictures, weights or packages are not there, or there are too few real pictures.
        """
        if config.reference is None:
            raise Missing("no real pictures are stated: set assess.fid.reference to a folder of them")
        self._config, self._device, self._batch_size, self._seed = config, device, batch_size, seed
        self._extractor = _inception(config) if config.extractor == "inception" else _detector(detector)
        self._extractor.network.to(device)
        self.minimum = config.minimum or 2 * self._extractor.dim
        self.name = "FID" if config.extractor == "inception" else "FID (detector features)"
        if config.extractor == "inception" and config.feature != 2048:
            self.name = f"FID ({config.feature} features)"
        self._known: dict[Path, Tensor] = {}
        real = _pictures_in(config.reference)
        if len(real) < self.minimum:
            raise Missing(
                f"{config.reference} holds {len(real)} pictures, and FID over {self._extractor.dim} features needs "
                f"{self.minimum} real ones: add some, or lower assess.fid.minimum"
            )
        self._real = self._features(real)
        mean, covariance = _moments(self._real.double().numpy())
        self._mean, self._root = mean, _root(covariance)

    @property
    def dim(self) -> int:
        """The number of features."""
        return self._extractor.dim

    def __call__(self, pictures: Sequence[Shown]) -> Share:
        """Return the FID of the picture files, each counted once, with its interval.

        Raises:
            Missing: they are fewer than FID needs; the message has the number.
        """
        paths = list(dict.fromkeys(shown.path for shown in pictures))
        if len(paths) < self.minimum:
            raise Missing(f"{len(paths)} pictures, and it needs {self.minimum}")
        ours = self._features(paths)
        value = self._distance(ours)
        # A resample holds 63% of the pictures, and FID rises with fewer: percentiles would lie above the value itself.
        # So the resamples give the standard error alone.
        rng = np.random.default_rng(self._seed)
        array = ours.double().numpy()
        again = [self._quickly(array[rng.integers(len(array), size=len(array))]) for _ in range(self._config.resamples)]
        reach = float(t.ppf(0.975, len(again) - 1) * np.std(again, ddof=1))
        return Share(value, max(0.0, value - reach), value + reach, len(paths))

    def _distance(self, ours: Tensor) -> float:
        fid = FrechetInceptionDistance(feature=_Given(self.dim)).set_dtype(torch.float64)
        fid.update(self._real.double(), real=True)
        fid.update(ours.double(), real=False)
        return float(fid.compute())

    def _quickly(self, ours: np.ndarray) -> float:
        """The same by symmetric matrices, many times faster: the root of the real covariance is known."""
        mean, covariance = _moments(ours)
        values = linalg.eigvalsh(self._root @ covariance @ self._root)
        cross = np.sqrt(np.clip(values, 0, None)).sum()
        return float(((mean - self._mean) ** 2).sum() + np.trace(covariance) + (self._root**2).sum() - 2 * cross)

    @torch.no_grad()
    def _features(self, paths: Sequence[Path]) -> Tensor:
        """Return the features ``[pictures, dim]`` of picture files, each looked at once."""
        new = [path for path in dict.fromkeys(paths) if path not in self._known]
        for start in range(0, len(new), self._batch_size):
            batch = new[start : start + self._batch_size]
            images = [_open(path, self._extractor.size) for path in batch]
            if len({image.size for image in images}) == 1:
                found = self._extractor.network(torch.stack([to_bytes(image) for image in images]).to(self._device))
            else:
                found = torch.cat([self._extractor.network(to_bytes(i)[None].to(self._device)) for i in images])
            self._known.update(zip(batch, found.float().cpu(), strict=True))
        return torch.stack([self._known[path] for path in paths])


class _Given(nn.Module):
    """Lets torchmetrics work on features that are there already."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, features: Tensor) -> Tensor:
        return features


class _DetectorFeatures(nn.Module):
    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self._detector = detector

    def forward(self, pictures: Tensor) -> Tensor:
        """What the detector's last layer reads, ``[batch, 96]``."""
        return self._detector.layers(pictures.float() / 127.5 - 1).amax(dim=(2, 3))


def _inception(config: FidSection) -> Extractor:
    if config.weights is None:
        raise Missing(
            "no Inception weights are stated: set assess.fid.weights to torch-fidelity's file, "
            "weights-inception-2015-12-05-6726825d.pth"
        )
    what = "torch-fidelity's Inception weights"
    read_weights(config.weights, what)  # torch-fidelity unpickles anything: only a file of mere tensors is handed to it
    try:
        fid = FrechetInceptionDistance(feature=config.feature, feature_extractor_weights_path=str(config.weights))
    except ModuleNotFoundError:
        raise Missing("the package torch-fidelity is not installed: pip install -e '.[evaluate]'") from None
    except DAMAGED as error:
        raise Missing(f"{config.weights} does not hold {what} ({error!r:.120}): get that file again") from None
    return Extractor(fid.inception, config.feature, None)


def _detector(path: Path) -> Extractor:
    detector = open_detector(path)
    return Extractor(_DetectorFeatures(detector), detector.labels.in_features, _MINIATURE_SIZE)


def _pictures_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise Missing(f"there is no folder {folder} with real pictures: correct assess.fid.reference")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)


def _open(path: Path, size: int | None) -> PIL.Image.Image:
    try:
        with PIL.Image.open(path) as image:
            rgb = image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise Missing(f"the real picture {path} cannot be read ({error}): delete it, or get it again") from None
    return rgb if size is None or rgb.size == (size, size) else rgb.resize((size, size), PIL.Image.Resampling.LANCZOS)


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(0), np.cov(features, rowvar=False)


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = linalg.eigh(covariance)
    root: np.ndarray = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root
