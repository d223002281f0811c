"""Those who watch: each has a short queue, and who does not empty it is sent away. Nothing is kept for ever."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from starlette.websockets import WebSocket, WebSocketDisconnect

__all__ = ["MOST_QUEUED", "MOST_VIEWERS", "Viewers"]

MOST_QUEUED = 5
"""Frames that wait for one viewer at most: seconds that it may be behind."""

MOST_VIEWERS = 500

TRY_AGAIN = 1013
"""Code of WebSocket: come back later."""

CLOSED_WITHIN = 1.0
"""Seconds in which a viewer must take the last word."""

First = Callable[[], Awaitable[str]]


class _Viewer:
    def __init__(self) -> None:
        self.queue: asyncio.Queue[str] = asyncio.Queue(MOST_QUEUED)
        self.slow = asyncio.Event()

    def offer(self, frame: str) -> None:
        try:
            self.queue.put_nowait(frame)
        except asyncio.QueueFull:
            self.slow.set()


class Viewers:
    """All who watch now."""

    def __init__(self) -> None:
        self._viewers: set[_Viewer] = set()
        self.arrived = asyncio.Event()
        """Set while there is anybody."""
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._viewers)

    def send(self, frame: str) -> None:
        """The same frame for everybody."""
        for viewer in self._viewers:
            viewer.offer(frame)

    async def serve(self, socket: WebSocket, first: First) -> None:
        """Send *first*, and from then on every frame, until the viewer leaves or falls behind."""
        if len(self._viewers) >= MOST_VIEWERS:
            await socket.close(TRY_AGAIN, "too many viewers")
            return
        await socket.accept()
        viewer = _Viewer()
        sending = asyncio.ensure_future(self._send(socket, viewer, first))
        leaving = asyncio.ensure_future(_left(socket))
        slow = asyncio.ensure_future(viewer.slow.wait())
        tasks = (sending, leaving, slow)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._leave(viewer)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if viewer.slow.is_set():
            self.dropped += 1
            with contextlib.suppress(Exception):  # it may not even take that
                await asyncio.wait_for(socket.close(TRY_AGAIN, "too slow"), CLOSED_WITHIN)

    async def _send(self, socket: WebSocket, viewer: _Viewer, first: First) -> None:
        frame = await first()
        # No await between: what is sent to everybody from now on follows on *first*.
        self._viewers.add(viewer)
        self.arrived.set()
        while True:
            await socket.send_text(frame)
            frame = await viewer.queue.get()

    def _leave(self, viewer: _Viewer) -> None:
        self._viewers.discard(viewer)
        if not self._viewers:
            self.arrived.clear()


async def _left(socket: WebSocket) -> None:
    """Returns when the viewer has left. What it says means nothing."""
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return
