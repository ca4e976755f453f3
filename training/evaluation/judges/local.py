"""A vision-language model on this machine, through transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from ....safe_files import DAMAGE
from ...base.fingerprints import fingerprint
from ..assess_config import LocalJudge
from ..gallery import Shown
from ..measures.measure import Missing
from . import questions
from .judge import JudgeStopped, Question

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LocalModel:
    """Asks a model for images and text, one question at a time, without sampling."""

    told = True

    def __init__(self, config: LocalJudge, device: torch.device) -> None:
        """Load the model and its processor; nothing is downloaded.

        Raises:
            Missing: there is no such folder, transformers cannot open it, or a Python package is not there.
        """
        if not config.model.is_dir():
            raise Missing(f"there is no folder {config.model} with a vision-language model: correct the judge's model")
        try:
            self._model = (
                AutoModelForImageTextToText.from_pretrained(
                    config.model, local_files_only=True, dtype=_DTYPES[config.dtype]
                )
                .eval()
                .to(device)
            )
            self._processor = AutoProcessor.from_pretrained(config.model, local_files_only=True)
        except ImportError as error:
            raise Missing(_lacking(config.model, error)) from None
        except DAMAGE as error:
            raise Missing(
                f"{config.model} holds no model for images and text that transformers can open "
                f"({error!r:.200}): put one there"
            ) from None
        self.name, self._config, self._device = config.name, config, device
        self.identity = f"local {_weights(config.model)} {config.dtype} {config.max_new_tokens}"

    def ask_fits(self, shown: Shown) -> Question:
        """Return the question about one picture."""
        return questions.ask_fits(shown)

    def ask_prefers(self, first: Shown, second: Shown) -> Question:
        """Return the question about two pictures."""
        return questions.ask_prefers(first, second)

    def answer(self, questions: Sequence[Question]) -> Iterator[str]:
        """Yield the model's answers; raise JudgeStopped where it cannot be run."""
        for question in questions:
            try:
                yield self._answer(question)
            except ImportError as error:
                raise JudgeStopped(_lacking(self._config.model, error)) from None
            except DAMAGE as error:
                raise JudgeStopped(
                    f"the model in {self._config.model} cannot be run ({error!r:.200}): try another dtype, "
                    "or a smaller model"
                ) from None

    @torch.no_grad()
    def _answer(self, question: Question) -> str:
        content: list[dict[str, Any]] = [{"type": "image", "image": _opened(path)} for path in question.images]
        content.append({"type": "text", "text": question.text})
        inputs = self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self._device, dtype=self._model.dtype)
        out = self._model.generate(**inputs, max_new_tokens=self._config.max_new_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        return str(self._processor.batch_decode(new, skip_special_tokens=True)[0])


def _lacking(folder: Path, error: ImportError) -> str:
    """Return in words which package a model needs; transformers names it in its message alone."""
    said = " ".join(str(error).split())
    return f"the model in {folder} needs a Python package that is not installed ({said:.200}): install it"


def _weights(folder: Path) -> str:
    return fingerprint(sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin")))


def _opened(path: Path) -> PIL.Image.Image:
    with PIL.Image.open(path) as image:
        return image.convert("RGB")
