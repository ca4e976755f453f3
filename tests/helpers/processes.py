"""Processes that begin with everything imported, which takes each of them ten seconds otherwise, and groups of them."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any


def forkserver() -> ForkServerContext:
    """What starts processes that have their imports already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["comfyui_psa.training.train", "interrupted_runs"])
    return context


def call_in_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call a function in processes that know each other, as those of `accelerate launch`; return what each returns."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(count):
        environment = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        ours, theirs = forkserver().Pipe(duplex=False)
        process = forkserver().Process(target=_call, args=(environment, theirs, function, arguments))
        process.start()
        theirs.close()
        started.append((process, ours))
    answers = [answer.recv() for _, answer in started]  # EOFError: the process has failed, and said why
    for process, _ in started:
        process.join()
    return answers


def _call(
    environment: dict[str, str], answer: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
    answer.send(function(*arguments))
