"""The ``llm`` encoder: a language model reads the filled template; its mean hidden state is the embedding.

The template is one user message of the model's chat template, with the generation prompt; nothing is
generated. The embedding is the mean of the last hidden state over all non-padding tokens, in float32
(arXiv 2508.01151). Models come from disk and are never downloaded.
"""

from __future__ import annotations

import gc
import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor, nn

from ...safe_files import DAMAGE
from ..errors import EncoderError
from ..schema import Profile
from ..template import fill_template

MaxMemory = dict[Any, int]

# What may follow a model's name in a GGUF file's: ".Q4_K_M.gguf", "-UD-Q4_K_XL.gguf", "-bf16.gguf", ".gguf".
_QUANTISATION = r"([.-](ud|i1|imat))?([.-](i?q\d\w*|b?f\d+|fp\d+|mxfp\d\w*))?(-\d+-of-\d+)?\.gguf"
_SPLIT = re.compile(r"-\d+-of-\d+\.gguf$", re.IGNORECASE)


class ModelHost(Protocol):
    """Where a language model runs. ComfyUI's nodes bring their own, which asks ComfyUI for the memory."""

    device: torch.device
    dtype: torch.dtype

    def make_room(self, size: int) -> MaxMemory | None:
        """Free memory for ``size`` bytes; return None if they fit, else a memory map for accelerate."""
        ...

    def hold(self, model: nn.Module) -> AbstractContextManager[None]:
        """Keep ``model`` on the device for the block, and take it off afterwards."""
        ...

    def release(self) -> None:
        """Give freed memory back to the device: the model is gone."""
        ...


class CPUHost:
    """Runs a model in main memory, in float32; what does not fit is read from disk layer by layer."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, max_memory: int | None = None) -> None:
        """Use at most ``max_memory`` bytes; by default what is free, less a reserve."""
        self._max_memory = max_memory

    def make_room(self, size: int) -> MaxMemory | None:
        """Return None if ``size`` bytes fit into memory, else the memory that there is."""
        limit = self._max_memory or int(psutil.virtual_memory().available * 0.9)
        return None if size <= limit else {"cpu": limit}

    def hold(self, model: nn.Module) -> AbstractContextManager[None]:
        """Nothing to do: the model lies in main memory already."""
        return nullcontext()

    def release(self) -> None:
        """Nothing to do: freed memory is free."""


@dataclass(frozen=True)
class LanguageModelFiles:
    """A local language model: a Hugging Face folder, or a GGUF file inside ``folder``."""

    folder: Path
    gguf_file: str | None = None

    @property
    def kwargs(self) -> dict[str, Any]:
        """What every ``from_pretrained`` call needs: this model, from disk only."""
        return {
            "pretrained_model_name_or_path": str(self.folder),
            "local_files_only": True,
            **({"gguf_file": self.gguf_file} if self.gguf_file else {}),
        }

    def fingerprint(self) -> str:
        """Return a text that changes when a file of the model is replaced."""
        paths = [self.folder / self.gguf_file] if self.gguf_file else sorted(self.folder.iterdir())
        stats = [(path.name, path.stat()) for path in paths if path.is_file()]
        return repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def find_language_model(name: str, folders: Sequence[Path]) -> LanguageModelFiles:
    """Find a model on disk by its name or hub id: ``<name>/``, ``<owner>/<name>/`` or ``<name>*.gguf``.

    Raises:
        EncoderError: it is in none of the folders; the message names the command that fetches it.
    """
    short = name.rsplit("/", 1)[-1]
    for root in folders:
        for folder in (root / name, root / short):
            if (folder / "config.json").is_file():
                return LanguageModelFiles(folder)
            if folder.is_dir() and (files := sorted(folder.glob("*.[gG][gG][uU][fF]"))):
                return _gguf(files)
        gguf = re.compile(re.escape(short) + _QUANTISATION, re.IGNORECASE)
        if files := sorted(path for path in root.glob("*.[gG][gG][uU][fF]") if gguf.fullmatch(path.name)):
            return _gguf(files)
    target = (folders[0] if folders else Path("models/LLM")) / short
    raise EncoderError(
        f"The adapter was trained with embeddings from the language model {name}, which is not on this machine: "
        f"expected the folder {target}, or a GGUF file {target.name}.gguf beside it. Nothing is downloaded by "
        f'itself. Fetch it with:  hf download {name} --local-dir "{target}"  or use Load Safety Embedding with an '
        "embedding made elsewhere."
    )


def _gguf(files: Sequence[Path]) -> LanguageModelFiles:
    whole = [path for path in files if not _SPLIT.search(path.name)]
    if not whole:
        raise EncoderError(
            f"The language model {files[0]} is split into parts, which transformers cannot read. Merge them into one "
            "GGUF file, or use the model's Hugging Face folder."
        )
    return LanguageModelFiles(whole[0].parent, whole[0].name)


def llm_identity(name: str, template: str) -> str:
    """Return the identity of embeddings from a model and a template, wherever the model lies."""
    return f"llm:{name.rsplit('/', 1)[-1]}:{hashlib.sha256(template.encode()).hexdigest()[:16]}"


class LanguageModelEncoder:
    """Encodes profiles with a local language model, which is in memory only while it encodes."""

    def __init__(self, name: str, template: str, files: LanguageModelFiles, host: ModelHost | None = None) -> None:
        """Use the model ``name`` that lies in ``files``; run it on ``host`` (by default the CPU)."""
        self.identity = llm_identity(name, template)
        self._template = template
        self._files = files
        self._host: ModelHost = host or CPUHost()

    def cache_key(self, profile: Profile) -> str:
        """Return a hash of the filled template, the identity, the model's files and the precision."""
        prompt = fill_template(self._template, profile)
        parts = (self.identity, self._files.fingerprint(), str(self._host.dtype), prompt)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def encode(self, profiles: Sequence[Profile]) -> Tensor:
        """Return float32 embeddings ``[len(profiles), hidden_size]``.

        Raises:
            EncoderError: the model has no chat template, cannot be read, or is too large for this machine.
        """
        return torch.cat(list(self.encode_batches(profiles)))

    def encode_batches(self, profiles: Sequence[Profile], batch_size: int = 8) -> Iterator[Tensor]:
        """Yield float32 embeddings ``[<= batch_size, hidden_size]`` in order; the model is loaded once for all.

        Raises:
            EncoderError: as ``encode``, before the first batch.
        """
        prompts = [fill_template(self._template, profile) for profile in profiles]
        if not prompts:
            return
        tokenizer = self._load_tokenizer()
        with self._readable():
            texts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
                )
                for prompt in prompts
            ]
        try:
            yield from self._batches(tokenizer, texts, batch_size)
        finally:
            gc.collect()
            self._host.release()

    def _batches(self, tokenizer: Any, texts: list[str], batch_size: int) -> Iterator[Tensor]:
        with self._model() as model:
            for start in range(0, len(texts), batch_size):
                # Inference mode ends before the batch is handed out: the clone is a tensor like any other.
                yield self._mean_hidden_state(model, tokenizer, texts[start : start + batch_size]).clone()

    @torch.inference_mode()
    def _mean_hidden_state(self, model: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
        # The chat template has set all special tokens already.
        tokens = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        tokens = {name: tokens[name].to(self._host.device) for name in ("input_ids", "attention_mask")}
        hidden = model(**tokens, use_cache=False).last_hidden_state.float()
        mask = tokens["attention_mask"].to(hidden)[..., None]
        return ((hidden * mask).sum(dim=1) / mask.sum(dim=1)).cpu()

    def _load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        with self._readable():
            tokenizer = AutoTokenizer.from_pretrained(**self._files.kwargs)
        if not tokenizer.chat_template:
            raise EncoderError(
                f"The language model in {self._files.folder} has no chat template: it is a base model. Use the "
                "instruction-tuned model that the adapter names."
            )
        # Padding to the right of a causal model never changes what stands before it.
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @contextmanager
    def _model(self) -> Iterator[nn.Module]:
        """Load the model without its head; it is off the host's device at the end of the block."""
        from transformers import AutoConfig, AutoModel

        with self._readable():
            config = AutoConfig.from_pretrained(**self._files.kwargs)
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())
        max_memory = self._host.make_room(parameters * self._host.dtype.itemsize)
        with tempfile.TemporaryDirectory(prefix="psa-offload-", ignore_cleanup_errors=True) as offload:
            kwargs = {**self._files.kwargs, "config": config, "dtype": self._host.dtype}
            if max_memory is not None:
                kwargs |= {"device_map": "auto", "max_memory": max_memory, "offload_folder": offload}
            with self._readable():
                model, info = AutoModel.from_pretrained(**kwargs, output_loading_info=True)
            if missing := sorted(info["missing_keys"]):
                # transformers fills them with random numbers.
                raise EncoderError(
                    f"The language model in {self._files.folder} is incomplete: {len(missing)} of its layers are "
                    f"missing ({missing[0]}, ...). It is damaged: fetch it again."
                )
            model.eval()
            with self._host.hold(model) if max_memory is None else nullcontext():
                yield model

    @contextmanager
    def _readable(self) -> Iterator[None]:
        from jinja2 import TemplateError

        damage: tuple[type[Exception], ...] = (*DAMAGE, TemplateError)
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            raise  # ComfyUI has its own answer to that
        except damage as error:
            what = self._files.gguf_file or f"The folder {self._files.folder}"
            raise EncoderError(
                f"{what} could not be read as a language model ({error}). It is damaged, not fully downloaded, or "
                "of a kind that this version of transformers does not know: fetch it again, or update transformers."
            ) from None
