"""Who may use the HTTP API: an ASGI wrapper around the application, in a serving frontend.

It knows keys by their digests only (digests.py), and must let nothing through that is not open to all.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import Any, Final

import msgspec
from litestar.config.cors import CORSConfig
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from frontend.openai import error_body
from frontend.server import TENANT, add_request_id

OPEN_PATHS: Final = frozenset({"/health", "/ready", "/ping", "/version", "/metrics"})  # for probes and Prometheus


class ApiKeyGuard:
    """Lets a request through to `app` if it brings a key, or its path is open; anything else is answered 401.

    With `isolate`, requests of different keys share no cached prefix. `cors`: as the application's.
    """

    def __init__(self, app: ASGIApp, digests: Iterable[str], *, isolate: bool, cors: CORSConfig | None) -> None:
        self._app = app
        self._cors = cors
        self._digests = tuple(digests)
        self._isolate = isolate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A browser asks for permission (OPTIONS) without a key; no route does anything else on it.
        if scope["type"] == ScopeType.HTTP and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
            owner = self._owner(scope["headers"])
            if owner is None:
                await _refuse(scope, send, self._cors)
                return
            if self._isolate:
                scope["state"][TENANT] = owner
        await self._app(scope, receive, send)

    def _owner(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """The digest of the key that came along, if it is a good one."""
        given = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        found = hashlib.sha256(key.strip()).hexdigest()
        # Every digest is compared, so that the time tells nothing of which one matched.
        matches = [hmac.compare_digest(found, known) for known in self._digests]
        return found if any(matches) else None


def _cors_headers(scope: Scope, cors: CORSConfig | None) -> list[tuple[bytes, bytes]]:
    """What lets a web page of a listed origin read the answer: without it, its scripts see a network error."""
    origin = next((value for name, value in scope["headers"] if name == b"origin"), None)
    if cors is None or origin is None or not cors.is_origin_allowed(origin.decode("latin-1")):
        return []
    headers = [(name.lower().encode(), value.encode()) for name, value in cors.simple_headers.items()]
    if not cors.is_allow_all_origins:
        headers += [(b"access-control-allow-origin", origin), (b"vary", b"Origin")]
    return headers


async def _refuse(scope: Scope, send: Send, cors: CORSConfig | None) -> None:
    message = "no valid API key: send it as 'Authorization: Bearer KEY'"
    body = msgspec.json.encode(error_body(message, 401, code="invalid_api_key"))
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"www-authenticate", b"Bearer"),
        *_cors_headers(scope, cors),
    ]
    start: Any = {"type": "http.response.start", "status": 401, "headers": headers}
    await add_request_id(start, scope)
    await send(start)
    end: Message = {"type": "http.response.body", "body": body, "more_body": False}
    await send(end)
