"""Whether a request comes from another web page than this ComfyUI's own.

A page elsewhere names another origin. Or it gives its own name this machine's address (DNS rebinding): then origin and
host are the same, but the name is not one that only this machine has.
"""

from __future__ import annotations

import ipaddress
import os
import socket

from aiohttp import web

HOSTS = "PSA_HOSTS"  # names under which this ComfyUI is reached, separated by commas


def foreign(request: web.Request) -> str | None:
    """Return why a request is refused; None if it comes from a page of this server, or from no page at all."""
    if not _from_here(request):
        return "Profiles are for this ComfyUI's own page."
    if not _own_name(request):
        name = request.url.host
        return (
            f"This ComfyUI does not know the name {name}. If it is yours, start ComfyUI with the environment variable "
            f"{HOSTS}={name}."
        )
    return None


def _from_here(request: web.Request) -> bool:
    if request.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
        return False
    origin = request.headers.get("Origin")
    return origin is None or origin.lower().partition("://")[2] == request.host.lower()


def _own_name(request: web.Request) -> bool:
    host = (request.url.host or "").lower()
    own = socket.gethostname().lower()
    if host in ("localhost", own, f"{own}.local") or host.endswith(".localhost"):
        return True
    if host in (name.strip().lower() for name in os.environ.get(HOSTS, "").split(",")):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
