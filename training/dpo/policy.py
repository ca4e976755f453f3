"""What is trained and what it is compared with: one frozen UNet with an adapter attached, or without.

What the reference says of a pair and a noise never changes, so it can be remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from ...adapter import PSAAdapter, find_sites
from ..config import LossSection, ModelSection
from ..errors import TrainingError
from .attachment import Attachment
from .denoising import PairBatch, error_weights, errors_of, noised, pair_errors, predict
from .inputs import Text, UNetInputs
from .loss import DPOLoss, PairErrors, diffusion_dpo_loss, safeguarded, with_fidelity
from .recomputation import Recomputation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Effects = Callable[[Tensor, Tensor, Text], UNetInputs]


class Policy:
    """The UNet with and without the adapter. The UNet is there once: without vectors it is the reference."""

    def __init__(self, unet: UNet2DConditionModel, scheduler: DDPMScheduler, adapter: PSAAdapter) -> None:
        """Attach to ``unet``, which is frozen; raise AdapterError if ``adapter`` is for another one."""
        sites = find_sites(unet)
        adapter.check_sites(sites)
        self.unet = unet.requires_grad_(False).eval()
        self.scheduler = scheduler
        self._attachment = Attachment(unet, sites)
        self.recomputation: Recomputation | None = None

    def checkpoint_gradients(self, section: ModelSection) -> None:
        """Turn gradient checkpointing on if the configuration asks for it.

        Then ``compared_errors`` runs the UNet once and not twice; but a UNet that is compiled has diffusers' own
        checkpointing, since a compiler cannot follow ours.
        """
        if section.gradient_checkpointing and section.compile:
            self.unet.enable_gradient_checkpointing()
        elif section.gradient_checkpointing:
            self.recomputation = Recomputation(self._attachment)
            self.unet.enable_gradient_checkpointing(self.recomputation)

    @torch.no_grad()
    def reference_errors(self, batch: PairBatch) -> PairErrors:
        """Return the errors of the base model, ``[pairs]`` each."""
        return pair_errors(self.unet, self.scheduler, batch)

    @contextmanager
    def errors(self, effects: nn.Module | Effects, batch: PairBatch) -> Iterator[PairErrors]:
        """Yield the errors with each pair's user; the backward pass belongs into the block."""
        inputs = self._inputs(effects, batch)
        with self.applied(inputs):
            yield pair_errors(self.unet, self.scheduler, batch, inputs.text)

    @contextmanager
    def compared_errors(
        self, effects: nn.Module | Effects, batch: PairBatch, reference: PairErrors | None = None
    ) -> Iterator[tuple[PairErrors, PairErrors]]:
        """Yield the errors with each pair's user, and those of the base model, which runs if they are not given.

        The backward pass belongs into the block.
        """
        if reference is None and self.recomputation is not None:
            with self._errors_of_both(effects, batch) as errors:
                yield errors
        else:
            known = self.reference_errors(batch) if reference is None else reference
            with self.errors(effects, batch) as model:
                yield model, known

    @contextmanager
    def _errors_of_both(
        self, effects: nn.Module | Effects, batch: PairBatch
    ) -> Iterator[tuple[PairErrors, PairErrors]]:
        """Run the UNet once on the pairs with their users and behind them on the same pairs without."""
        inputs, base = self._inputs(effects, batch), Text(batch.text, batch.pooled).repeated(2)
        pictures, seen = len(base.hidden), noised(self.scheduler, batch)
        with self._attachment.applied(inputs.vectors, inputs.gates, pictures):
            said = predict(self.unet, batch, seen, inputs.text.followed_by(base), times=2)
            model, reference = said[:pictures], said[pictures:].detach()
            yield errors_of(batch, model, seen.target), errors_of(batch, reference, seen.target)

    def _inputs(self, effects: nn.Module | Effects, batch: PairBatch) -> UNetInputs:
        inputs: UNetInputs = effects(batch.embedding, batch.dropped, Text(batch.text, batch.pooled))
        return inputs.repeated(2)

    def loss(self, model: PairErrors, reference: PairErrors, batch: PairBatch, section: LossSection) -> DPOLoss:
        """Return the loss of each pair as the configuration has it."""
        if section.safeguard is not None:
            model = safeguarded(model, section.safeguard)
        weights = error_weights(self.scheduler, batch.timesteps, section.timestep_weight_limit)
        loss = diffusion_dpo_loss(model, reference, section.beta, section.winner_anchor, weights)
        if batch.allowed is None:
            return loss
        return with_fidelity(loss, model, reference, batch.allowed, section.fidelity, weights)

    @contextmanager
    def applied(self, inputs: UNetInputs) -> Iterator[None]:
        """Let the UNet's layers add what users add, within the block; the text is the caller's to hand over."""
        with self._attachment.applied(inputs.vectors, inputs.gates):
            yield


class RememberedReference:
    """The reference's errors of pairs whose noise comes again: measured once, on whichever rank; part of checkpoints.

    That is exact: the loss depends on the reference through these errors alone, and they on nothing that is trained.
    With ``variants`` 0 nothing is remembered.
    """

    def __init__(self, policy: Policy, gather: Callable[[Tensor], Tensor], rows: int, variants: int) -> None:
        """Know nothing of ``rows`` pairs with ``variants`` noises each.

        ``gather`` joins tensors ``[pairs, columns]`` of all ranks, which hold equally many pairs.
        """
        self._policy = policy
        self._gather = gather
        self._variants = variants
        self._table = torch.full((rows, variants, 2), torch.nan)  # chosen, rejected
        self._step: list[Tensor] = []

    def known_errors(self, batch: PairBatch) -> PairErrors | None:
        """Return the errors of the base model, ``[pairs]`` each; None with ``variants`` 0.

        Unless all of them are known the UNet runs: with as many pictures as it will later have without it, so that what
        is compared comes from the same kernels.
        """
        if not self._variants:
            return None
        keys = torch.tensor([batch.rows, batch.variants])
        known = self._table[keys[0], keys[1]]
        if bool(known.isnan().any()):
            measured = self._policy.reference_errors(batch)
            errors = torch.stack((measured.chosen, measured.rejected), dim=1)
        else:
            errors = known.to(batch.chosen.device)
        # Known ones too: ranks can only gather equally many. Rows up to 16 million are exact in float32.
        self._step.append(torch.cat((keys.T.to(errors), errors), dim=1))
        return PairErrors(*errors.unbind(dim=1))

    def end_step(self) -> None:
        """Remember what all ranks have measured since the last step, so that all know the same."""
        if self._step:
            step = self._gather(torch.cat(self._step)).cpu()
            rows, variants = step[:, :2].long().unbind(dim=1)
            self._table[rows, variants] = step[:, 2:]
            self._step = []

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps: ``[rows, variants, 2]``, NaN where nothing is known."""
        return {"errors": self._table}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Bring back what a checkpoint kept."""
        self._table.copy_(state["errors"])


def configure_unet(unet: UNet2DConditionModel, section: ModelSection) -> None:
    """Switch xformers on, if the configuration asks for it.

    Raises:
        TrainingError: xformers is not installed, or not for this device, this torch or its CUDA.
    """
    if section.attention == "xformers":
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError, NotImplementedError) as error:  # the last: no kernel of it can be loaded
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise TrainingError(
                f'model.attention = "xformers" cannot be used here ({reason}). Install xformers for this torch and its '
                'CUDA (docs/benchmarks.md, "Training"), or use "sdpa", which torch has built in.'
            ) from None
