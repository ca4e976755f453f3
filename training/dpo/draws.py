"""Everything random in training, as a function of the seed and the number of the sample.

No generator has a state to save: a resumed run draws what it would have drawn, and any number of ranks draw
the same samples as one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """What is drawn for one pair; ``noise`` is ``[channels, height, width]`` and shared by its two images."""

    noise: Tensor
    timestep: int
    prompt_dropped: bool
    user_dropped: bool


@dataclass(frozen=True)
class Draws:
    """The random side of a run: rates and sizes."""

    seed: int
    timesteps: int
    prompt_dropout: float
    user_dropout: float
    noise_offset: float

    def draw(self, sample: int, shape: Sequence[int]) -> Draw:
        """Draw for the ``sample``-th pair of the run, with latents of ``shape`` ``[channels, height, width]``."""
        generator = self.generator("sample", sample)
        noise = torch.randn(tuple(shape), generator=generator)
        offset = torch.randn((shape[0], 1, 1), generator=generator)
        timestep = int(torch.randint(self.timesteps, (), generator=generator))
        prompt, user = torch.rand(2, generator=generator).tolist()
        return Draw(
            noise=noise + self.noise_offset * offset,
            timestep=timestep,
            prompt_dropped=prompt < self.prompt_dropout,
            user_dropped=user < self.user_dropout,
        )

    def order(self, epoch: int, rows: int) -> Tensor:
        """Return the order in which ``epoch`` visits its ``rows``."""
        return torch.randperm(rows, generator=self.generator("order", epoch))

    def generator(self, purpose: str, number: int) -> torch.Generator:
        """Return a generator for one purpose and number; it is on the CPU, so all devices draw the same."""
        digest = hashlib.sha256(f"{self.seed}:{purpose}:{number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
