"""Before anything else sees a request: whether it may pass, and what every answer must say."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raypg.access_token import is_token, session_of
from raypg.deployments.security import COOKIE, HEADERS, Asked, Refused, judge, token_of_page

__all__ = ["Gate", "asked"]


class Gate:
    """Lets pass to *app* what may.

    Args:
        app: what is behind.
        token: the cluster's.
        port: on which it listens.
    """

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self._app = app
        self.token = token
        self._port = port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        request = asked(scope, self._port)
        given = token_of_page(request)
        refused = judge(request, self.token) if given is None else None
        if scope["type"] == "websocket":
            if refused is not None:
                await send({"type": "websocket.close", "code": 1008, "reason": refused.reason})  # 403, before it opens
                return
            await self._app(scope, receive, send)
        elif given is not None:
            await self._enter(given, request, send)
        elif refused is not None:
            await _refuse(send, refused)
        else:
            await self._app(scope, receive, _with_headers(send, request.path))

    async def _enter(self, given: str, request: Asked, send: Send) -> None:
        """Somebody opens the page with the token in its address: it goes into a cookie, and out of the address."""
        if not is_token(given, self.token):
            await _refuse(send, Refused(401, "this is not the cluster's token; `raypg token` prints it"))
            return
        cookie = f"{COOKIE}={session_of(self.token)}; Path=/; HttpOnly; SameSite=Strict"
        # Not a redirect: to the browser that would still be a request of the site whose link was clicked, and it would
        # not send the cookie.
        page = b'<!doctype html><meta http-equiv="refresh" content="0;url=/"><title>raypg</title><a href="/">raypg</a>'
        await _answer(send, 200, page, [("Content-Type", "text/html; charset=utf-8"), ("Set-Cookie", cookie)])


def asked(scope: Scope, port: int) -> Asked:
    """What the request in *scope* says."""
    headers: defaultdict[str, list[str]] = defaultdict(list)
    for name, value in scope["headers"]:
        headers[name.decode("latin-1").lower()].append(value.decode("latin-1"))
    client = scope.get("client")
    return Asked(
        client=client[0] if client else "",
        port=port,
        method=scope.get("method", "GET"),
        path=scope["path"],
        query=scope.get("query_string", b"").decode("latin-1"),
        headers=dict(headers),
    )


def _with_headers(send: Send, path: str) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
            if "cache-control" not in headers:
                headers["Cache-Control"] = "no-store"
        await send(message)

    return sending


async def _refuse(send: Send, refused: Refused) -> None:
    body = json.dumps({"error": {"type": "Refused", "message": refused.reason}}).encode()
    extra = [("WWW-Authenticate", "Bearer")] if refused.status == 401 else []
    await _answer(send, refused.status, body, [("Content-Type", "application/json"), *extra])


async def _answer(send: Send, status: int, body: bytes, headers: Sequence[tuple[str, str]]) -> None:
    every = [*headers, ("Content-Length", str(len(body))), ("Cache-Control", "no-store"), *HEADERS.items()]
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in every]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
