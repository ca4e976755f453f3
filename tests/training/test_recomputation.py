"""Gradient checkpointing in which the reference runs with the policy, and no gradients are made of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from kinds_by_hand import EMBEDDING_DIM, GATED, TEXT, kinds_adapter
from torch import Tensor
from training_testing import CONTEXT, POOLED, pair_batch, tiny_adapter, tiny_unet

from comfyui_psa.adapter import PSAAdapter, find_sites
from comfyui_psa.training.config import LossSection, ModelSection
from comfyui_psa.training.dpo.attachment import Attachment
from comfyui_psa.training.dpo.denoising import PairBatch
from comfyui_psa.training.dpo.loss import PairErrors
from comfyui_psa.training.dpo.policy import Policy
from comfyui_psa.training.dpo.recomputation import Recomputation
from comfyui_psa.training.dpo.trainable import TrainableAdapter

PAIRS = 3
ALLOWED = torch.tensor([False, True, False])
LOSS = LossSection(beta=200.0, winner_anchor=3.0, safeguard=0.1, fidelity=10.0, timestep_weight_limit=4.0)
CHECKPOINTED = ModelSection(base=Path("base"), gradient_checkpointing=True)


def policy_for(unet: UNet2DConditionModel, adapter: PSAAdapter) -> Policy:
    return Policy(unet, DDPMScheduler(beta_schedule="scaled_linear"), adapter)


def adapter_for(unet: UNet2DConditionModel, sdxl: bool, kinds: tuple[str, ...]) -> PSAAdapter:
    described: dict[str, Any] = {"constant": "constant" in kinds}
    if "gated" in kinds:
        described["gated"] = GATED
    if "text" in kinds:
        described["text"] = TEXT.model_copy(update={"pooled_dim": POOLED if sdxl else None})
    return kinds_adapter(tuple(site.hidden_size for site in find_sites(unet)), CONTEXT, **described)


def batch_of(sdxl: bool = False, width: int = EMBEDDING_DIM) -> PairBatch:
    """Three pairs; the last one's user is the null user."""
    batch = pair_batch(PAIRS, sdxl=sdxl, dropped=(2,))
    return replace(batch, embedding=torch.randn(PAIRS, width, generator=torch.Generator().manual_seed(5)))


def step(
    policy: Policy, adapter: PSAAdapter, batch: PairBatch, section: LossSection, known: PairErrors | None = None
) -> tuple[Tensor, PairErrors, dict[str, Tensor]]:
    """Losses, the reference's errors, and the gradients of all weights."""
    effects = TrainableAdapter(adapter)
    effects.zero_grad()
    with policy.compared_errors(effects, batch, known) as (model, reference):
        loss = policy.loss(model, reference, batch, section).loss
        loss.mean().backward()
    gradients = {name: weight.grad for name, weight in adapter.named_parameters() if weight.grad is not None}
    return loss.detach(), reference, gradients


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float(gradient.abs().max()) > 0, name
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())), name


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("kinds", [("constant",), ("gated",), ("text",), ("constant", "gated", "text")])
@pytest.mark.parametrize("sdxl", [False, True])
def test_losses_and_gradients_are_those_of_two_calls(sdxl: bool, kinds: tuple[str, ...], known: bool) -> None:
    """Of the loss with everything in it: what is allowed needs predictions, the safeguard both images' residuals.

    With a reference that is known, the policy runs alone.
    """
    unet = tiny_unet(sdxl)
    adapter = adapter_for(unet, sdxl, kinds)
    batch = replace(batch_of(sdxl), allowed=ALLOWED)
    policy = policy_for(unet, adapter)
    expected, reference, gradients = step(policy, adapter, batch, LOSS)
    assert float((expected - math.log(2)).abs().max()) > 0.001  # the null user's is ln 2, of most kinds
    policy.checkpoint_gradients(CHECKPOINTED)
    found, same_reference, same_gradients = step(policy, adapter, batch, LOSS, reference if known else None)
    assert torch.allclose(found, expected, rtol=1e-4)
    assert (same_reference is reference) == known
    for ours, theirs in zip(same_reference, reference, strict=True):
        assert ours is not None
        assert theirs is not None
        assert not ours.requires_grad
        assert known or torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert_same(same_gradients, gradients)


def test_a_block_keeps_the_policys_pictures_alone_and_gives_the_others_no_gradient() -> None:
    unet = tiny_unet()
    attachment = Attachment(unet, find_sites(unet))
    block = torch.nn.Linear(5, 5).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(8, 5, generator=generator).requires_grad_()
    weights = torch.randn(8, 5, generator=generator)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with attachment.applied(pictures=2):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = Recomputation(attachment)(block, pictures)
        (output * weights).sum().backward()
    assert torch.equal(output, block(pictures))
    assert [tensor.untyped_storage().nbytes() for tensor in saved] == [2 * 5 * 4]
    assert pictures.grad is not None
    assert torch.allclose(pictures.grad[:2], weights[:2] @ block.weight)
    assert not pictures.grad[2:].any()


@pytest.mark.parametrize("known", [False, True])
def test_the_unet_runs_once_and_again_for_the_policys_pictures_alone(known: bool) -> None:
    unet = tiny_unet()
    adapter = tiny_adapter(unet, trained=True)
    policy, batch = policy_for(unet, adapter), batch_of(width=6)
    reference = policy.reference_errors(batch) if known else None
    policy.checkpoint_gradients(CHECKPOINTED)
    calls: list[tuple[str, int, bool]] = []

    def note(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        calls.append((type(module).__name__, len(args[0]), torch.is_grad_enabled()))

    block = next(module for module in unet.modules() if isinstance(module, BasicTransformerBlock))
    for module in (unet, block):
        module.register_forward_pre_hook(note)
    step(policy, adapter, batch, LossSection(), reference)
    everything = 2 * PAIRS if known else 4 * PAIRS
    assert calls == [
        ("UNet2DConditionModel", everything, True),
        ("BasicTransformerBlock", everything, False),
        ("BasicTransformerBlock", 2 * PAIRS, True),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_at_step_0_is_ln_2(dtype: torch.dtype) -> None:
    """To the rounding of a kernel that has the two at different places of a batch."""
    unet = tiny_unet(sdxl=True).to(dtype)
    adapter = tiny_adapter(unet)
    policy = policy_for(unet, adapter)
    policy.checkpoint_gradients(CHECKPOINTED)
    loss, _, _ = step(policy, adapter, batch_of(sdxl=True, width=6), LossSection(beta=5000.0))
    assert torch.allclose(loss, torch.full_like(loss, math.log(2)), atol=2e-3)


def test_pictures_are_the_bases_again_after_a_step() -> None:
    unet = tiny_unet()
    adapter = tiny_adapter(unet, trained=True)
    policy, batch = policy_for(unet, adapter), batch_of(width=6)
    before = policy.reference_errors(batch)
    policy.checkpoint_gradients(CHECKPOINTED)
    step(policy, adapter, batch, LossSection())
    assert torch.equal(policy.reference_errors(batch).chosen, before.chosen)
    with torch.no_grad(), policy.errors(TrainableAdapter(adapter), batch) as model:
        assert not torch.allclose(model.chosen, before.chosen, rtol=1e-3)
