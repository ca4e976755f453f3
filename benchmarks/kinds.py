"""What each way to add a user costs in a step: the three kinds of adapter, and what they save.

The layers are those of SD1.5 at 512 pixels and of SDXL at 1024, with classifier-free guidance. What a method adds is
counted and timed alone, layer by layer, and set against a whole step of the UNet: in a step's own time the smallest of
these shares would drown in noise. On a CUDA device it is timed there, in float16, else on the CPU in float32.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import comfy.model_detection
import comfy.ops
import torch
import torch.nn.functional as F
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from rich.progress import track
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from comfyui_psa.adapter import GatedSpec, SiteGate, find_sites
from comfyui_psa.training.synthetic import SD15, SDXL, UNetShape, random_weights, unet_shapes

ROUNDS = 5
IMAGE_TOKENS = 4  # of an IPAdapter
GATED = GatedSpec()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float16 if DEVICE.type == "cuda" else torch.float32
REPEATS = 50 if DEVICE.type == "cuda" else 1  # a GPU is not waited for after each layer

# A method at one layer: what comes out of attention and what went in, ``[2, positions, hidden]``, and their heads.
Added = Callable[[Tensor, Tensor], Tensor]


class OperationCounter(TorchDispatchMode):
    """Counts what is computed: every operation that is no view (``_unsafe_view`` is one, though not marked so)."""

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and run one operation."""
        self.count += not (func.is_view or func is torch.ops.aten._unsafe_view.default)
        return func(*args, **(kwargs or {}))


class Layer(NamedTuple):
    """A cross-attention layer: its positions in a latent, its width, its heads, the width of the text."""

    positions: int
    hidden: int
    heads: int
    text_dim: int


class Cost(NamedTuple):
    """What a method adds to a step: operations per layer, FLOPs, seconds."""

    operations: float
    flops: int
    seconds: float


class Base(NamedTuple):
    """A UNet at its own resolution: its layers, and what a step costs without a user."""

    name: str
    layers: tuple[Layer, ...]
    flops: int
    seconds: float


def constant(layer: Layer) -> Added:
    """One vector, the same for every position."""
    vector = torch.randn(2, 1, layer.hidden)
    return lambda out, n: out + vector


def gated(layer: Layer) -> Added:
    """Two matrices and a softmax, for the conditional half."""
    columns = GATED.heads * GATED.num_tokens
    gate = SiteGate(torch.randn(layer.hidden, columns), torch.randn(columns, layer.hidden), torch.zeros(GATED.heads))
    places = torch.tensor([0])
    return lambda out, n: out.index_add(0, places, gate(n[places]))


def gated_unfolded(layer: Layer) -> Added:
    """The same attention written out: a query projection, keys, values and a sink, and an output projection."""
    inner = GATED.heads * GATED.head_dim
    to_q, to_k = nn.Linear(layer.hidden, inner, bias=False), nn.Linear(GATED.token_dim, inner, bias=False)
    to_v, to_out = nn.Linear(GATED.token_dim, layer.hidden, bias=False), nn.Linear(layer.hidden, layer.hidden)
    user, sink = torch.randn(1, GATED.num_tokens, GATED.token_dim), torch.zeros(1, GATED.heads, 1, 1)
    places = torch.tensor([0])

    def add(out: Tensor, n: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (GATED.heads, -1)).transpose(1, 2) for part in (to_q(n[places]), to_k(user), to_v(user))
        )
        scores = query @ key.transpose(-1, -2) * GATED.head_dim**-0.5
        scores = torch.cat((scores, sink.expand(*scores.shape[:-1], 1)), dim=-1)
        attended = scores.softmax(dim=-1)[..., :-1] @ value
        return out.index_add(0, places, to_out(attended.transpose(1, 2).flatten(2)))

    return add


def like_ip_adapter(layer: Layer) -> Added:
    """A second attention in every step: keys and values of image tokens, for both halves, then a weighted sum."""
    to_k, to_v = (nn.Linear(layer.text_dim, layer.hidden, bias=False) for _ in range(2))
    image, blank = torch.randn(2, 1, IMAGE_TOKENS, layer.text_dim)

    def heads(part: Tensor) -> Tensor:
        return part.unflatten(-1, (layer.heads, -1)).transpose(1, 2)

    def add(out: Tensor, query: Tensor) -> Tensor:
        keys = torch.cat([to_k(image), to_k(blank)])
        values = torch.cat([to_v(image), to_v(blank)])
        attended = F.scaled_dot_product_attention(heads(query), heads(keys), heads(values))
        return out + attended.transpose(1, 2).flatten(2) * 0.7

    return add


METHODS: dict[str, Callable[[Layer], Added] | None] = {
    "`constant` (the paper)": constant,
    "`gated`": gated,
    "`gated`, not folded": gated_unfolded,
    "`text`": None,
    "like an IPAdapter": like_ip_adapter,
}


@torch.no_grad()
def measure_base(name: str, shape: UNetShape, latent: int, head_options: dict[str, int], timed: bool) -> Base:
    """Count a step of a ComfyUI UNet on the meta device, and time one with random weights."""
    shapes = dict(unet_shapes(shape))
    config = comfy.model_detection.detect_unet_config({k: torch.empty(v, device="meta") for k, v in shapes.items()}, "")
    config = {**config, **head_options, "dtype": DTYPE, "operations": comfy.ops.disable_weight_init}

    def step() -> tuple[UNetModel, Callable[[], Tensor]]:
        unet = UNetModel(**config).eval()
        x, t = torch.randn(2, 4, latent, latent), torch.ones(2)
        text = torch.randn(2, 77, shape.context_dim)
        y = torch.randn(2, shape.adm_channels) if shape.adm_channels else None
        return unet, lambda: unet(x, t, context=text, y=y)

    with defaults(torch.device("meta")):
        unet, run = step()
    layers: list[Layer] = []
    for site in find_sites(unet):
        attention = unet.get_submodule(site.path)
        attention.register_forward_pre_hook(
            lambda module, args: layers.append(
                Layer(args[0].shape[1], args[0].shape[2], module.heads, shape.context_dim)
            )
        )
    with FlopCounterMode(display=False) as counter, defaults(torch.device("meta")):
        run()
    seconds = float("nan")
    if timed:
        with defaults(DEVICE):
            unet, run = step()
        unet.load_state_dict(random_weights(iter(shapes.items()), torch.Generator().manual_seed(0)))
        seconds = _fastest(run, 2)
    return Base(name, tuple(layers), counter.get_total_flops(), seconds)


@torch.no_grad()
def measure(method: Callable[[Layer], Added] | None, layers: tuple[Layer, ...]) -> Cost:
    """Add up what a method costs at all layers."""
    if method is None:  # it is not in the UNet: see the settings' table for what it costs besides
        return Cost(0, 0, 0)
    operations, flops, seconds = 0, 0, 0.0
    for layer, times in Counter(layers).items():
        with defaults(DEVICE):
            add = method(layer)
            out, n = torch.randn(2, 2, layer.positions, layer.hidden)
        # Outside of the block: a default device costs every operation some microseconds.
        seconds += _fastest(partial(add, out, n), ROUNDS, REPEATS) * times
        with OperationCounter() as counter:
            add(out, n)
        with FlopCounterMode(display=False) as flop_counter:
            add(out, n)
        operations += counter.count * times
        flops += flop_counter.get_total_flops() * times
    return Cost(operations / len(layers), flops, seconds)


def _fastest(run: Callable[[], Any], rounds: int, repeats: int = 1) -> float:
    """Return the seconds of one run, of the fastest of several rounds."""
    seconds = []
    for _ in range(rounds):
        _wait()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        _wait()
        seconds.append((time.perf_counter() - start) / repeats)
    return min(seconds)


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def defaults(device: torch.device) -> Iterator[None]:
    """Within the block, make tensors and modules on ``device``, in the precision that is measured."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def table(timed: bool = True) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    bases = (
        ("SD1.5, 512 px", SD15, 64, {"num_heads": 8, "num_head_channels": -1}),
        ("SDXL, 1024 px", SDXL, 128, {"num_heads": -1, "num_head_channels": 64}),
    )
    yield "| base | method | operations per layer | FLOPs of a step | time of a step |"
    yield "| --- | --- | --- | --- | --- |"
    for arguments in track(bases, "Kinds"):
        base = measure_base(*arguments, timed)
        yield f"| {base.name} | none | | {base.flops / 1e12:.2f} T | {base.seconds:.3g} s |"
        for name, method in METHODS.items():
            cost = measure(method, base.layers)
            share = f"+{cost.flops / base.flops:.2%} | +{cost.seconds / base.seconds:.2%}"
            yield f"| {base.name} | {name} | {cost.operations:g} | {share} |"
