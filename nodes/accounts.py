"""Whose prompt it is: of this ComfyUI's own page or not, and of which account (``--multi-user``).

Each account has a private store of its own. Nodes cannot know who queued the prompt that they are part of. So every
request's account is noted while it is answered, and with every prompt that it queues. Whoever reaches the server can
claim to be any account: ComfyUI asks for no password. What is here keeps accounts apart; it does not defend them from
each other (docs/privacy.md).
"""

from __future__ import annotations

import threading
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

from aiohttp import web
from comfy.cli_args import args
from comfy_execution.utils import get_executing_context

from ..profiles import ProfileError
from .pages import foreign


class UnknownAccountError(ProfileError):
    """ComfyUI has accounts, and it is not known which one asks."""


_REMEMBERED = 10_000  # prompts; one that is forgotten fails

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

REFUSED = "refused: "  # in place of a reference, with the reason behind it


class _Asker(NamedTuple):
    """Whose request is answered: the account, if it is known, and why another page's is refused."""

    account: str | None = None
    refused: str | None = None


_NOBODY = _Asker()

_asker: ContextVar[_Asker] = ContextVar("psa_asker", default=_NOBODY)
_owners: OrderedDict[str, str | None] = OrderedDict()
_lock = threading.Lock()


def register(server: Any) -> None:
    """Begin to note who asks; ``server`` is ComfyUI's PromptServer, before it starts."""

    @web.middleware
    async def note(request: web.Request, handler: _Handler) -> web.StreamResponse:
        # Programs name no origin, and reach a server by whatever name; pages name theirs with every prompt.
        refused = foreign(request) if "Origin" in request.headers else None
        token = _asker.set(_Asker(_account(server, request), refused))
        try:
            return await handler(request)
        finally:
            _asker.reset(token)

    server.app.middlewares.append(note)
    server.add_on_prompt_handler(_drop_fingerprints)
    server.add_on_prompt_handler(_refuse_other_pages)
    if args.multi_user:
        server.add_on_prompt_handler(_note_prompt)


def _account(server: Any, request: web.Request) -> str | None:
    try:
        return str(server.user_manager.get_request_user_id(request)) if args.multi_user else None
    except KeyError:
        return None


def current_account() -> str | None:
    """Return the account whose request is answered, or whose prompt runs; None where ComfyUI has no accounts.

    Raises:
        UnknownAccountError: ComfyUI has accounts, and none of them asks.
    """
    if not args.multi_user:
        return None
    running = get_executing_context()
    with _lock:
        account = _owners.get(running.prompt_id) if running else _asker.get().account
    if account is None:
        raise UnknownAccountError(
            "This ComfyUI has accounts, and it is not known which of them asks, so nobody's profile can be "
            "used. Log in and try again; through the API, send the header comfy-user."
        )
    return account


def _refuse_other_pages(body: dict[str, Any]) -> dict[str, Any]:
    """Let no other page's prompt read a profile: its pictures and its history would tell of it.

    A handler cannot refuse a prompt, but the node can (``profile_nodes.py``).
    """
    problem = _asker.get().refused
    for node in _nodes(body) if problem else ():
        if node.get("class_type") == "PSAUserProfile":
            node["inputs"] = {"profile_id": f"{REFUSED}{problem}"}
    return body


def _nodes(body: dict[str, Any]) -> list[dict[str, Any]]:
    prompt = body.get("prompt")
    return [node for node in prompt.values() if isinstance(node, dict)] if isinstance(prompt, dict) else []


def _note_prompt(body: dict[str, Any]) -> dict[str, Any]:
    prompt_id = str(uuid.uuid4())  # never one that is sent along: somebody else's prompt may wait under it
    with _lock:
        _owners[prompt_id] = _asker.get().account
        while len(_owners) > _REMEMBERED:
            _owners.popitem(last=False)
    return {**body, "prompt_id": prompt_id}


def _drop_fingerprints(body: dict[str, Any]) -> dict[str, Any]:
    """Take out what ComfyUI would believe: a prompt from a picture's metadata carries the fingerprints of that run.

    With them, it would hand on what it has kept of a run under other boundaries.
    """
    for node in _nodes(body):
        if str(node.get("class_type")).startswith("PSA"):
            node.pop("is_changed", None)
    return body
