"""The heart of training: loss, attachment to the UNet, gradients, targets, against independent computations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models import attention_processor
from diffusers_testing import TwoBranchAttention
from effects import site_vectors
from torch import Tensor
from training_testing import CONTEXT, DIM, pair_batch, tiny_adapter, tiny_unet

from comfyui_psa.adapter import AdapterError, PSAAdapter
from comfyui_psa.training.config import LossSection, ModelSection
from comfyui_psa.training.dpo.denoising import PairBatch, pair_errors, prediction_target
from comfyui_psa.training.dpo.inputs import Text, UNetInputs
from comfyui_psa.training.dpo.loss import PairErrors, diffusion_dpo_loss
from comfyui_psa.training.dpo.policy import Policy, configure_unet
from comfyui_psa.training.dpo.trainable import TrainableAdapter, standardise
from comfyui_psa.training.errors import TrainingError

BETA = 5000.0


def policy_for(unet: UNet2DConditionModel, adapter: PSAAdapter, **scheduler: object) -> Policy:
    return Policy(unet, DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False, **scheduler), adapter)


def dpo(policy: Policy, effects: TrainableAdapter, batch: PairBatch, beta: float = BETA) -> Tensor:
    reference = policy.reference_errors(batch)
    with policy.errors(effects, batch) as model:
        return diffusion_dpo_loss(model, reference, beta).loss


def test_the_loss_is_the_papers_by_hand() -> None:
    chosen, rejected = [0.31, 0.30], [0.29, 0.35]
    chosen_reference, rejected_reference = [0.3105, 0.2990], [0.2889, 0.3504]
    by_hand = []
    for w, r, w0, r0 in zip(chosen, rejected, chosen_reference, rejected_reference, strict=True):
        inside = -BETA / 2 * ((w - r) - (w0 - r0))
        by_hand.append((math.log1p(math.exp(-inside)), inside))

    def errors(a: list[float], b: list[float]) -> PairErrors:
        return PairErrors(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))

    result = diffusion_dpo_loss(errors(chosen, rejected), errors(chosen_reference, rejected_reference), BETA)
    assert result.loss.tolist() == pytest.approx([loss for loss, _ in by_hand], rel=1e-12)
    assert result.margin.tolist() == pytest.approx([margin for _, margin in by_hand], rel=1e-12)
    assert result.accuracy.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sdxl", [False, True])
def test_the_loss_at_step_0_is_ln_2(dtype: torch.dtype, sdxl: bool) -> None:
    unet = tiny_unet(sdxl).to(dtype)
    adapter = tiny_adapter(unet)
    loss = dpo(policy_for(unet, adapter), TrainableAdapter(adapter), pair_batch(sdxl=sdxl, dropped=(1,)))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, torch.full_like(loss, math.log(2)))


def test_errors_of_a_pair_are_those_of_each_image_alone() -> None:
    """The same noise, timestep, text and user on both sides of a pair; errors by hand."""
    unet = tiny_unet()
    adapter = tiny_adapter(unet, trained=True)
    policy, batch = policy_for(unet, adapter), pair_batch()
    with torch.no_grad(), policy.errors(TrainableAdapter(adapter), batch) as model:
        pass
    alphas = DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod
    for i in range(3):
        vectors = site_vectors(adapter, batch.embedding[i : i + 1]).user
        for images, found in ((batch.chosen, model.chosen), (batch.rejected, model.rejected)):
            alpha = alphas[batch.timesteps[i]]
            noisy = alpha.sqrt() * images[i] + (1 - alpha).sqrt() * batch.noise[i]
            with torch.no_grad(), policy.applied(UNetInputs(Text(batch.text), vectors)):
                predicted = unet(noisy[None], batch.timesteps[i], batch.text[i : i + 1]).sample[0]
            assert float(found[i]) == pytest.approx(float(F.mse_loss(predicted, batch.noise[i])), rel=1e-5)


def test_without_vectors_the_unet_is_the_base_bit_for_bit() -> None:
    unet, batch = tiny_unet(), pair_batch()
    before = unet(batch.chosen, 10, batch.text).sample
    policy = policy_for(unet, tiny_adapter(unet, trained=True))
    assert torch.equal(unet(batch.chosen, 10, batch.text).sample, before)
    zero = [torch.zeros(3, site.to_v_user.out_features) for site in tiny_adapter(unet).sites]
    with policy.applied(UNetInputs(Text(batch.text), tuple(zero))):
        assert torch.equal(unet(batch.chosen, 10, batch.text).sample, before)
    with policy.applied(UNetInputs(Text(batch.text), tuple(vector + 1 for vector in zero))):
        assert not torch.equal(unet(batch.chosen, 10, batch.text).sample, before)
    assert torch.equal(unet(batch.chosen, 10, batch.text).sample, before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_true_two_branch_attention(checkpointing: bool) -> None:
    batch = pair_batch(dropped=(2,))
    batch = PairBatch(**{k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
                         for k, v in vars(batch).items()})  # fmt: skip

    # pair_errors measures in float32: here everything is float64, by the same formula.
    def errors(unet: UNet2DConditionModel) -> PairErrors:
        scheduler = DDPMScheduler(beta_schedule="scaled_linear")
        losses = []
        for images in (batch.chosen, batch.rejected):
            noisy = scheduler.add_noise(images, batch.noise, batch.timesteps)
            predicted = unet(noisy, batch.timesteps, batch.text).sample
            losses.append((predicted - batch.noise).square().mean(dim=(1, 2, 3)))
        return PairErrors(*losses)

    def loss(model: PairErrors) -> Tensor:
        with torch.no_grad():
            reference = errors(tiny_unet().double())
        return diffusion_dpo_loss(model, reference, 50.0).loss.mean()

    unet = tiny_unet().double()
    ours = tiny_adapter(unet, trained=True)
    policy = policy_for(unet, ours)
    policy.checkpoint_gradients(ModelSection(base=Path("base"), gradient_checkpointing=checkpointing))
    effects = TrainableAdapter(ours)
    effects.double()
    with policy.applied(effects(batch.embedding, batch.dropped, Text(batch.text))):
        loss(errors(unet)).backward()

    theirs = tiny_adapter(unet, trained=True).double()
    two_branch = tiny_unet().double()
    embedding = torch.where(batch.dropped[:, None], torch.zeros(DIM, dtype=torch.float64), batch.embedding)
    token = theirs.user_proj(embedding)
    processors = dict(two_branch.attn_processors)
    names = [name for name in processors if "attn2" in name]
    for name, site in zip(names, theirs.sites, strict=True):
        value = site.to_v_user.weight
        processors[name] = TwoBranchAttention(torch.randn_like(value), value, 1.0)
        processors[name].user_token = token
    two_branch.set_attn_processor(processors)
    loss(errors(two_branch)).backward()

    for (name, found), (_, expected) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert float(expected.grad.abs().max()) > 1e-6, name
        assert torch.allclose(found.grad, expected.grad, rtol=1e-8, atol=1e-12), name


def test_gradients_reach_the_adapter_and_nothing_else() -> None:
    unet = tiny_unet(sdxl=True)
    adapter = tiny_adapter(unet, trained=True)
    batch = replace(pair_batch(sdxl=True), chosen=pair_batch().chosen.requires_grad_())
    dpo(policy_for(unet, adapter), TrainableAdapter(adapter), batch, beta=10.0).mean().backward()
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in adapter.parameters())


def test_everything_trained_is_float32_under_a_bf16_unet() -> None:
    unet = tiny_unet().to(torch.bfloat16)
    adapter = tiny_adapter(unet, trained=True).to(torch.bfloat16)
    effects = TrainableAdapter(adapter)
    optimizer = torch.optim.AdamW(effects.parameters(), lr=5e-6)
    before = {name: parameter.clone() for name, parameter in adapter.named_parameters()}
    dpo(policy_for(unet, adapter), effects, pair_batch(), beta=10.0).mean().backward()
    optimizer.step()
    for name, parameter in adapter.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == optimizer.state[parameter]["exp_avg"].dtype == torch.float32
        moved = (parameter != before[name]).float().mean()
        # In bf16 only small weights could move at this learning rate; here all of them do.
        assert float(moved) > 0.99, name


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_target_is_the_schedulers_prediction_type(kind: str) -> None:
    scheduler = DDPMScheduler(prediction_type=kind)
    batch = pair_batch()
    alpha = scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    expected = {
        "epsilon": batch.noise,
        "v_prediction": alpha.sqrt() * batch.noise - (1 - alpha).sqrt() * batch.chosen,
        "sample": batch.chosen,
    }[kind]
    found = prediction_target(scheduler, batch.chosen, batch.noise, batch.timesteps)
    assert torch.allclose(found, expected, atol=1e-6)

    unet = tiny_unet()
    errors = pair_errors(unet, scheduler, batch)
    noisy = scheduler.add_noise(batch.chosen, batch.noise, batch.timesteps)
    by_hand = (unet(noisy, batch.timesteps, batch.text).sample - expected).square().mean(dim=(1, 2, 3))
    assert torch.allclose(errors.chosen, by_hand, rtol=1e-5)


def test_sdxl_reads_the_time_ids() -> None:
    unet = tiny_unet(sdxl=True)
    policy = policy_for(unet, tiny_adapter(unet))
    batch = pair_batch(sdxl=True)
    other = replace(batch, time_ids=batch.time_ids + torch.tensor([0.0, 0, 0, 9, 0, 0]))
    assert not torch.equal(policy.reference_errors(batch).chosen, policy.reference_errors(other).chosen)


def test_dropped_users_are_the_null_user() -> None:
    adapter = tiny_adapter(tiny_unet(), trained=True)
    standardise(adapter, torch.randn(50, DIM) * 3 + 2)
    embedding = torch.randn(2, DIM)
    found = TrainableAdapter(adapter)(embedding, torch.tensor([True, False]), Text(torch.zeros(2, 5, CONTEXT))).vectors
    expected = site_vectors(adapter, embedding[1:], null="zero_embedding")
    for vector, user, null in zip(found, expected.user, expected.null, strict=True):
        assert torch.allclose(vector[0], null, atol=1e-6)
        assert torch.allclose(vector[1], user[0], atol=1e-6)


def test_standardisation_is_stored_and_leaves_constant_numbers_alone() -> None:
    adapter = tiny_adapter(tiny_unet())
    users = torch.randn(40, DIM) * torch.tensor([1.0, 5.0, 0.1, 2.0, 3.0, 1e-9]) + torch.arange(DIM)
    standardise(adapter, users)
    standardised = (users - adapter.embedding_mean) / adapter.embedding_std
    assert torch.allclose(standardised.mean(dim=0), torch.zeros(DIM), atol=1e-5)
    assert torch.allclose(standardised[:, :5].std(dim=0, correction=0), torch.ones(5), atol=1e-5)
    assert float(adapter.embedding_std[5]) == 1


def test_an_adapter_for_another_unet_is_refused() -> None:
    with pytest.raises(AdapterError, match="trained for"):
        policy_for(tiny_unet(), tiny_adapter(_wider()))


def _wider() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(32, 96),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
    )


def test_a_compiled_unet_gives_the_same_and_is_not_compiled_again() -> None:
    from torch._dynamo.testing import CompileCounter

    unet = tiny_unet()
    adapter = tiny_adapter(unet, trained=True)
    policy, effects = policy_for(unet, adapter), TrainableAdapter(adapter)
    batches = [pair_batch(seed=seed) for seed in (3, 4, 5)]
    plain = [dpo(policy, effects, batch) for batch in batches]
    torch._dynamo.reset()
    counter = CompileCounter()
    unet.compile(backend=counter)
    compiled = [dpo(policy, effects, batch) for batch in batches[:1]]
    graphs = counter.frame_count
    compiled += [dpo(policy, effects, batch) for batch in batches[1:]]
    torch._dynamo.reset()
    assert graphs == counter.frame_count == 2  # with and without vectors
    for a, b in zip(compiled, plain, strict=True):
        assert torch.allclose(a, b, rtol=1e-5)


def stand_in_for_xformers(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Tensor]) -> None:
    """Of xformers only the kernel, and the GPU it needs, are replaced."""
    kernels = SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=kernel))
    monkeypatch.setattr(attention_processor, "xformers", kernels, raising=False)
    monkeypatch.setattr(attention_processor, "is_xformers_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # Diffusers tries the kernel once on random numbers that it draws on the GPU.
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, device=None, **more: randn(*size, **more))


def test_xformers_without_a_kernel_for_this_torch_and_cuda_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(*_: Tensor, **__: object) -> Tensor:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`\nwith inputs: ...")

    stand_in_for_xformers(monkeypatch, no_kernel)
    with pytest.raises(TrainingError, match=r'"xformers" cannot be used here \(No operator found .*\)\. .*"sdpa"'):
        configure_unet(tiny_unet(), ModelSection(base=Path("base"), attention="xformers"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_xformers_attention_gives_the_same_loss_and_gradients(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """The switch of the configuration, as a whole."""
    calls = []

    def memory_efficient_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None = None, p: float = 0.0,
        scale: float | None = None, *, op: object = None,
    ) -> Tensor:  # fmt: skip
        calls.append(query.shape)
        return F.scaled_dot_product_attention(query, key, value, attn_bias, p, scale=scale)

    stand_in_for_xformers(monkeypatch, memory_efficient_attention)
    results = []
    for xformers in (False, True):
        unet = tiny_unet()
        adapter = tiny_adapter(unet, trained=True)
        section = ModelSection(
            base=Path("base"), attention="xformers" if xformers else "sdpa", gradient_checkpointing=checkpointing
        )
        configure_unet(unet, section)
        processors = {type(processor) for processor in unet.attn_processors.values()}
        assert (processors == {attention_processor.XFormersAttnProcessor}) == xformers
        calls.clear()
        policy, effects = policy_for(unet, adapter), TrainableAdapter(adapter)
        policy.checkpoint_gradients(section)
        with policy.compared_errors(effects, pair_batch()) as errors:
            loss = diffusion_dpo_loss(*errors, BETA).loss
            loss.mean().backward()
        results.append((loss.detach(), [parameter.grad for parameter in adapter.parameters()]))
        assert (len(calls) > 0) == xformers
    (plain, plain_gradients), (found, gradients) = results
    assert torch.allclose(found, plain, rtol=1e-4)
    for ours, theirs in zip(gradients, plain_gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("slack", [0.0, 0.2])
def test_the_safeguard_scales_the_gradient_of_each_rejected_image_by_its_residuals(slack: float) -> None:
    """By hand from what the UNet predicted; noise is the target."""
    unet = tiny_unet()
    adapter, batch = tiny_adapter(unet, trained=True), pair_batch(8)
    policy, effects = policy_for(unet, adapter), TrainableAdapter(adapter)
    reference = policy.reference_errors(batch)
    weights = list(adapter.sites.parameters())
    predicted: list[Tensor] = []
    handle = unet.register_forward_hook(lambda _unet, _args, output: predicted.append(output.sample))
    with policy.errors(effects, batch) as errors:
        handle.remove()
        sections = [LossSection(beta=20.0), LossSection(beta=20.0, safeguard=slack)]
        plain, ours = (policy.loss(errors, reference, batch, section) for section in sections)
        assert torch.equal(plain.loss, ours.loss)
        found = torch.autograd.grad(ours.loss.sum(), weights, retain_graph=True)
        chosen, rejected = ((part - batch.noise).flatten(1) for part in predicted[0].detach().chunk(2))
        products = (chosen * rejected).sum(1)
        scales = [
            min(1.0, (1 - slack) * float(w @ w) / float(product)) if product > 0 else 1.0
            for w, product in zip(chosen, products, strict=True)
        ]
        assert min(scales) < 1
        pull = 20.0 / 2 * torch.sigmoid(-ours.margin)  # of each pair, on the chosen image's error
        by_hand = (pull * errors.chosen - pull * torch.tensor(scales) * errors.rejected).sum()
        expected = torch.autograd.grad(by_hand, weights)
    for gradient, hand in zip(found, expected, strict=True):
        assert torch.allclose(gradient, hand, rtol=1e-4, atol=1e-7)
