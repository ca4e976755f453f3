"""``--dry-run``: what a run would be, what it trains and how much memory it needs, without allocating any.

Activations are not guessed: the training step itself runs on the meta device, and what autograd keeps is added up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from rich.console import Group
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from ...adapter import EncoderSpec, PSAAdapter
from ..base import BaseModel
from ..config import OptimizerSection, TrainConfig
from .denoising import PairBatch
from .loss import PairErrors, diffusion_dpo_loss
from .policy import DTYPES, Policy
from .recomputation import Recomputation
from .trainable import TrainableAdapter, new_adapter_config

PAPER_EMBEDDING_DIM = 3584
_TEXT_TOKENS = 77
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Memory:
    """Bytes on one training device at the peak of a step.

    ``activations`` is what autograd keeps for the backward pass; ``recomputed`` is what gradient checkpointing
    makes again for its largest layer. Workspaces of kernels and the device's own context come on top.
    """

    unet: int
    adapter: int
    gradients: int
    optimizer: int
    moving_average: int
    activations: int
    recomputed: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Plan:
    """A run before it starts; rich prints it.

    ``configuration`` is TOML. ``pairs`` is the number of training pairs, None if nobody has counted them;
    ``embedding_dim`` is the paper's where ``embedding_dim_known`` is false.
    """

    configuration: str
    base: str
    unet_parameters: int
    adapter_parameters: int
    embedding_dim: int
    embedding_dim_known: bool
    steps: int
    pairs_per_step: int
    pairs: int | None
    memory: Memory

    @property
    def epochs(self) -> float | None:
        """How often the run sees each pair, if the number of pairs is known."""
        return self.steps * self.pairs_per_step / self.pairs if self.pairs else None

    def __rich__(self) -> Group:
        """Return the configuration and two tables."""
        assumed = "" if self.embedding_dim_known else ", assumed: the encoder's is not known yet"
        run = _table("Run")
        run.add_row("base", escape(self.base))
        run.add_row("UNet", f"{self.unet_parameters:,} parameters, frozen")
        run.add_row("adapter", f"{self.adapter_parameters:,} parameters, trained")
        run.add_row("user embeddings", f"{self.embedding_dim:,} numbers{assumed}")
        run.add_row("optimizer steps", f"{self.steps:,}")
        run.add_row("pairs per step", f"{self.pairs_per_step:,}")
        if self.epochs is not None:
            run.add_row("epochs", f"{self.epochs:.4g} over {self.pairs:,} pairs, those of the validation included")
        memory = _table("Memory per device, estimated")
        for label, size in self._memory_rows():
            memory.add_row(label, f"{size / 1e9:.3f} GB")
        memory.add_row("together", f"{self.memory.total / 1e9:.3f} GB", style="bold")
        note = "Workspaces of kernels and the device's own context come on top."
        return Group(Syntax(self.configuration, "toml", background_color="default"), run, "", memory, note)

    def _memory_rows(self) -> list[tuple[str, int]]:
        memory = self.memory
        rows = [
            ("UNet weights", memory.unet),
            ("adapter weights", memory.adapter),
            ("adapter gradients", memory.gradients),
            ("optimizer state", memory.optimizer),
            ("moving average", memory.moving_average),
            ("activations", memory.activations),
            ("recomputed layer", memory.recomputed),
        ]
        return [(label, size) for label, size in rows if size]


def plan(config: TrainConfig, base: BaseModel, ranks: int, embedding_dim: int | None, pairs: int | None = None) -> Plan:
    """Work out a run on ``ranks`` devices; nothing is loaded and nothing allocated.

    ``embedding_dim`` is the width of user embeddings, by default the paper's; ``pairs`` the number of training pairs.

    Raises:
        AdapterError: the base model has no cross-attention that an adapter could act on.
    """
    unet = base.empty_unet().type(DTYPES[config.model.dtype])
    dim = embedding_dim or PAPER_EMBEDDING_DIM
    adapter = _empty_adapter(config, base, dim)
    size = _bytes(adapter.parameters())
    activations, recomputed = _activations(config, base, unet, adapter)
    section = config.optimizer
    return Plan(
        configuration=to_toml(config),
        base=f"{config.model.base}: {adapter.config.describe_base()}",
        unet_parameters=_count(unet),
        adapter_parameters=_count(adapter),
        embedding_dim=dim,
        embedding_dim_known=embedding_dim is not None,
        steps=config.run.steps,
        pairs_per_step=config.run.batch_size * config.run.accumulation * ranks,
        pairs=pairs,
        memory=Memory(
            unet=_bytes(unet.parameters()),
            adapter=size,
            # Data parallelism keeps a second copy in the buckets that it sends.
            gradients=size * (2 if ranks > 1 else 1),
            optimizer=_optimizer_bytes(section, adapter),
            moving_average=size if section.ema_decay else 0,
            activations=activations,
            recomputed=recomputed,
        ),
    )


def to_toml(config: TrainConfig) -> str:
    """Return the whole configuration as TOML, defaults included; ``load_config`` reads the same one from it."""
    return "\n\n".join(_toml_tables(config.model_dump(mode="json"), ())) + "\n"


def _toml_tables(values: Mapping[str, Any], path: tuple[str, ...]) -> Iterable[str]:
    lines = [f"[{'.'.join(path)}]"] if path else []
    inner = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    # TOML has no null: what is None is left out, and None is what leaving it out means.
    lines += [
        f"{name} = {_toml_value(value)}" for name, value in values.items() if name not in inner and value is not None
    ]
    if lines:
        yield "\n".join(lines)
    for name, table in inner.items():
        yield from _toml_tables(table, (*path, name))


def _toml_value(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _empty_adapter(config: TrainConfig, base: BaseModel, embedding_dim: int) -> PSAAdapter:
    encoder = EncoderSpec(kind=config.data.encoder.kind, name=config.data.encoder.name)
    with torch.device("meta"):
        return PSAAdapter(new_adapter_config(config.adapter, base, embedding_dim, encoder))


def _optimizer_bytes(section: OptimizerSection, adapter: nn.Module) -> int:
    """AdamW keeps two moments; Adafactor the sums of rows and columns of each matrix, and vectors whole."""
    if section.kind == "adafactor":
        return _FLOAT * sum(sum(p.shape) if p.ndim == 2 else p.numel() for p in adapter.parameters())
    return 2 * _count(adapter) * (1 if section.kind == "adamw8bit" else _FLOAT)


def _activations(
    config: TrainConfig, base: BaseModel, unet: UNet2DConditionModel, adapter: PSAAdapter
) -> tuple[int, int]:
    """Run one training step's forward pass on the meta device; return Memory's ``activations`` and ``recomputed``."""
    policy = Policy(unet, base.noise_scheduler(), adapter)
    effects = TrainableAdapter(adapter)
    batch = _empty_batch(config, base, adapter)
    modules = (unet, adapter)
    kept = _Kept(_storage(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers()))
    # Of a compiled UNet: diffusers' checkpointing keeps as much as ours without the reference.
    policy.checkpoint_gradients(config.model.model_copy(update={"compile": False}))
    if policy.recomputation is not None:
        unet.enable_gradient_checkpointing(kept.checkpoint(policy.recomputation))
    known = PairErrors(*torch.empty((2, config.run.batch_size), device="meta"))
    reference = None if config.reference_runs_along else known
    with _FusedAttention(), kept.hooks(), policy.compared_errors(effects, batch, reference) as errors:
        diffusion_dpo_loss(*errors, config.loss.beta).loss.mean()
    return kept.bytes, kept.largest_layer


def _empty_batch(config: TrainConfig, base: BaseModel, adapter: PSAAdapter) -> PairBatch:
    n, size = config.run.batch_size, config.data.resolution // base.vae_scale_factor

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((n, *shape), dtype=dtype, device="meta")

    pooled = None if base.pooled_dim is None else empty(base.pooled_dim)
    time_ids = None if base.pooled_dim is None else empty(6)
    return PairBatch(
        rows=tuple(range(n)),
        chosen=empty(base.latent_channels, size, size),
        rejected=empty(base.latent_channels, size, size),
        noise=empty(base.latent_channels, size, size),
        timesteps=empty(dtype=torch.long),
        text=empty(_TEXT_TOKENS, adapter.config.cross_attention_dim),
        embedding=empty(adapter.config.embedding_dim),
        dropped=empty(dtype=torch.bool),
        pooled=pooled,
        time_ids=time_ids,
    )


class _Kept:
    """The storages that autograd keeps, each counted once, without those in ``known``."""

    def __init__(self, known: Iterable[int]) -> None:
        self._known = frozenset(known)
        self._tensors: dict[int, Tensor] = {}  # held, so that no other storage gets the same address
        self.largest_layer = 0

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._tensors.values())

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def checkpoint(self, recomputation: Recomputation) -> Callable[..., Tensor]:
        """Gradient checkpointing that also notes what the largest block keeps when it runs again."""

        def run(block: nn.Module, *args: Any) -> Tensor:
            inputs = [arg for arg in args if isinstance(arg, Tensor)]
            again = iter(recomputation.policy_share(inputs))
            inside = _Kept(self._known | set(self._tensors) | set(map(_storage, inputs)))
            with inside.hooks():
                block(*(next(again) if isinstance(arg, Tensor) else arg for arg in args))
            self.largest_layer = max(self.largest_layer, inside.bytes)
            return recomputation(block, *args)

        return run

    def _pack(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self._known:
            self._tensors.setdefault(_storage(tensor), tensor)
        return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _FusedAttention(TorchFunctionMode):
    """Attention as fused kernels do it on every device but meta, where torch would keep the whole matrix."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _keep_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _keep_attention(query: Tensor, key: Tensor, value: Tensor, *_options: Any, **_named: Any) -> Tensor:
    result: Tensor = _AttentionMemory.apply(query, key, value)
    return result


class _AttentionMemory(torch.autograd.Function):
    """Fused attention keeps query, key, value, output and one float per query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
    table.add_column(style="dim")
    table.add_column()
    return table


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
