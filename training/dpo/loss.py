"""The Diffusion-DPO loss, in float32 whatever precision the UNet has, and what may be added to it.

    L = -log sigmoid(-beta/2 k(t) [(mse_theta(w) - mse_theta(l)) - (mse_ref(w) - mse_ref(l))])
        + lambda k(t) [mse_theta(w) - mse_ref(w)]

With weights k = 1 and without the anchor, lambda = 0, it is Wallace et al., arXiv 2311.12908, equation 14, with the
constants of arXiv 2508.01151. The first term is content with pictures that get worse, as long as rejected ones do so
faster. Two things hold the chosen image w against that: the anchor, a term of its own, and Diffusion-SDPO's safeguard,
which takes from the rejected image's gradient what would make w worse.

A preference for what is allowed pushes away from the base as well: towards more of it. With fidelity mu, pairs that
show what their user allows are no preferences, and the model is to predict of both images what the reference does:

    L = mu k(t) deviation,      deviation = [mse(u_theta(w), u_ref(w)) + mse(u_theta(l), u_ref(l))] / 2

with predictions u.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PairErrors(NamedTuple):
    """Denoising errors of a batch of pairs: mean squares over channels and pixels, float32 ``[pairs]``.

    ``alignment`` is the mean product of the two images' residuals, without gradient; ``prediction``
    ``[2 * pairs, ...]`` what the UNet said, of the chosen images and then of the rejected ones. They are None where
    nobody needs them.
    """

    chosen: Tensor
    rejected: Tensor
    alignment: Tensor | None = None
    prediction: Tensor | None = None


class DPOLoss(NamedTuple):
    """Per pair, ``[pairs]``: the loss, and the margin between the implicit rewards of chosen and rejected.

    The margin is of errors without weights, so that runs with different ones can be compared. ``deviation`` is there
    with fidelity: how far the predictions are from the reference's.
    """

    loss: Tensor
    margin: Tensor
    deviation: Tensor | None = None

    @property
    def accuracy(self) -> Tensor:
        """1 where the chosen image has the larger implicit reward, 1/2 for a tie (the untrained adapter)."""
        return (self.margin.sign() + 1) / 2


def safeguarded(errors: PairErrors, slack: float) -> PairErrors:
    """Return the same errors; the gradient of the rejected ones is scaled by Diffusion-SDPO (arXiv 2511.03317).

    With the residuals ``r`` of chosen and rejected image, a step along ``-r_w + scale r_l`` in the space of predictions
    changes the chosen one's error by a multiple of ``-r_w.r_w + scale r_w.r_l``. That is at most zero for

        scale = min(1, (1 - slack) r_w.r_w / r_w.r_l)        and any scale where r_w.r_l is not positive.

    Each pair has a scale of its own. ``slack``, from 0 to below 1, stays further away from the limit.
    """
    assert errors.alignment is not None
    chosen, rejected = errors.chosen.detach(), errors.rejected.detach()
    limit = (1 - slack) * chosen / errors.alignment
    scale = torch.where(errors.alignment > 0, limit.clamp(max=1), torch.ones_like(limit))
    return errors._replace(rejected=rejected + scale * (errors.rejected - rejected))


def diffusion_dpo_loss(
    model: PairErrors,
    reference: PairErrors,
    beta: float,
    winner_anchor: float = 0.0,
    weights: Tensor | float = 1.0,
) -> DPOLoss:
    """Return the loss of each pair; ln 2 where model and reference agree.

    ``winner_anchor`` is lambda; ``weights`` ``[pairs]`` are k at the timestep of each pair, see ``error_weights``.
    """
    difference = (model.chosen - model.rejected) - (reference.chosen - reference.rejected)
    margin = -beta / 2 * difference
    loss = -F.logsigmoid(weights * margin)
    if winner_anchor:
        loss = loss + winner_anchor * weights * (model.chosen - reference.chosen)
    return DPOLoss(loss, margin.detach())


def with_fidelity(
    preference: DPOLoss,
    model: PairErrors,
    reference: PairErrors,
    allowed: Tensor,
    fidelity: float,
    weights: Tensor | float = 1.0,
) -> DPOLoss:
    """Return the loss with the pairs ``allowed`` ``[pairs]`` kept at the reference instead of preferred.

    ``fidelity`` is mu; ``weights`` are k, as in ``diffusion_dpo_loss``.
    """
    assert model.prediction is not None
    assert reference.prediction is not None
    squares = (model.prediction - reference.prediction).square().flatten(start_dim=1).mean(dim=1)
    deviation = squares.view(2, -1).mean(dim=0)
    kept = fidelity * weights * deviation
    return preference._replace(loss=torch.where(allowed, kept, preference.loss), deviation=deviation.detach())
