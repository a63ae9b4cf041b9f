"""Who may ask the sidecar: whoever has its key, and pages of no other site.

A web page that somebody visits can send requests to this machine. What it lacks is the key; and where its name resolves to this
machine (DNS rebinding), the Host header still says that name, which is refused.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import secrets
import stat
from pathlib import Path
from typing import Final

from fedloop_events.errors import UsageError
from fedloop_events.files import PRIVATE, quoted, reason, write_whole
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from fedloop_clients.keys import KeyUnavailableError
from fedloop_clients.sidecar.errors import ApiError

KEY_FILE: Final = "sidecar.key"
_KEY: Final = re.compile(r"[!-~]{20,200}")
_ORIGIN: Final = re.compile(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?|https?://\[[0-9a-f:]+\](:[0-9]{1,5})?")


def key_of(folder: Path) -> str:
    """The key of the sidecar whose device has its store in `folder`; a new random one at the first time, which is durable then.

    Raises `KeyUnavailableError`, also for a file that other users can read.
    """
    path = folder / KEY_FILE
    try:
        if not path.exists():
            write_whole(path, f"fedloop-{secrets.token_urlsafe(32)}\n".encode(), mode=PRIVATE, replace=False)
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise KeyUnavailableError(f"{path} can be read by other users", hint=f"chmod 600 {quoted(path)}")
        key = path.read_bytes().decode("ascii", "replace").strip()
    except OSError as error:
        raise KeyUnavailableError(f"the sidecar's key {path} cannot be kept", cause=reason(error, path)) from None
    if not _KEY.fullmatch(key):
        raise KeyUnavailableError(
            f"{path} holds no key", hint="remove it, and a new one is made: programs that have the old one need the new one then"
        )
    return key


def check_origin(given: str) -> str:
    """An origin as browsers send it. Raises `UsageError` for one that is none, such as `*`."""
    if not _ORIGIN.fullmatch(given):
        raise UsageError(
            f"--allow-origin {given} is no origin of a web page", hint="as in https://app.example or http://localhost:3000"
        )
    return given


class HostCheck:
    """Lets only requests through that were sent to this machine by its own names."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_this_machine(Headers(scope=scope).getlist("host")):
            refused = ApiError("host_not_allowed", "the Host header names another machine: use localhost, 127.0.0.1 or [::1]")
            await refused.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


class KeyCheck:
    """Lets only requests to /v1 through that bring the key."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1") and not self._has_key(Headers(scope=scope)):
            refused = ApiError("invalid_api_key", f"the API key is absent or wrong; it is in {KEY_FILE} in the store's folder")
            await refused.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self._key)


def _is_this_machine(hosts: list[str]) -> bool:
    if len(hosts) != 1:
        return False
    name = re.sub(r":[0-9]+$", "", hosts[0].strip()).lower()
    if name == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return address.is_loopback
