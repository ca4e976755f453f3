"""`psa train` from end to end on tiny pipelines: what is trained, and its adapter in the real ComfyUI."""

from __future__ import annotations

import io
import json
import math
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.utils.checkpoint
from comfy.model_patcher import ModelPatcher
from comfy_testing import ROUNDING, TIMESTEP, comfy_model, conditioning, denoise, difference, noise, sigma_at
from diffusers import UNet2DConditionModel
from loss_by_hand import loss_by_hand, mean_and_deviation
from observed_runs import ROWS, SD_SHAPE, SHAPES, STEPS, USERS, Base, Run, embedding, train_tiny
from pairs import read_metadata
from prompts import CHECKPOINT, base_prompt, psa_prompt
from safetensors.torch import load_file
from studio import Studio
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from training_runs import SEED, adapter_file, checkpoint, gradients, metrics, optimizer_state, run, tiny_config

from comfyui_psa.adapter import PAPER_CATEGORIES, load_adapter
from comfyui_psa.nodes.apply import apply_psa
from comfyui_psa.profiles import SafetyEmbedding, levels
from comfyui_psa.profiles.encoders import AttributesEncoder
from comfyui_psa.training.comfyui import Prompt
from comfyui_psa.training.data.users import read_profile
from comfyui_psa.training.dpo.inputs import Text
from comfyui_psa.training.synthetic import UNetShape

LN_2 = math.log(2)

STRICT = next(level.profile for level in levels() if level.id == "L3")  # a user that training never saw


# The adapter in ComfyUI


@pytest.mark.parametrize("cfg", [1.0, 0.0], ids=["conditional", "unconditional"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_training_and_comfyui_predict_the_same_noise(runs: dict[str, Run], name: str, cfg: float) -> None:
    ours, theirs, base = predictions(runs[name], SHAPES[name], cfg)
    assert difference(base, theirs) > 0.01
    assert difference(ours, theirs) < ROUNDING


@torch.no_grad()
def predictions(run: Run, shape: UNetShape, cfg: float) -> tuple[Tensor, Tensor, Tensor]:
    """The noise by ComfyUI with the adapter file, by the UNet in training, and by ComfyUI without adapter.

    With ``cfg`` 1 it is the conditional half, with 0 the unconditional one.
    """
    assert run.trainer is not None
    model = comfy_model(dict(run.base.weights))
    positive, negative = conditioning(shape, 1), conditioning(shape, 2)
    latent, user, sigma = noise(2, 4, 16, 16), embedding(STRICT), sigma_at(model)

    def by_comfyui(patched: ModelPatcher) -> Tensor:
        return (latent - denoise(patched, positive, negative, latent, cfg=cfg)) / sigma

    adapter = load_adapter(adapter_file(run.config))
    ours = by_comfyui(apply_psa(model, adapter, SafetyEmbedding(user, AttributesEncoder.identity)))

    hidden, extra = (positive if cfg else negative)[0]
    text = Text(hidden, extra.get("pooled_output")).repeated(2)
    inputs = run.trainer.effects(user.repeat(2, 1), torch.tensor([cfg == 0, cfg == 0]), text)
    with run.trainer.policy.applied(inputs):
        scaled = latent / (sigma**2 + 1) ** 0.5
        time_ids = torch.tensor([[128.0, 128.0, 0.0, 0.0, 128.0, 128.0]])  # the size of the image, no crop
        added = inputs.text.added(time_ids, torch.float32)
        theirs = run.trainer.policy.unet(scaled, TIMESTEP, inputs.text.hidden, **added).sample
    return ours, theirs, by_comfyui(model)


def test_the_paper_settings_without_null_user_leave_the_unconditional_half_alone(
    bases: dict[str, Base], split: Path, tmp_path: Path
) -> None:
    settings = {"adapter.null": "none", "loss.user_dropout": 0.0, "adapter.standardise": False}
    found = train_tiny(bases["sd"], split, tmp_path / "run", {**settings, "run.steps": 2})
    ours, theirs, base = predictions(found, SD_SHAPE, cfg=1.0)
    assert difference(base, theirs) > 0.01
    assert difference(ours, theirs) < ROUNDING
    ours, _, base = predictions(found, SD_SHAPE, cfg=0.0)
    assert torch.equal(ours, base)
    adapter = load_adapter(adapter_file(found.config))
    assert adapter.config.null == "none"
    assert torch.equal(adapter.embedding_mean, torch.zeros(37))
    assert torch.equal(adapter.embedding_std, torch.ones(37))


ATTENTION = {"form": "attention", "num_tokens": 3, "token_dim": 8, "inner_dim": 8, "heads": 2}
KINDS = {
    "text": (("text",), "none", ATTENTION),
    "text, mlp": (("text",), "none", {"form": "mlp", "token_dim": 8, "inner_dim": 8}),
    "gated": (("gated",), "none", {}),
    "all": (("constant", "gated", "text"), "zero_embedding", ATTENTION),
}


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("kinds", KINDS)
def test_other_kinds_begin_at_the_base_and_end_the_same_in_comfyui(
    bases: dict[str, Base], split: Path, tmp_path: Path, name: str, kinds: str
) -> None:
    chosen, null, text = KINDS[kinds]
    settings = {
        "adapter.kinds": chosen,
        "adapter.null": null,
        "adapter.gated": {"num_tokens": 3, "token_dim": 8, "heads": 4, "head_dim": 4},
        "adapter.text": text,
        "loss.user_dropout": 0.0 if null == "none" else 0.5,
    }
    found = train_tiny(bases[name], split, tmp_path / "run", settings)
    assert metrics(found.config)[0]["loss"] == pytest.approx(LN_2, rel=1e-6)
    adapter = load_adapter(adapter_file(found.config))
    assert adapter.config.kinds == chosen
    assert all(bool(weight.any()) for weight in adapter.zero_at_start())
    for cfg in (1.0, 0.0):
        ours, theirs, base = predictions(found, SHAPES[name], cfg)
        assert difference(ours, theirs) < ROUNDING
        if cfg == 1.0 or null != "none":
            assert difference(base, theirs) > 0.001
        else:
            assert torch.equal(ours, base)


def test_a_compiled_unet_trains_the_same_adapter(
    bases: dict[str, Base], split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through torch's own graphs of forward and backward; only the compiler behind them, minutes on a CPU, is none."""
    settings = {
        "adapter.kinds": ("constant", "gated", "text"),
        "adapter.gated": {"num_tokens": 3, "token_dim": 8, "heads": 4, "head_dim": 4},
        "adapter.text": ATTENTION,
        "model.gradient_checkpointing": True,
        "run.steps": 2,
        "run.accumulation": 1,
    }
    plain = train_tiny(bases["sd"], split, tmp_path / "plain", settings).config
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(UNet2DConditionModel, "compile", partialmethod(nn.Module.compile, backend=backend))
    torch._dynamo.reset()
    compiled = train_tiny(bases["sd"], split, tmp_path / "compiled", settings | {"model.compile": True}).config
    torch._dynamo.reset()
    assert graphs
    (first, ours), (same, theirs) = metrics(compiled), metrics(plain)
    for name in ("loss", "margin", "gradient_norm"):
        assert first[name] == pytest.approx(same[name], rel=1e-3, abs=1e-6), name
        # Adam's first step is as long for gradients that are mostly rounding.
        assert ours[name] == pytest.approx(theirs[name], rel=1e-2, abs=1e-6), name


def test_a_stock_server_opens_the_adapter_and_follows_its_users(studio: Studio, split: Path, tmp_path: Path) -> None:
    models = studio.server.base / "models"
    settings = {"run.steps": 1, "run.batch_size": 1, "run.accumulation": 1, "optimizer.learning_rate": 0.05}
    config = tiny_config(tmp_path / "run", tmp_path / CHECKPOINT, split, settings)
    (tmp_path / CHECKPOINT).symlink_to(models / "checkpoints" / CHECKPOINT)
    run(config)
    (models / "psa_adapters" / "trained.safetensors").write_bytes(adapter_file(config).read_bytes())
    pictures = [pixels(studio, base_prompt()), pixels(studio, psa_prompt("trained.safetensors"))]
    for level in (levels()[0], levels()[5]):
        prompt = psa_prompt("trained.safetensors")
        prompt["6"] = {"class_type": "PSASafetyLevel", "inputs": {"level": level.label}}
        pictures.append(pixels(studio, prompt))
    assert len({picture.tobytes() for picture in pictures}) == 4


def pixels(studio: Studio, prompt: Prompt) -> np.ndarray:
    (image,) = studio.server.run(prompt)
    return np.asarray(PIL.Image.open(io.BytesIO(image.content)))


# What was trained


@pytest.mark.parametrize("name", ["sd", "sdxl", "v"])
def test_the_loss_is_that_of_the_pipelines_own_parts(runs: dict[str, Run], split: Path, name: str) -> None:
    """Step 2, from the images on: the pipeline's VAE and text encoders, true two-branch attention, the formula."""
    found = runs[name]
    lines = metrics(found.config)
    assert lines[0]["loss"] == pytest.approx(LN_2, rel=1e-6)
    expected = loss_by_hand(found, split, step=2)
    assert abs(expected - LN_2) > 5e-3
    assert lines[1]["loss"] == pytest.approx(expected, abs=1e-4)


def test_the_adapter_describes_itself(runs: dict[str, Run], split: Path) -> None:
    for name, found in runs.items():
        adapter = load_adapter(adapter_file(found.config))
        config = adapter.config
        assert (config.kinds, config.base, config.num_tokens) == (("constant",), "other", 1)
        assert (config.encoder.kind, config.encoder.name) == ("attributes", "attributes-1")
        assert config.null == "zero_embedding"
        assert config.categories == PAPER_CATEGORIES
        assert config.embedding_dim == 37
        history = config.training
        assert history["base_model"] == name
        assert history["prediction_type"] == ("v_prediction" if name == "v" else "epsilon")
        assert (history["pairs"], history["users"], history["steps"]) == (ROWS, USERS, STEPS)
        assert (history["beta"], history["resolution"], history["seed"]) == (100.0, 64, SEED)
        text = json.dumps(history)
        assert "/" not in text
        assert "qanzibel" not in text
        earlier = load_adapter(checkpoint(found.config, 1) / "adapter.safetensors").config
        assert earlier.training == history | {"steps": 1}
        last = load_adapter(checkpoint(found.config, STEPS) / "adapter.safetensors")
        assert last.config == config
        assert all(torch.equal(tensor, last.state_dict()[name]) for name, tensor in adapter.state_dict().items())


def test_embeddings_are_standardised_over_the_training_users(runs: dict[str, Run], split: Path) -> None:
    users = {row["user_data"]["User_ID"]: row["user_data"] for row in read_metadata(split)}
    assert len(users) == USERS
    mean, deviation = mean_and_deviation(torch.cat([embedding(read_profile(u, "user")) for u in users.values()]))
    for found in runs.values():
        adapter = load_adapter(adapter_file(found.config))
        assert torch.allclose(adapter.embedding_mean, mean, atol=1e-6)
        assert torch.allclose(adapter.embedding_std, deviation, atol=1e-6)


def test_everything_in_the_adapter_learns_and_the_unet_stays_as_it_is(runs: dict[str, Run]) -> None:
    for found in runs.values():
        assert found.trainer is not None
        first, last = (load_file(checkpoint(found.config, step) / "adapter.safetensors") for step in (1, STEPS))
        learned = {name for name in first if not name.startswith("embedding_")}
        assert learned == {name for name in first if not torch.equal(first[name].float(), last[name].float())}
        on_disk = load_file(found.base.folder / "unet" / "diffusion_pytorch_model.safetensors")
        trained = found.trainer.policy.unet.state_dict()
        assert trained.keys() == on_disk.keys()
        assert all(torch.equal(trained[name], on_disk[name]) for name in on_disk)


def test_one_unet_and_nothing_else_of_the_base_is_in_memory_while_training(runs: dict[str, Run]) -> None:
    for found in runs.values():
        assert found.in_memory == [["UNet2DConditionModel"]] * (STEPS + 1)


def test_micro_batches_make_as_many_steps_as_they_should(runs: dict[str, Run]) -> None:
    """3 steps of 2 micro-batches of 2 pairs: each runs the UNet once as reference and once with gradients."""
    for name in ("sdxl", "v"):  # without validation and grids
        found = runs[name]
        assert found.unet_calls == [(4, False), (4, True)] * (STEPS * 2)
        for step in (1, 2, 3):
            state = optimizer_state(checkpoint(found.config, step))
            assert {int(values["step"]) for values in state.values()} == {step}


def test_accumulated_gradients_are_those_of_one_large_batch(runs: dict[str, Run], split: Path, tmp_path: Path) -> None:
    start = {"run.resume": str(checkpoint(runs["sdxl"].config, STEPS)), "run.steps": STEPS + 1}
    start["loss.beta"] = 1.0  # beta multiplies the rounding of the errors
    found = {}
    for size, accumulation in ((4, 1), (1, 4)):
        sizes = {"run.batch_size": size, "run.accumulation": accumulation}
        config = train_tiny(runs["sdxl"].base, split, tmp_path / str(size), {**start, **sizes}).config
        found[size] = gradients(checkpoint(config, STEPS + 1))
    assert float(found[4].norm()) > 0
    assert difference(found[1], found[4]) < 1e-4


def test_gradients_are_clipped_and_their_norm_is_logged_before(
    runs: dict[str, Run], split: Path, tmp_path: Path
) -> None:
    found = runs["v"]
    start = {"run.resume": str(checkpoint(found.config, STEPS)), "run.steps": STEPS + 1}
    free = train_tiny(found.base, split, tmp_path / "free", start).config
    clipped = train_tiny(found.base, split, tmp_path / "clipped", {**start, "optimizer.max_grad_norm": 0.01}).config
    norm = float(gradients(checkpoint(free, STEPS + 1)).norm())
    assert norm > 0.02
    assert float(gradients(checkpoint(clipped, STEPS + 1)).norm()) == pytest.approx(0.01, rel=1e-3)
    for config in (free, clipped):
        assert metrics(config)[-1]["gradient_norm"] == pytest.approx(norm, rel=1e-4)


def test_with_a_moving_average_the_adapter_is_the_average(bases: dict[str, Base], split: Path, tmp_path: Path) -> None:
    config = train_tiny(bases["sd"], split, tmp_path / "run", {"optimizer.ema_decay": 0.15}).config
    average: dict[str, Tensor] = {}
    for step in range(1, STEPS + 1):
        weights = load_file(checkpoint(config, step) / "model.safetensors")
        weights = {name.removeprefix("adapter."): tensor for name, tensor in weights.items()}
        # diffusers' warm-up: the first step is taken over whole, then (1 + n) / (10 + n) up to the decay.
        decay = 0.0 if step == 1 else min(0.15, step / (step + 9))
        average = {name: decay * average.get(name, tensor) + (1 - decay) * tensor for name, tensor in weights.items()}
        saved = load_file(checkpoint(config, step) / "adapter.safetensors")
        assert saved.keys() == average.keys()
        for name, tensor in average.items():
            assert torch.allclose(saved[name].float(), tensor, rtol=1e-5, atol=1e-7), (step, name)
    result = load_file(adapter_file(config))
    assert all(torch.equal(result[name], saved[name]) for name in saved)
    assert not torch.allclose(result["sites.0.to_v_user.weight"].float(), weights["sites.0.to_v_user.weight"])


def test_gradient_checkpointing_runs_the_reference_along_and_gives_nearly_the_same_weights(
    runs: dict[str, Run], split: Path, tmp_path: Path
) -> None:
    found = train_tiny(runs["sdxl"].base, split, tmp_path / "run", {"model.gradient_checkpointing": True})
    pictures = 2 * found.config.run.batch_size
    micro_batches = STEPS * found.config.run.accumulation
    assert runs["sdxl"].unet_calls == [(pictures, False), (pictures, True)] * micro_batches
    assert found.unet_calls == [(2 * pictures, True)] * micro_batches
    ours, theirs = (load_file(adapter_file(run.config)) for run in (found, runs["sdxl"]))
    for name, tensor in theirs.items():
        # Not each number: Adam's first steps are as long for gradients that are mostly rounding.
        assert float((ours[name] - tensor).float().norm()) <= 1e-2 * float(tensor.float().norm()), name
    for one, other in zip(metrics(found.config), metrics(runs["sdxl"].config), strict=True):
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-2)
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-3)


def test_adafactor_in_bf16_trains_float32_weights(bases: dict[str, Base], split: Path, tmp_path: Path) -> None:
    settings = {
        "optimizer.kind": "adafactor",
        "optimizer.betas": (0.9, 0.999),
        "model.dtype": "bf16",
        "optimizer.learning_rate": 1e-3,
    }
    found = train_tiny(bases["sdxl"], split, tmp_path / "run", settings)
    assert found.trainer is not None
    assert found.trainer.policy.unet.dtype == torch.bfloat16
    state = optimizer_state(checkpoint(found.config, STEPS))
    assert any("exp_avg_sq_row" in values for values in state.values())
    tensors = [value for values in state.values() for value in values.values() if isinstance(value, Tensor)]
    weights = [load_file(checkpoint(found.config, step) / "model.safetensors") for step in (1, STEPS)]
    assert {tensor.dtype for tensor in (*tensors, *weights[1].values())} == {torch.float32}
    assert metrics(found.config)[0]["loss"] == float(torch.tensor(2.0).log())
    # The learning rate is ours: Adafactor's steps are at most this long (root mean square).
    for name in weights[0]:
        if not name.startswith("adapter.embedding_"):
            moved = (weights[1][name] - weights[0][name]).square().mean().sqrt()
            assert 0 < float(moved) < 2.1e-3, name
