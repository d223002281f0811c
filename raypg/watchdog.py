"""Runs one PostgreSQL postmaster for one owner process, and ends it when the owner is gone.

This file is run as a script (``python -I -S watchdog.py JSON``) by :mod:`raypg.embedded`, so it imports only
the standard library. A process of its own is needed because neither alternative holds:

* ``atexit`` does not run when the owner is killed by SIGKILL;
* ``PR_SET_PDEATHSIG`` fires when the *thread* that forked ends, which may be long before its process does.

The chain here is: the watchdog waits for its owner's pidfd (exact, independent of threads and of inherited
file descriptors), and the postmaster has ``PR_SET_PDEATHSIG`` on the watchdog, which has only one thread.

The argument is a JSON object: ``command`` (list of str), ``log`` (path), ``data`` (path of PGDATA), ``owner``
(pid, or 0: nobody is watched), ``uid`` and ``gid`` (int, or null: as we are), ``remove`` (path or null:
deleted once the owner has died). Its first line of output is ``pid <postmaster's>`` or ``error <reason>``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
IPC_RMID = 0
POLL_SECONDS = 0.05
ORPHAN_SECONDS = 2.0
"""How long the backends of a killed postmaster may take to notice it, before they are killed too."""


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _pidfd(pid: int) -> int | None:
    """A file descriptor that becomes readable when the process ends; None where the system has none."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _wait_for_end(postmaster: subprocess.Popen[bytes], owner: int) -> bool:
    """Wait until the postmaster or the owner ends. True: the owner did."""
    fds = [fd for fd in (_pidfd(postmaster.pid), _pidfd(owner) if owner else None) if fd is not None]
    exact = len(fds) == (2 if owner else 1)
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    while True:
        # The watchdog is a direct child of its owner, so another parent means that the owner has died,
        # also when that happened before the pidfd was opened.
        if owner and os.getppid() != owner:
            return True
        if postmaster.poll() is not None:
            return False
        if owner and exact:
            poller.poll()
            if postmaster.poll() is None:
                return True
        else:
            poller.poll(None if exact else POLL_SECONDS * 1000)


def _children() -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name in parentheses may hold anything, so fields are counted from its end.
            if int(entry.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(entry.parent.name))
    return found


def _end_orphans() -> None:
    """Backends of a killed postmaster become our children: wait for them, then kill what is left."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid:
            continue
        if time.monotonic() > deadline:
            for child in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _free_shared_memory(data: Path) -> None:
    """Remove the System V segment that a killed postmaster left; line 7 of its lock file holds "key id"."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        identifier = int((data / "postmaster.pid").read_text().splitlines()[6].split()[1])
        ctypes.CDLL(None).shmctl(identifier, IPC_RMID, None)


def _stop(postmaster: subprocess.Popen[bytes], fast: bool) -> None:
    """Stop a postmaster whose owner is gone, each time less politely."""
    steps = [(signal.SIGINT, 10.0)] if fast else []
    for number, patience in [*steps, (signal.SIGQUIT, 5.0), (signal.SIGKILL, 60.0)]:
        with contextlib.suppress(ProcessLookupError):
            postmaster.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            postmaster.wait(patience)
            return


def main(argument: str) -> int:
    """Run the postmaster to its end; returns its exit status (128 + signal if a signal ended it)."""
    job: dict[str, Any] = json.loads(argument)
    data, owner = Path(job["data"]), int(job["owner"])
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)

    def in_child() -> None:
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        # After the change of user, since that clears the setting: subprocess calls us last.
        if owner:
            _prctl(PR_SET_PDEATHSIG, signal.SIGQUIT)

    identity: dict[str, Any] = {}
    if job["uid"] is not None:
        identity = {"user": job["uid"], "group": job["gid"], "extra_groups": []}
    try:
        with Path(job["log"]).open("ab") as log:
            postmaster = subprocess.Popen(
                job["command"],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=in_child,
                **identity,
            )
    except (OSError, subprocess.SubprocessError) as error:
        print(f"error {error}", flush=True)
        return 1
    stop: Callable[..., None] = lambda *_: postmaster.send_signal(signal.SIGINT)  # noqa: E731
    signal.signal(signal.SIGTERM, stop)
    with contextlib.suppress(BrokenPipeError):
        print(f"pid {postmaster.pid}", flush=True)
    orphaned = _wait_for_end(postmaster, owner)
    if orphaned:
        _stop(postmaster, fast=job["remove"] is None)
    _end_orphans()
    _free_shared_memory(data)
    if orphaned and job["remove"] is not None:
        shutil.rmtree(job["remove"], ignore_errors=True)
    status = postmaster.returncode
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
