"""The Diffusion-DPO loss, in float32 whatever precision the UNet has.

    L = -log sigmoid(-beta/2 [(mse_theta(w) - mse_theta(l)) - (mse_ref(w) - mse_ref(l))])

Wallace et al., arXiv 2311.12908, equation 14, with the constants of arXiv 2508.01151.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class PairErrors(NamedTuple):
    """Denoising errors of a batch of pairs: mean squares over channels and pixels, float32 ``[pairs]``."""

    chosen: Tensor
    rejected: Tensor


class DPOLoss(NamedTuple):
    """Per pair, ``[pairs]``: the loss, and the margin between the implicit rewards of chosen and rejected."""

    loss: Tensor
    margin: Tensor

    @property
    def accuracy(self) -> Tensor:
        """1 where the chosen image has the larger implicit reward, 1/2 for a tie (the untrained adapter)."""
        return (self.margin.sign() + 1) / 2


def diffusion_dpo_loss(model: PairErrors, reference: PairErrors, beta: float) -> DPOLoss:
    """Return the loss of each pair; ln 2 where model and reference agree."""
    difference = (model.chosen - model.rejected) - (reference.chosen - reference.rejected)
    margin = -beta / 2 * difference
    return DPOLoss(-F.logsigmoid(margin), margin.detach())
