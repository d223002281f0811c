"""A TCP proxy for tests, to show what a network does to a connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


class Proxy:
    """What stands between a client and a server, and can behave as networks do.

    Args:
        target: port of the server, on the loopback address.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self.frozen = False
        """Lose what either side sends, and close nothing."""
        self.late = False
        """What the server sends arrives; that it has closed shows only when the client sends again."""
        self.accepted = 0
        """Connections that clients have made so far."""
        self._refuses: Callable[[bytes], bool] = lambda _: False
        self._clients: list[tuple[bytes, asyncio.StreamWriter]] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    def cut(self, whom: Callable[[bytes], bool] = lambda _: True) -> None:
        """Close the connections of some clients, and close those that they make from now on at once.

        Args:
            whom: told the first bytes that a client sends: without TLS they hold its application_name.
        """
        self._refuses = whom
        for first, writer in self._clients:
            if whom(first):
                writer.transport.abort()

    def mend(self) -> None:
        """Let everybody through again, and lose nothing."""
        self._refuses = lambda _: False
        self.frozen = False

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        first = await reader.read(65536)
        if self._refuses(first):
            writer.close()
            return
        self._clients.append((first, writer))
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        if not self.frozen:
            back.write(first)
        spoken = asyncio.Event()
        for copying in (self._copy(reader, back, spoken), self._copy(there, writer, spoken, answers=True)):
            self._tasks.add(asyncio.create_task(copying))

    async def _copy(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, spoken: asyncio.Event, *, answers: bool = False
    ) -> None:
        try:
            while data := await source.read(65536):
                if self.frozen:
                    continue  # lost on the way
                if not answers:
                    spoken.set()
                sink.write(data)
                await sink.drain()
            if self.late and answers:
                spoken.clear()
                await spoken.wait()
        except OSError:
            pass
        finally:
            sink.close()
