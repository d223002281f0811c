"""Viewers who do not keep up, on a real server and real sockets: sent away, while the others go on."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import aiohttp
import pytest
import uvicorn
from fastapi import FastAPI, WebSocket
from waiting import eventually

from raypg.address import UNTAKEN_WITHIN, listen
from raypg.deployments import viewers as module
from raypg.deployments.viewers import MOST_QUEUED, TRY_AGAIN, Viewers

FRAME = "x" * 1_000_000
"""So long that the kernel's buffers are full after a few."""


@pytest.fixture
async def served() -> AsyncIterator[tuple[Viewers, int]]:
    viewers = Viewers()
    app = FastAPI()

    async def first() -> str:
        return "first"

    @app.websocket("/ws")
    async def ws(socket: WebSocket) -> None:
        await viewers.serve(socket, first)

    listening = listen("127.0.0.1", 0, "")
    config = uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve([listening]))  # without its signal handlers
    await eventually(lambda: server.started)
    yield viewers, listening.getsockname()[1]
    server.should_exit = True
    await serving


async def test_a_slow_viewer_is_sent_away_and_the_others_go_on(served: tuple[Viewers, int]) -> None:
    viewers, port = served
    loop = asyncio.get_running_loop()
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.setblocking(False)
    await loop.sock_connect(slow, ("127.0.0.1", port))
    request = (
        f"GET /ws HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    await loop.sock_sendall(slow, request.encode())
    assert b" 101 " in await loop.sock_recv(slow, 100)  # and it reads no more
    async with aiohttp.ClientSession() as http, http.ws_connect(f"http://localhost:{port}/ws", max_msg_size=0) as quick:
        assert await quick.receive_str() == "first"
        await eventually(lambda: len(viewers) == 2)
        sent = 0
        while viewers.dropped == 0:
            assert sent < 50
            viewers.send(FRAME)
            sent += 1
            assert await quick.receive_str() == FRAME
        assert len(viewers) == 1
        assert sent > MOST_QUEUED
        viewers.send("last")
        assert await quick.receive_str() == "last"
    # It may still read what the kernel holds, and why it was sent away.
    received = b""
    with contextlib.closing(slow):
        while not received.endswith(b"too slow"):
            received = received[-100:] + await asyncio.wait_for(loop.sock_recv(slow, 1_000_000), 5)
    assert received.endswith(b"\x88\x0a" + TRY_AGAIN.to_bytes(2) + b"too slow")
    await eventually(lambda: len(viewers) == 0)


def test_the_kernel_ends_what_takes_nothing_for_long() -> None:
    """Else a viewer that is gone without a word, or takes nothing any more, would hold its socket for ever."""
    with listen("127.0.0.1", 0, "") as listening, socket.create_connection(listening.getsockname()):
        listening.setblocking(True)
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == UNTAKEN_WITHIN * 1000


async def test_too_many_are_not_let_in(served: tuple[Viewers, int], monkeypatch: pytest.MonkeyPatch) -> None:
    viewers, port = served
    monkeypatch.setattr(module, "MOST_VIEWERS", 1)
    async with aiohttp.ClientSession() as http, http.ws_connect(f"http://localhost:{port}/ws") as one:
        assert await one.receive_str() == "first"
        with pytest.raises(aiohttp.WSServerHandshakeError):
            await http.ws_connect(f"http://localhost:{port}/ws")
        assert len(viewers) == 1
    assert TRY_AGAIN == 1013
