"""One event loop in a thread of its own, per process: for callers that have none, and for what must not block them."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

LISTEN_EVERY = 0.2
"""Seconds for which a thread waits in one go: ``ray.cancel`` interrupts it without a signal (``interrupt_main``), and
Python notices that only between two steps, never in one that waits for a lock."""

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_process = 0


def loop() -> asyncio.AbstractEventLoop:
    """The background loop of this process, started on first use. Its thread ends with the process."""
    global _loop, _process
    with _lock:
        if _loop is None or _process != os.getpid():  # a forked child has the object, but not the thread
            _loop, _process = asyncio.new_event_loop(), os.getpid()
            threading.Thread(target=_loop.run_forever, name="raypg-background", daemon=True).start()
        return _loop


def run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run the coroutine that *work* makes on the background loop, and wait for it.

    Raises:
        RuntimeError: this thread runs an event loop, which waiting would block.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        raise RuntimeError("pool.sync would block the event loop that runs here: await the pool's own methods instead")
    future = asyncio.run_coroutine_threadsafe(work(), loop())
    try:
        while True:
            try:
                return future.result(LISTEN_EVERY)
            except TimeoutError:
                if future.done():  # it is the work's own
                    return future.result()
    except BaseException:
        future.cancel()  # Ctrl-C in the waiting thread must end the work too; finished work does not mind
        raise


def soon(work: Callable[[], Any]) -> None:
    """Call *work* on the background loop, later. Safe from ``__del__``: takes no lock that the caller may hold."""
    known = _loop
    if known is not None and _process == os.getpid() and not known.is_closed():
        known.call_soon_threadsafe(work)


def start() -> None:
    """Make sure that :func:`soon` has a loop to go to."""
    loop()
