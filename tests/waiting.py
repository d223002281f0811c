"""Waiting for a condition instead of sleeping for a while."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Disturbed(Exception):
    """A round shows nothing: what it needs was not so, as happens when a process was held up for a moment."""


def needs(so: object, what: str = "") -> None:
    """Ends the round if *so* is not true; see :func:`one_round`."""
    if not so:
        raise Disturbed(what)


async def one_round(attempt: Callable[[], Awaitable[T]], rounds: int = 5) -> T:
    """The result of the first undisturbed one of some *rounds*. What is asserted in one must be true in each.

    Raises:
        Disturbed: all of them were.
    """
    for _ in range(rounds - 1):
        try:
            return await attempt()
        except Disturbed as disturbed:
            print(f"a round more: {disturbed}")
    return await attempt()


POLL_SECONDS = 0.02


def wait_until(predicate: Callable[[], T], timeout: float = 10.0, what: str = "") -> T:
    """Call *predicate* until its answer is true, and return that answer.

    Raises:
        AssertionError: it was not true within *timeout* seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        answer = predicate()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not true within {timeout:g} s: {what or inspect.getsource(predicate).strip()}")
        time.sleep(POLL_SECONDS)


async def eventually(predicate: Callable[[], Any], timeout: float = 10.0, what: str = "") -> Any:
    """The same for a coroutine: *predicate* may be a plain or an ``async`` function."""
    deadline = time.monotonic() + timeout
    while True:
        answer = predicate()
        if inspect.isawaitable(answer):
            answer = await answer
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not true within {timeout:g} s: {what or inspect.getsource(predicate).strip()}")
        await asyncio.sleep(POLL_SECONDS)
