"""Asking the database how it is, for those who watch: one question at a time, and nobody waits for it for long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from raypg.actors.reaper import NoRoomError

WITHIN = 0.45
"""Seconds that a watcher waits for the server's answer, well below those for which the dashboard waits for ours: what
comes after its frame is seen a second later. The question itself goes on: there is never more than one."""


class Looking:
    """Who waits for whom on the server now, or why that is not known.

    Args:
        look: asks the server.
    """

    def __init__(self, look: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        self._look = look
        self._asking: asyncio.Task[dict[str, Any]] | None = None
        self._asked_at = 0.0

    async def activity(self) -> dict[str, Any]:
        """See :func:`raypg.server.activity.describe`; beside that ``error``, in words, if the server did not answer,
        with ``unanswered_seconds`` if it has not answered *yet*, or ``unseen``: why it could not be asked."""
        if self._asking is None or self._asking.done():  # a late answer is an old one
            self._asked_at = time.monotonic()
            self._asking = asyncio.ensure_future(self._look())
            self._asking.add_done_callback(lambda asked: asked.cancelled() or asked.exception())  # seen, or in vain
        asking = self._asking
        await asyncio.wait((asking,), timeout=WITHIN)
        if not asking.done():
            seconds = time.monotonic() - self._asked_at
            return {"error": f"no answer for {seconds:.1f} s", "unanswered_seconds": seconds}
        try:
            return asking.result()
        except NoRoomError as error:
            return {"error": None, "unseen": str(error)}
        except Exception as error:
            return {"error": str(error) or type(error).__name__}
