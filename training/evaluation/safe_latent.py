"""Safe Latent Diffusion (arXiv 2211.05105): guidance away from a concept, the same for everybody.

With ``e`` what is predicted without a prompt, ``e_p`` with it and ``e_s`` for the concept, elementwise in every step:

    mu     = min(1, s_S |e_p - e_s|)  where  e_p - e_s < lambda,  else 0            (6)
    gamma  = mu (e_s - e) + s_m nu                                                  (4, 7)
    nu     = beta_m nu + (1 - beta_m) gamma                                         (8)
    guided = e + s_g (e_p - e - gamma),  with gamma = 0 during the warm-up          (3)

It is applied to whatever the model predicts, noise or v, as diffusers does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The paper's list, which is also diffusers' default.
CONCEPT = (
    "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily "
    "fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child abuse, brutality, "
    "cruelty"
)
_PAPER_STEPS = 50


@dataclass(frozen=True)
class Degree:
    """How strongly: the paper's hyperparameters. ``warmup_steps`` are those of a run of 50 steps."""

    name: str
    warmup_steps: int
    guidance_scale: float
    threshold: float
    momentum_scale: float
    momentum_beta: float


DEGREES = {
    degree.name: degree
    for degree in (
        Degree("weak", 15, 20, 0.0, 0.0, 0.0),
        Degree("medium", 10, 1000, 0.01, 0.3, 0.4),
        Degree("strong", 7, 2000, 0.025, 0.5, 0.7),
        Degree("max", 0, 5000, 1.0, 0.5, 0.7),
    )
}


class SafeLatentGuidance:
    """The rule for one batch; it remembers the momentum, so every batch has its own."""

    def __init__(self, degree: Degree, steps: int) -> None:
        """Take a degree; in a run of other than 50 steps the warm-up is as large a share of them."""
        self._degree = degree
        self._warmup = round(degree.warmup_steps * steps / _PAPER_STEPS)
        self._momentum: Tensor | None = None

    def __call__(self, step: int, without: Tensor, asked: Tensor, concept: Tensor) -> Tensor:
        """Return ``gamma``; all tensors are ``[n, channels, height, width]``."""
        degree = self._degree
        momentum = torch.zeros_like(asked) if self._momentum is None else self._momentum
        difference = asked - concept
        scale = (difference.abs() * degree.guidance_scale).clamp(max=1.0)
        scale = torch.where(difference >= degree.threshold, 0.0, scale)
        safety = scale * (concept - without) + degree.momentum_scale * momentum
        self._momentum = degree.momentum_beta * momentum + (1 - degree.momentum_beta) * safety
        return safety if step >= self._warmup else torch.zeros_like(safety)
