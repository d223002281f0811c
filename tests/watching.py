"""A viewer of the dashboard, for tests: a WebSocket whose frames add up to a state."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

from raypg.core.merge_patch import apply


def without_nulls(value: Any) -> Any:
    """In a state, a key with ``null`` and no key are the same."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return value


class Viewer:
    """Takes the frames of one WebSocket.

    Attributes:
        state: what they add up to.
        number: of the last.
        sizes: characters of each.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self.state: dict[str, Any] = {}
        self.number = -1
        self.sizes: list[int] = []

    async def take(self) -> dict[str, Any]:
        """The state after the next frame."""
        text = await self._socket.receive_str(timeout=10)
        message = json.loads(text)
        self.sizes.append(len(text))
        if message["type"] == "state":
            self.state = message["state"]
        else:
            assert message["type"] == "patch"
            assert message["seq"] == self.number + 1
            self.state = apply(self.state, message["patch"])
        self.number = message["seq"]
        return self.state

    async def until(self, seen: Callable[[dict[str, Any]], Any], timeout: float = 20.0) -> float:
        """Take frames until *seen* is true of a state; how many seconds that took."""
        began = time.monotonic()
        while not seen(await self.take()):
            assert time.monotonic() - began < timeout, self.state
        return time.monotonic() - began


async def least(measured: Callable[[], Awaitable[float]], enough: float, rounds: int = 3) -> float:
    """The least number of seconds of some rounds, none after that which took less than *enough*: of the time in which
    something has to be shown, one moment in which the machine does something else takes too much."""
    took = math.inf
    for _ in range(rounds):
        took = min(took, await measured())
        if took < enough:
            break
    return took


async def watch(http: aiohttp.ClientSession, url: str) -> Viewer:
    """A viewer that has its first state; it leaves with *http*."""
    viewer = Viewer(await http.ws_connect(f"{url}/ws"))
    await viewer.take()
    return viewer
