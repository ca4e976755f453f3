"""Everything random in training, as a function of the seed and the number of the sample.

No generator has a state to save: a resumed run draws what it would have drawn, and any number of ranks draw
the same samples as one. With ``noises_per_pair`` the pair and the epoch stand in for the number of the sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """What is drawn for one pair; ``noise`` is ``[channels, height, width]`` and shared by its two images.

    ``variant`` says which of the pair's noises it is, None where each sample has one of its own.
    """

    noise: Tensor
    timestep: int
    prompt_dropped: bool
    user_dropped: bool
    variant: int | None = None


@dataclass(frozen=True)
class Draws:
    """The random side of a run: rates and sizes; timesteps are ``min_timestep`` to ``timesteps - 1``."""

    seed: int
    timesteps: int
    prompt_dropout: float
    user_dropout: float
    noise_offset: float
    min_timestep: int = 0
    noises_per_pair: int = 0

    def draw(self, sample: int, shape: Sequence[int], row: int = 0, epoch: int = 0) -> Draw:
        """Draw for the ``sample``-th pair of the run, with latents of ``shape`` ``[channels, height, width]``.

        With ``noises_per_pair`` only the user's dropout is of the sample: the rest is of the pair, ``row``, and the
        same again after that many epochs.
        """
        variant = epoch % self.noises_per_pair if self.noises_per_pair else None
        generator = self.generator("sample", sample) if variant is None else self.generator(f"row {row}", variant)
        noise = torch.randn(tuple(shape), generator=generator)
        offset = torch.randn((shape[0], 1, 1), generator=generator)
        timestep = int(torch.randint(self.min_timestep, self.timesteps, (), generator=generator))
        prompt, user = torch.rand(2, generator=generator).tolist()
        if variant is not None:
            user = float(torch.rand((), generator=self.generator("user", sample)))
        return Draw(
            noise=noise + self.noise_offset * offset,
            timestep=timestep,
            prompt_dropped=prompt < self.prompt_dropout,
            user_dropped=user < self.user_dropout,
            variant=variant,
        )

    def order(self, epoch: int, rows: int) -> Tensor:
        """Return the order in which ``epoch`` visits its ``rows``."""
        return torch.randperm(rows, generator=self.generator("order", epoch))

    def generator(self, purpose: str, number: int) -> torch.Generator:
        """Return a generator for one purpose and number; it is on the CPU, so all devices draw the same."""
        digest = hashlib.sha256(f"{self.seed}:{purpose}:{number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
