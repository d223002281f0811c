"""Ends processes of ours, also those that our children started and left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
POLL_SECONDS = 0.02


def adopt_orphans() -> None:
    """From now on what our descendants leave behind becomes our child, so that it can be found (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(ancestor: int | None = None) -> set[int]:
    """Process ids of all that *ancestor* (by default we) started, directly or not, but those that have ended."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            # The name in parentheses may hold anything, so fields are counted from its end.
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                parents[int(entry.parent.name)] = int(parent)
    found: set[int] = set()
    newest = {os.getpid() if ancestor is None else ancestor}
    while newest:
        newest = {pid for pid, parent in parents.items() if parent in newest} - found
        found |= newest
    return found


def end_descendants(patience: float = 2.0, timeout: float = 20.0) -> set[int]:
    """End all that we started: first politely, after *patience* seconds by SIGKILL.

    Returns:
        Process ids of those that still live after *timeout* seconds.
    """
    started = time.monotonic()
    asked: set[int] = set()
    while left := descendants():
        waited = time.monotonic() - started
        if waited > timeout:
            return left
        # Whoever is new since the last look was started meanwhile, or was hidden behind a parent.
        for pid in left if waited > patience else left - asked:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL if waited > patience else signal.SIGTERM)
        asked |= left
        _bury()
        time.sleep(POLL_SECONDS)
    _bury()
    return set()


def _bury() -> None:
    """Take the exit status of those who ended. Python's own Popen objects cope with that."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
