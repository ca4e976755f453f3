"""The private store over HTTP, and what cards show, under ``/psa/``, for the page of whoever sits at this ComfyUI.

A web page that the artist visits must be able neither to read nor to change a profile: requests of other pages are
refused (``pages.py``), and what has a body has to be JSON, which a page cannot send elsewhere without being asked for
its origin.

The store waits for other programs and for the disk, so it works in a thread of its own.
"""

from __future__ import annotations

import json
from asyncio import to_thread
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from aiohttp import web

from ..adapter import AdapterConfig, AdapterError, load_adapter_config
from ..profiles import (
    CATEGORIES,
    ConflictError,
    Profile,
    ProfileError,
    StoredProfile,
    StoreError,
    UnknownProfileError,
    decide,
    levels,
    parse_profile,
)
from ..profiles.files import FORMAT, FORMAT_VERSION
from ..profiles.schema import GENDERS, MAX_AGE, MENTAL_CONDITIONS, PHYSICAL_CONDITIONS, RELIGIONS
from .accounts import UnknownAccountError
from .folders import ADAPTERS, find_file, missing_file, profile_store
from .pages import foreign

LARGEST_BODY = 64 * 1024  # bytes; a profile with the longest notes has a third of it

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def register(server: Any) -> None:
    """Add the routes; ``server`` is ComfyUI's PromptServer, before it starts."""
    for method, path, handler in (
        ("GET", "/psa/profiles", _list),
        ("POST", "/psa/profiles", _create),
        ("GET", "/psa/profiles/{id}", _read),
        ("PUT", "/psa/profiles/{id}", _save),
        ("DELETE", "/psa/profiles/{id}", _delete),
        ("POST", "/psa/profiles/{id}/activate", _activate),
        ("POST", "/psa/profiles/{id}/restore", _restore),
        ("POST", "/psa/preview", _preview),
        ("GET", "/psa/presets", _presets),
        ("GET", "/psa/adapter", _adapter),
    ):
        server.routes.route(method, path)(_guarded(handler))


async def _list(_request: web.Request) -> web.Response:
    """Names and ids; no attribute of anybody."""
    entries = await to_thread(profile_store().entries)
    return _answer({"profiles": [asdict(entry) for entry in entries]})


async def _create(request: web.Request) -> web.Response:
    profile = _profile(await _body(request, {"profile"}))
    return _answer(_described(await to_thread(profile_store().create, profile)), status=201)


async def _read(request: web.Request) -> web.Response:
    return _answer(_described(await to_thread(profile_store().read, request.match_info["id"])))


async def _save(request: web.Request) -> web.Response:
    """Replace the version that was read; without a revision, put back a profile that was deleted."""
    body = await _body(request, {"profile", "revision"})
    profile, revision, profile_id = _profile(body), body["revision"], request.match_info["id"]
    store = profile_store()
    if revision is None:
        return _answer(_described(await to_thread(store.put_back, profile_id, profile)), status=201)
    if not isinstance(revision, str):
        raise _refusal(web.HTTPBadRequest, "revision should be the text that came with the profile, or null.")
    read = StoredProfile(profile_id, revision, profile)
    return _answer(_described(await to_thread(store.save, read, profile)))


async def _delete(request: web.Request) -> web.Response:
    await to_thread(profile_store().delete, request.match_info["id"])
    return _answer({})


async def _activate(request: web.Request) -> web.Response:
    await _body(request, set())
    await to_thread(profile_store().activate, request.match_info["id"])
    return _answer({})


async def _restore(request: web.Request) -> web.Response:
    await _body(request, set())
    return _answer(_described(await to_thread(profile_store().restore, request.match_info["id"])))


async def _preview(request: web.Request) -> web.Response:
    """What would be banned, and why; nothing is stored."""
    return _answer({"decisions": _decisions(_profile(await _body(request, {"profile"})))})


async def _presets(_request: web.Request) -> web.Response:
    """Everything that an editor offers: the levels, and the paper's values."""
    return _answer(
        {
            "file": {"format": FORMAT, "format_version": FORMAT_VERSION},
            "categories": CATEGORIES,
            "genders": GENDERS,
            "religions": RELIGIONS,
            "physical_conditions": PHYSICAL_CONDITIONS,
            "mental_conditions": MENTAL_CONDITIONS,
            "max_age": MAX_AGE,
            "levels": [
                {
                    "id": level.id,
                    "label": level.label,
                    "profile": level.profile.model_dump(),
                    "decisions": _decisions(level.profile),
                }
                for level in levels()
            ],
        }
    )


async def _adapter(request: web.Request) -> web.Response:
    """What an adapter file says about itself, for the card on Apply PSA; the file is named as Load PSA Adapter does."""
    name = request.query.get("name", "")
    path = find_file(ADAPTERS, name)
    if path is None:
        raise AdapterError(missing_file("adapter", ADAPTERS, name))
    stat = path.stat()
    config = await to_thread(_adapter_config, path, stat.st_size, stat.st_mtime_ns)
    # Apply PSA refuses a model that has other layers.
    layers = len(config.hidden_sizes) if set(config.kinds) & {"constant", "gated"} else 0
    return _answer({"base": config.base_title, "kinds": config.kinds, "layers": layers, "encoder": config.encoder.name})


@lru_cache(maxsize=64)
def _adapter_config(path: Path, _size: int, _changed: int) -> AdapterConfig:
    """Read a file once: of a release, whole tensors are read for a few words."""
    return load_adapter_config(path)


def _described(stored: StoredProfile) -> dict[str, Any]:
    return {
        "id": stored.id,
        "revision": stored.revision,
        "profile": stored.profile.model_dump(),
        "decisions": _decisions(stored.profile),
    }


def _decisions(profile: Profile) -> list[dict[str, Any]]:
    return [
        {"category": category, "banned": decision.banned, "reasons": decision.reasons}
        for category, decision in decide(profile).items()
    ]


def _profile(body: dict[str, Any]) -> Profile:
    return parse_profile(body["profile"], "What was sent")


async def _body(request: web.Request, names: set[str]) -> dict[str, Any]:
    """Return the JSON object that was sent, which has to have exactly these names."""
    if request.content_type != "application/json":
        raise _refusal(web.HTTPUnsupportedMediaType, "Send JSON, with the content type application/json.")
    raw = await request.content.read(LARGEST_BODY + 1)
    while len(raw) <= LARGEST_BODY and (more := await request.content.read(LARGEST_BODY + 1 - len(raw))):
        raw += more
    if len(raw) > LARGEST_BODY:
        raise _refusal(web.HTTPRequestEntityTooLarge, f"Send at most {LARGEST_BODY} bytes.")
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict) or set(body) != names:
        expected = f"a JSON object with {', '.join(sorted(names))}" if names else "an empty JSON object"
        raise _refusal(web.HTTPBadRequest, f"Send {expected}.")
    return body


def _guarded(handler: _Handler) -> _Handler:
    async def guarded(request: web.Request) -> web.StreamResponse:
        if (problem := foreign(request)) is not None:
            return _answer({"error": problem}, status=403)
        try:
            return await handler(request)
        except UnknownAccountError as error:
            return _answer({"error": str(error)}, status=403)
        except UnknownProfileError as error:
            return _answer({"error": str(error)}, status=404)
        except ConflictError as error:
            return _answer({"error": str(error)}, status=409)
        except StoreError as error:
            return _answer({"error": str(error)}, status=500)
        except (ProfileError, AdapterError) as error:
            return _answer({"error": str(error)}, status=400)

    return guarded


def _refusal(kind: type[web.HTTPException], message: str) -> web.HTTPException:
    headers = {**_HEADERS, "Content-Type": "application/json"}
    if kind is web.HTTPRequestEntityTooLarge:
        return web.HTTPRequestEntityTooLarge(
            max_size=LARGEST_BODY, actual_size=LARGEST_BODY + 1, headers=headers, text=json.dumps({"error": message})
        )
    return kind(headers=headers, text=json.dumps({"error": message}))


def _answer(content: dict[str, Any], status: int = 200) -> web.Response:
    return web.json_response(content, status=status, headers=_HEADERS)
