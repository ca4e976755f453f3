"""What Apply PSA's settings cost in a step: several users, a mask, a schedule, two in a row; and a compiled model.

Each is set against the same batch without PSA, in one run with an adapter like IPAdapter's, whose layers have as many
weights as those of the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import torch
import torch._dynamo
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from comfy_api.torch_helpers import set_torch_compile_wrapper
from kinds import IMAGE_TOKENS, OperationCounter
from steps import sample, step_ratio
from torch import Tensor, nn
from torch._dynamo.utils import counters

from comfyui_psa.adapter import AdapterConfig, PSAAdapter, TextSpec, find_sites
from comfyui_psa.nodes.adapter_nodes import PSAApply
from comfyui_psa.profiles import SafetyEmbedding

STEPS = 3
USERS = (1, 2, 8)
CUDA = torch.cuda.is_available()
LATENT_SIZE = 64 if CUDA else 16
BACKEND = "inductor" if CUDA else "eager"  # what is counted is the same


def people(adapter: PSAAdapter, count: int, seed: int = 0) -> SafetyEmbedding:
    """Make embeddings of nobody in particular."""
    generator = torch.Generator().manual_seed(seed)
    return SafetyEmbedding(torch.randn(count, adapter.config.embedding_dim, generator=generator))


def applied(
    model: ModelPatcher, adapter: PSAAdapter, count: int = 1, seed: int = 0, strength: float = 1.0, **options: Any
) -> ModelPatcher:
    """Apply PSA for so many people."""
    (patched,) = PSAApply.execute(model, people(adapter, count, seed), strength, 0.0, 1.0, adapter, **options).args
    return patched


def on_text(adapter: PSAAdapter) -> PSAAdapter:
    """Make an adapter of the recommended form for the same base, with random weights."""
    own = adapter.config
    config = AdapterConfig(
        cross_attention_dim=own.cross_attention_dim,
        embedding_dim=own.embedding_dim,
        encoder=own.encoder,
        constant=False,
        text=TextSpec(form="mlp"),
        null="none",
    )
    made = PSAAdapter(config)
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.02)
    return made.eval()


def half() -> Tensor:
    """Return a mask of the left half."""
    mask = torch.zeros(1, LATENT_SIZE, LATENT_SIZE)
    mask[..., : LATENT_SIZE // 2] = 1
    return mask


def like_ip_adapter(model: ModelPatcher) -> ModelPatcher:
    """Take the ``attn2_replace`` slot of every layer, for keys and values of image tokens with weights of their own.

    In each step and for both halves, as ComfyUI_IPAdapter_plus has it.
    """
    device, dtype = comfy.model_management.get_torch_device(), model.model.get_dtype()
    patched = model.clone()
    for site in find_sites(model.model.diffusion_model):
        to_k, to_v = (
            nn.Linear(site.cross_attention_dim, site.hidden_size, bias=False, device=device, dtype=dtype)
            for _ in range(2)
        )
        image, blank = torch.randn(2, 1, IMAGE_TOKENS, site.cross_attention_dim, device=device, dtype=dtype)

        def replace(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            options: dict[str, Any],
            to_k: nn.Module = to_k,
            to_v: nn.Module = to_v,
            sources: tuple[Tensor, Tensor] = (image, blank),
        ) -> Tensor:
            chunks, heads = options["cond_or_uncond"], options["n_heads"]
            images = len(q) // len(chunks)
            keys, values = (
                torch.cat([layer(sources[min(chunk, 1)]).repeat(images, 1, 1) for chunk in chunks])
                for layer in (to_k, to_v)
            )
            return optimized_attention(q, k, v, heads) + optimized_attention(q, keys, values, heads) * 0.7

        patched.set_model_attn2_replace(replace, *site.key)
    return patched


def cost_table(base: ModelPatcher, adapter: PSAAdapter, pairs: int) -> Iterator[str]:
    """Yield the lines of a Markdown table: operations per layer, and step times as multiples of the same batch's
    without PSA."""
    sites = adapter.config.num_sites
    settings: dict[str, tuple[int, ModelPatcher]] = {"nothing (noise)": (1, base.clone())}
    for count in USERS:
        settings[f"{count} user{'s' if count > 1 else ''}, as many images"] = (count, applied(base, adapter, count))
    settings |= {
        "1 user, a mask": (1, applied(base, adapter, mask=half())),
        "1 user, a schedule": (1, applied(base, adapter, schedule="cosine")),
        "two Apply PSA in a row": (1, applied(applied(base, adapter), adapter, seed=1)),
        "the same, a half each": (
            1,
            applied(applied(base, adapter, mask=half()), adapter, seed=1, mask=1 - half()),
        ),
        "1 user, an adapter on the text side": (1, applied(base, on_text(adapter))),
        "like an IPAdapter": (1, like_ip_adapter(base)),
    }
    yield f"| {LATENT_SIZE * 8} px | operations added per layer and step | step time with it / without |"
    yield "| --- | --- | --- |"
    for name, (images, model) in settings.items():
        added = (operations(model, images) - operations(base, images)) / sites
        ratio = step_ratio(base, model, pairs, steps=STEPS, images=images, size=LATENT_SIZE)
        yield f"| {name} | {added:.3g} | {ratio} |"


def operations(model: ModelPatcher, images: int) -> int:
    """Count what one more step computes."""
    counts = []
    for steps in (1, 2):
        with OperationCounter() as counter:
            sample(model, steps, images=images, size=LATENT_SIZE)
        counts.append(counter.count)
    return counts[1] - counts[0]


def compile_table(base: ModelPatcher, adapter: PSAAdapter) -> Iterator[str]:
    """Yield the lines of a Markdown table: what the compiler counts, one run after the other."""

    def compiled(model: ModelPatcher) -> ModelPatcher:
        patched = model.clone()
        set_torch_compile_wrapper(patched, backend=BACKEND)
        return patched

    runs: dict[str, Callable[[], ModelPatcher]] = {
        "without PSA": lambda: base,
        "Apply PSA": lambda: applied(base, adapter),
        "another person": lambda: applied(base, adapter, seed=1),
        "another strength": lambda: applied(base, adapter, strength=0.4),
        "a schedule: another strength in each step": lambda: applied(base, adapter, schedule="cosine"),
        "strength 0 in the last steps": lambda: applied(base, adapter, strengths=[1.0, 0.0, 0.0, 0.0]),
        "a mask": lambda: applied(base, adapter, mask=half()),
        "another mask, person and strength": lambda: applied(base, adapter, seed=2, strength=0.7, mask=1 - half()),
    }
    torch._dynamo.reset()
    counters.clear()
    yield "| run after run, three steps each | graphs made | graph breaks |"
    yield "| --- | --- | --- |"
    graphs = 0
    for name, model in runs.items():
        sample(compiled(model()), STEPS, size=LATENT_SIZE)
        made = int(counters["stats"]["unique_graphs"])
        yield f"| {name} | {made - graphs} | {sum(counters['graph_break'].values())} |"
        graphs = made
