"""Telling webhooks of alerts: in order for each address, again and again while it does not answer, but not for ever."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Any

import aiohttp

from raypg.core.alert_rule import without_secrets
from raypg.core.backoff import Backoff

ANSWER_WITHIN = 5.0
"""Seconds in which a webhook must answer."""

FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0
"""Seconds until it is tried again; half of it is random."""

GIVEN_UP_AFTER = 3600.0
"""Seconds after which nobody is told any more."""

MOST_WAITING = 100
"""Messages that wait for one address: the newest."""

_TRY_AGAIN = frozenset({408, 425, 429})
"""Of the answers that blame the sender, those that time mends."""

logger = logging.getLogger("raypg.alerts")

Message = dict[str, Any]
"""``{"url", "at", "body"}``: where to, when in seconds since the epoch, and what."""


class Webhooks:
    """Messages that wait to be told.

    Args:
        waiting: what an earlier life could not tell.
        changed: called when a message was told or given up.
    """

    def __init__(self, waiting: Iterable[Message], changed: Callable[[], None]) -> None:
        self._queues: dict[str, deque[Message]] = {}
        self._senders: dict[str, asyncio.Task[None]] = {}
        self._changed = changed
        self._lost = 0
        self._trouble: dict[str, str] = {}  # address → why it was not told at the last try
        for message in waiting:
            self.send(message["url"], message["body"], message["at"])

    def send(self, url: str, body: dict[str, Any], at: float) -> None:
        """Tell *url*; returns at once."""
        queue = self._queues.setdefault(url, deque())
        if len(queue) >= MOST_WAITING:
            self._lose(queue.popleft(), f"more than {MOST_WAITING} wait")
        queue.append({"url": url, "at": at, "body": body})
        self._start(url)

    def _start(self, url: str) -> None:
        if url not in self._senders:
            self._senders[url] = asyncio.get_running_loop().create_task(self._tell_all(url))

    def waiting(self) -> list[Message]:
        """What was not told yet."""
        return [message for queue in self._queues.values() for message in queue]

    def status(self, urls: Collection[str]) -> dict[str, Any]:
        """How many wait, how many were never told, and why the last try of each of *urls* failed, if it did."""
        self._trouble = {url: why for url, why in self._trouble.items() if url in urls or url in self._queues}
        trouble = {without_secrets(url): why for url, why in self._trouble.items()}
        return {"waiting": len(self.waiting()), "lost": self._lost, "trouble": trouble}

    def _lose(self, message: Message, why: str) -> None:
        self._lost += 1
        logger.error("webhook %s was not told of %r: %s", without_secrets(message["url"]), message["body"]["id"], why)

    async def _tell_all(self, url: str) -> None:
        queue, backoff = self._queues[url], Backoff(FIRST_DELAY, LONGEST_DELAY)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(ANSWER_WITHIN)) as session:
            while queue:
                message = queue[0]
                again, why = await _tell(session, url, message["body"])
                if why:
                    self._trouble[url] = why
                if again and time.time() - message["at"] < GIVEN_UP_AFTER:
                    await asyncio.sleep(backoff.next(random.random()))
                    continue
                if why:
                    self._lose(message, why)
                else:
                    self._trouble.pop(url, None)
                backoff.reset()
                with contextlib.suppress(ValueError):  # it had to make room meanwhile
                    queue.remove(message)
                try:
                    self._changed()
                except Exception:  # the next life would tell it again
                    logger.exception("what webhooks were told cannot be kept")
        del self._senders[url]
        if queue:  # something came while the connection was closed
            self._start(url)
        else:
            del self._queues[url]


async def _tell(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[bool, str]:
    """(Whether to try again, why it failed); the second is empty if it did not."""
    try:
        async with session.post(url, json=body, allow_redirects=False) as answer:
            status = answer.status
    except TimeoutError:
        return True, f"no answer within {ANSWER_WITHIN:g} s"
    except Exception as error:  # whatever it is, it may be better later; its text may hold the whole address
        return True, (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
    if 200 <= status < 300:
        return False, ""
    return status >= 500 or status in _TRY_AGAIN, f"it answered {status}"
