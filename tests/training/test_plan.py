"""``--dry-run``: parameter counts against the method's, memory against what a real step really keeps."""

from __future__ import annotations

import io
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import write_sd_pipeline, write_sdxl_pipeline
from rich.console import Console
from torch import Tensor, nn

from comfyui_psa.adapter import AdapterConfig, EncoderSpec, PSAAdapter, find_sites
from comfyui_psa.training.base import BaseModel, open_base
from comfyui_psa.training.config import OptimizerSection, TrainConfig, load_config
from comfyui_psa.training.dpo.denoising import PairBatch
from comfyui_psa.training.dpo.loss import diffusion_dpo_loss
from comfyui_psa.training.dpo.optimizers import make_optimizer
from comfyui_psa.training.dpo.plan import Memory, plan, to_toml
from comfyui_psa.training.dpo.policy import DTYPES, Policy
from comfyui_psa.training.dpo.trainable import TrainableAdapter

SD15: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


class Described:
    """A base model of full size that is nothing but a description: there are no weights to allocate."""

    latent_channels = 4
    vae_scale_factor = 8
    scheduler_config: Mapping[str, Any] = {}

    def __init__(self, unet: Mapping[str, Any]) -> None:
        self.unet_config = unet


def described(unet: Mapping[str, Any]) -> BaseModel:
    return BaseModel(Path("described"), Described(unet))  # type: ignore[arg-type]


def configuration(**sections: dict[str, Any]) -> TrainConfig:
    needed: dict[str, dict[str, Any]] = {"model": {"base": "base"}, "data": {"train": "train"}}
    return TrainConfig.model_validate(
        {name: needed.get(name, {}) | sections.get(name, {}) for name in needed | sections}
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseModel]:
    folder = tmp_path_factory.mktemp("bases")
    write_sd_pipeline(folder / "sd")
    write_sdxl_pipeline(folder / "sdxl")
    return {name: open_base(folder / name) for name in ("sd", "sdxl")}


@pytest.mark.parametrize(
    ("unet", "unet_parameters", "values", "projection"),
    [
        (SD15, 859_520_964, 19_169_280 // 2, 2_754_816),
        (SDXL, 2_567_463_684, 340_787_200 // 2, 7_346_176),
    ],
)
def test_published_sizes(unet: dict[str, Any], unet_parameters: int, values: int, projection: int) -> None:
    """docs of the method: parameters of the published adapters, half of the first term being dead keys."""
    found = plan(configuration(), described(unet), 1, embedding_dim=3584)
    assert found.unet_parameters == unet_parameters
    assert found.adapter_parameters == values + projection
    assert found.memory.unet == 2 * unet_parameters  # bf16
    assert found.memory.adapter == 4 * found.adapter_parameters  # float32 whatever the UNet is


def test_activations_grow_with_pairs_and_shrink_with_checkpointing() -> None:
    def memory(pairs: int, checkpointing: bool) -> Memory:
        config = configuration(model={"gradient_checkpointing": checkpointing}, run={"batch_size": pairs})
        return plan(config, described(SD15), 1, 3584).memory

    one, three, saved = memory(1, False), memory(3, False), memory(3, True)
    assert three.activations == pytest.approx(3 * one.activations, rel=0.001)
    assert (one.recomputed, three.recomputed) == (0, 0)
    assert saved.activations + saved.recomputed < 0.5 * three.activations
    assert saved.unet == three.unet
    assert saved.total == sum(vars(saved).values())


class Box:
    """Holds a tensor for autograd, so that it can be seen when autograd lets it go."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Measured:
    """What autograd really holds of a real forward pass: distinct storages, without ``known`` ones."""

    def __init__(self, known: list[Tensor]) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._boxes: list[weakref.ref[Box]] = []

    def __enter__(self) -> Measured:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda box: box.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        boxes = [box for box in (reference() for reference in self._boxes) if box is not None]
        storages = {box.tensor.untyped_storage().data_ptr(): box.tensor.untyped_storage() for box in boxes}
        return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in self._known)

    def _pack(self, tensor: Tensor) -> Box:
        box = Box(tensor)
        self._boxes.append(weakref.ref(box))
        return box


def real_adapter(unet: nn.Module, embedding_dim: int) -> PSAAdapter:
    sites = find_sites(unet)
    config = AdapterConfig(
        hidden_sizes=tuple(site.hidden_size for site in sites),
        cross_attention_dim=sites[0].cross_attention_dim,
        embedding_dim=embedding_dim,
        encoder=EncoderSpec(kind="attributes", name="attributes-1"),
    )
    return PSAAdapter(config)


def real_batch(base: BaseModel, pairs: int, size: int, embedding_dim: int) -> PairBatch:
    chosen, rejected, noise = torch.randn(3, pairs, 4, size, size)
    return PairBatch(
        rows=tuple(range(pairs)),
        chosen=chosen,
        rejected=rejected,
        noise=noise,
        timesteps=torch.randint(1000, (pairs,)),
        text=torch.randn(pairs, 77, base.unet_config["cross_attention_dim"]),
        embedding=torch.randn(pairs, embedding_dim),
        dropped=torch.tensor([True, False])[:pairs],
        pooled=torch.randn(pairs, 16) if base.is_sdxl else None,
        time_ids=torch.full((pairs, 6), 64.0) if base.is_sdxl else None,
    )


@pytest.mark.parametrize(("checkpointing", "noises"), [(False, 0), (True, 0), (True, 2)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_activations_are_what_a_real_step_keeps(
    bases: dict[str, BaseModel], family: str, dtype: str, checkpointing: bool, noises: int
) -> None:
    base, pairs, dim = bases[family], 2, 10
    config = configuration(
        model={"dtype": dtype, "gradient_checkpointing": checkpointing},
        data={"resolution": 64},
        run={"batch_size": pairs},
        loss={"noises_per_pair": noises},
    )
    estimate = plan(config, base, 1, dim).memory

    unet = base.unet(DTYPES[dtype])
    adapter = real_adapter(unet, dim)
    policy = Policy(unet, base.noise_scheduler(), adapter)
    policy.checkpoint_gradients(config.model)
    batch = real_batch(base, pairs, 8, dim)
    known = [*unet.parameters(), *unet.buffers(), *adapter.parameters(), *adapter.buffers()]
    reference = policy.reference_errors(batch) if noises else None  # which would be remembered
    with Measured(known) as measured, policy.compared_errors(TrainableAdapter(adapter), batch, reference) as errors:
        loss = diffusion_dpo_loss(*errors, 5000.0).loss.mean()
    found = measured.bytes
    assert loss.requires_grad
    # In bfloat16 CUDA, and so the estimate, keeps the statistics of norms in float32; the CPU does not.
    assert estimate.activations == (found if dtype == "fp32" else pytest.approx(found, rel=0.005))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_recomputed_is_the_largest_layer_alone(bases: dict[str, BaseModel], family: str) -> None:
    """Every layer that diffusers checkpoints, run by itself on the inputs that it gets in a real step."""
    base, pairs, dim = bases[family], 1, 10
    config = configuration(
        model={"dtype": "fp32", "gradient_checkpointing": True}, data={"resolution": 64}, run={"batch_size": pairs}
    )
    unet = base.unet(torch.float32)
    adapter = real_adapter(unet, dim)
    policy = Policy(unet, base.noise_scheduler(), adapter)
    weights = [*unet.parameters(), *unet.buffers()]
    sizes = []

    def layer(module: nn.Module, *args: Any) -> Any:
        inputs = [arg for arg in args if isinstance(arg, Tensor)]
        with Measured([*weights, *inputs]) as measured:
            result = module(*args)
        sizes.append(measured.bytes)
        return result

    unet.enable_gradient_checkpointing(layer)
    with policy.errors(TrainableAdapter(adapter), real_batch(base, pairs, 8, dim)):
        pass
    estimate = plan(config, base, 1, dim).memory
    assert max(sizes) > 0
    assert estimate.recomputed == max(sizes)


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_optimizer_state_is_that_of_the_real_optimizer(bases: dict[str, BaseModel], kind: str) -> None:
    section = OptimizerSection.model_validate({"kind": kind})
    adapter = real_adapter(bases["sd"].empty_unet(), 10)
    optimizer = make_optimizer(adapter.parameters(), section, torch.device("cpu"))
    for parameter in adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    measured = sum(value.nbytes for value in states if isinstance(value, Tensor) and value.ndim > 0)
    found = plan(configuration(optimizer={"kind": kind}), bases["sd"], 1, 10).memory
    assert found.optimizer == measured


def test_8_bit_adamw_is_that_of_bitsandbytes(bases: dict[str, BaseModel]) -> None:
    """Its own step, on a CPU, in place of the CUDA device that the trainer wants for it."""
    section = OptimizerSection.model_validate({"kind": "adamw8bit", "learning_rate": 1e-2, "betas": [0.8, 0.9]})
    weight = nn.Parameter(torch.ones(64, 128))  # it leaves small tensors in 32 bits
    before = weight.detach().clone()
    optimizer = make_optimizer([weight], section, torch.device("cuda"))
    weight.grad = torch.linspace(-1, 1, weight.numel()).reshape(weight.shape)
    optimizer.step()
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    state = optimizer.state[weight]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    # AdamW's first step is the learning rate, against the gradient's sign.
    assert torch.allclose(weight, before - 1e-2 * weight.grad.sign(), atol=2e-3)


def test_adapter_side_of_memory(bases: dict[str, BaseModel]) -> None:
    adapter = real_adapter(bases["sd"].empty_unet(), 10)
    size = 4 * sum(parameter.numel() for parameter in adapter.parameters())
    alone = plan(configuration(), bases["sd"], 1, 10).memory
    assert (alone.adapter, alone.gradients, alone.optimizer, alone.moving_average) == (size, size, 2 * size, 0)
    eight_bit = plan(configuration(optimizer={"kind": "adamw8bit", "ema_decay": 0.99}), bases["sd"], 4, 10).memory
    # Of several ranks each sends its gradients from buckets of the same size.
    assert (eight_bit.gradients, eight_bit.optimizer, eight_bit.moving_average) == (2 * size, size // 2, size)


def test_steps_pairs_and_epochs(bases: dict[str, BaseModel]) -> None:
    config = configuration(run={"steps": 300, "batch_size": 3, "accumulation": 4})
    found = plan(config, bases["sd"], ranks=2, embedding_dim=10, pairs=1200)
    assert (found.steps, found.pairs_per_step, found.epochs) == (300, 24, 6.0)
    assert plan(config, bases["sd"], ranks=2, embedding_dim=10).epochs is None


def test_unknown_embeddings_are_assumed_to_be_the_papers(bases: dict[str, BaseModel]) -> None:
    assumed, known = plan(configuration(), bases["sd"], 1, None), plan(configuration(), bases["sd"], 1, 3584)
    assert assumed.adapter_parameters == known.adapter_parameters
    assert "assumed" in printed(assumed)
    assert "assumed" not in printed(known)


def test_print_shows_configuration_counts_steps_and_memory(bases: dict[str, BaseModel]) -> None:
    config = configuration(model={"base": "models/[sd] 1.5.safetensors"}, run={"steps": 1234, "batch_size": 2})
    found = plan(config, bases["sd"], 2, 10, pairs=617)
    text = printed(found)
    assert "models/[sd] 1.5.safetensors: an unnamed UNet (16 cross-attention layers, text width 24)" in text
    for part in ("[optimizer]", f"{found.unet_parameters:,} parameters, frozen", "1,234", "8 over 617 pairs"):
        assert part in text
    assert f"{found.memory.total / 1e9:.3f} GB" in text
    assert "moving average" not in text


def printed(found: object) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(found)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_toml_gives_the_same_configuration(tmp_path: Path) -> None:
    config = configuration(
        model={"base": 'C:\\models\\sd "15".safetensors', "compile": True},
        data={"embeddings": "übung", "encoder": {"kind": "llm", "name": "owner/model", "folders": ["a", "b"]}},
        optimizer={"learning_rate": 1.25e-7, "betas": [0.5, 0.25]},
        run={"resume": "latest", "seed": -3},
        validation={"grid_prompts": ["two\nlines\ttab \x7f", "日本 😀"], "grid_users": ["0000012"]},
    )
    (tmp_path / "plan.toml").write_text(to_toml(config), encoding="utf-8")
    assert load_config(tmp_path / "plan.toml") == config
