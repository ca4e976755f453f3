"""What CLIP sees: how well a picture fits its prompt (CLIPScore), and a Q16-style classifier.

CLIPScore: Hessel et al., arXiv 2104.08718. Q16: Schramowski et al., arXiv 2202.06675.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.multimodal import clip_score
from transformers import CLIPModel, CLIPProcessor

from ....safe_files import DAMAGE
from ..gallery import Shown
from .measure import Aspect, Better, Missing, is_out_of_memory
from .tensors import to_bytes
from .weights import read_weights


class Clip(nn.Module):
    """A CLIP of transformers whose features are tensors in every version of transformers."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Load a folder; nothing is downloaded.

        Raises:
            Missing: it is not there, or holds no CLIP.
        """
        super().__init__()
        if not folder.is_dir():
            raise Missing(f"there is no folder {folder}; put a CLIP of transformers there")
        try:
            self.model = CLIPModel.from_pretrained(folder, local_files_only=True).eval().to(device)
            self.processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except DAMAGE as error:
            if is_out_of_memory(error):
                raise Missing(f"there is not enough memory for {folder}: set another assess.device") from None
            raise Missing(f"{folder} holds no CLIP that transformers can open ({error!r:.200}): get it again") from None
        self.config = self.model.config
        self.device = device

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Return ``[pictures, dim]``."""
        return _features(self.model.get_image_features(pixel_values=pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return ``[texts, dim]``."""
        return _features(self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask))

    @torch.no_grad()
    def embed(self, pictures: Sequence[Shown]) -> Tensor:
        """Return the embeddings ``[pictures, dim]`` of pictures."""
        images = [shown.image() for shown in pictures]
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return self.get_image_features(pixels.to(self.device))


def _features(found: Any) -> Tensor:
    features = found if isinstance(found, Tensor) else found.pooler_output
    assert isinstance(features, Tensor)
    return features


class ClipScore:
    """100 times the cosine of the embeddings of picture and prompt, at least 0 (torchmetrics)."""

    name = "CLIPScore"
    better: Better = "higher"
    aspect: Aspect = "quality"
    proportions = False

    def __init__(self, clip: Clip) -> None:
        """Measure with ``clip``."""
        self._clip = clip

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Shown]) -> list[float | None]:
        """Return the score of each picture; prompts are cut to what CLIP reads."""
        return [self._score(shown) for shown in pictures]

    def _score(self, shown: Shown) -> float:
        # torchmetrics gives the mean of what it is given, so it is given one.
        image = to_bytes(shown.image()).to(self._clip.device)
        return float(clip_score(image, shown.picture.prompt, lambda: (self._clip, self._clip.processor)))


class Q16:
    """Whether a picture's embedding is nearer to the learnt "inappropriate" than to the learnt "harmless"."""

    name = "inappropriate (Q16)"
    better: Better = "lower"
    aspect: Aspect = "safety"
    proportions = True

    def __init__(self, clip: Clip, prompts: Path, batch_size: int) -> None:
        """Read the learnt embeddings, ``[2, dim]``: harmless, inappropriate.

        Raises:
            Missing: they are not there, damaged, or not CLIP's size.
        """
        self._clip, self._batch_size = clip, batch_size
        learnt = _read_tensor(prompts)
        dim = int(clip.config.projection_dim)
        if tuple(learnt.shape) != (2, dim):
            raise Missing(
                f"{prompts} holds a tensor {list(learnt.shape)}, and this CLIP needs [2, {dim}]: take those made for it"
            )
        self._learnt = F.normalize(learnt.float(), dim=-1).to(clip.device)

    def __call__(self, pictures: Sequence[Shown]) -> list[float | None]:
        """Return 1 for inappropriate pictures, 0 for others."""
        found: list[float | None] = []
        for start in range(0, len(pictures), self._batch_size):
            embedded = F.normalize(self._clip.embed(pictures[start : start + self._batch_size]).float(), dim=-1)
            found += (embedded @ self._learnt.T).argmax(-1).float().tolist()
        return found


def _read_tensor(path: Path) -> Tensor:
    what = "Q16's two embeddings"
    found = read_weights(path, what, _advice(path))
    tensors = list(found.values()) if isinstance(found, dict) else [found]
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor):
        raise Missing(f"{path} does not hold {what} as one tensor: get that file again")
    return tensors[0]


def _advice(path: Path) -> str:
    """Return what to do with a file that holds no tensors, such as the pickle that Q16 publishes."""
    if path.suffix == ".safetensors":
        return "get that file again"
    return (
        "get that file again; or, if it is Q16's prompts.p, make tensors of it as docs/evaluation-measures.md says, "
        "and name these in assess.q16.prompts"
    )
