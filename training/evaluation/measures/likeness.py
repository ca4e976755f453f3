"""How much a method changes what nobody asked it to change: SSIM and LPIPS to the base's picture.

LPIPS: Zhang et al., arXiv 1801.03924, with AlexNet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import PIL.Image
import torch
from torch import Tensor

from ....safe_files import DAMAGE
from ...miniature.likeness import likeness
from ..gallery import Shown
from .measure import Aspect, Better, Missing
from .tensors import batches, to_bytes
from .weights import read_weights

Pair = tuple[PIL.Image.Image, PIL.Image.Image]


class Ssim:
    """Structural similarity to the base's picture: 1 for the same picture. It needs no weights."""

    name = "SSIM to the base"
    better: Better = "higher"
    aspect: Aspect = "likeness"
    proportions = False

    def __init__(self, batch_size: int) -> None:
        """Compare ``batch_size`` pairs at a time."""
        self._batch_size = batch_size

    def __call__(self, pictures: Sequence[Shown]) -> list[float | None]:
        """Return the similarity of each picture that its person does not ban; None for others and the base's own."""
        return _compared(pictures, self._batch_size, lambda pairs: likeness(*zip(*pairs, strict=True)))


class Lpips:
    """Perceptual distance to the base's picture: 0 for the same picture."""

    name = "LPIPS to the base"
    better: Better = "lower"
    aspect: Aspect = "likeness"
    proportions = False

    def __init__(self, weights: Path, batch_size: int, device: torch.device) -> None:
        """Read AlexNet's weights as torchvision names them; the linear layers come with the package.

        Raises:
            Missing: the package or the weights are not there, or they are not AlexNet's.
        """
        self._batch_size, self._device = batch_size, device
        self._network = _network(weights).to(device)

    def __call__(self, pictures: Sequence[Shown]) -> list[float | None]:
        """Return the distance of each picture that its person does not ban; None for others and the base's own."""
        return _compared(pictures, self._batch_size, self._distances)

    @torch.no_grad()
    def _distances(self, pairs: Sequence[Pair]) -> list[float]:
        ours, bases = (torch.stack([_signed(pair[i]) for pair in pairs]).to(self._device) for i in (0, 1))
        return [float(value) for value in self._network(ours, bases).flatten()]


def _compared(
    pictures: Sequence[Shown], batch_size: int, compare: Callable[[Sequence[Pair]], list[float]]
) -> list[float | None]:
    """Compare pictures that their people do not ban with the base's, those of another size scaled to it."""
    found: dict[int, float] = {}
    asked = [shown for shown in pictures if _comparable(shown)]
    for batch in batches(asked, batch_size):
        pairs = [(shown.image(), _fitting(shown)) for shown in batch]
        found.update(zip(map(id, batch), compare(pairs), strict=True))
    return [found.get(id(shown)) for shown in pictures]


def _comparable(shown: Shown) -> bool:
    return shown.asks in ("harmless", "allowed") and shown.base is not None and shown.base.label != shown.label


def _fitting(shown: Shown) -> PIL.Image.Image:
    assert shown.base is not None
    image, size = shown.base.image(), (shown.picture.width, shown.picture.height)
    return image if image.size == size else image.resize(size, PIL.Image.Resampling.LANCZOS)


def _signed(image: PIL.Image.Image) -> Tensor:
    return to_bytes(image).float() / 127.5 - 1


def _network(weights: Path) -> torch.nn.Module:
    try:
        import lpips
    except ModuleNotFoundError:
        raise Missing(
            "the package lpips is not installed: pip install -e '.[evaluate]' in this pack's folder"
        ) from None
    # Its trunk is made at random and filled here: the package itself would download it.
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    what = "torchvision's AlexNet weights"
    known = read_weights(weights, what)
    try:
        # torchvision: features.3.weight; the package, in slices of the same numbering: slice2.3.weight.
        named = {name: name.split(".", 1)[1] for name in network.net.state_dict()}
        network.net.load_state_dict({name: known[f"features.{rest}"] for name, rest in named.items()})
    except DAMAGE as error:
        raise Missing(f"{weights} does not hold {what} ({error!r:.120}): get that file again") from None
    assert isinstance(network, torch.nn.Module)
    return network.eval().requires_grad_(False)
