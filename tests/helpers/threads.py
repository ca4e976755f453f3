"""A call of the model in several threads, as packs for several GPUs make it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def in_threads(apply: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
    """Give each chunk of a call to a thread of its own: a wrapper around a model's ``apply_model``."""
    chunks = args["cond_or_uncond"]
    options = args["c"]["transformer_options"]
    results: dict[int, Tensor] = {}
    together = threading.Barrier(len(chunks))

    def one(i: int) -> None:
        with torch.no_grad():
            together.wait()
            results[i] = apply(
                args["input"].chunk(len(chunks))[i],
                args["timestep"].chunk(len(chunks))[i],
                c_crossattn=args["c"]["c_crossattn"].chunk(len(chunks))[i],
                transformer_options={**options, "cond_or_uncond": [chunks[i]], "uuids": [options["uuids"][i]]},
            )

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(chunks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat([results[i] for i in range(len(chunks))])
