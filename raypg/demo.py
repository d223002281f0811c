"""``raypg demo``: the part in the terminal. It starts the host (:mod:`raypg.demo_host`), shows what that tells, and
sees to it that nothing is left behind, however and whenever it is stopped.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from raypg import flights
from raypg.binaries import public_directory, server_account
from raypg.demo_cluster import LocalCluster
from raypg.demo_screen import DemoFailed, Screen
from raypg.errors import ConfigError, RaypgError
from raypg.processes import adopt_orphans, end_descendants

__all__ = ["run"]

GRACE = 10.0
"""Seconds that the host has to end what it started, before we do it."""


class _Stopping:
    """Turns Ctrl-C, SIGTERM and a closed terminal into one wish, which raises nothing: wherever we are, the way to the
    end is the same, and no second signal can interrupt it."""

    def __init__(self) -> None:
        self.since: float | None = None
        self.urgent = False
        self.host: subprocess.Popen[bytes] | None = None

    def watch(self) -> None:
        """Take over the signals."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._signalled)

    def _signalled(self, *_: object) -> None:
        if self.since is None:
            self.since = time.monotonic()
            self.tell_host()
        else:
            self.urgent = True

    def tell_host(self) -> None:
        """Ask the host to end, if it is there and we are to."""
        if self.since is not None and self.host is not None:
            self.host.terminate()

    @property
    def overdue(self) -> bool:
        """Whether the host has had its time."""
        return self.since is not None and (self.urgent or time.monotonic() - self.since > GRACE)


def run(keep: bool, count: int) -> int:
    """Run the demo in this terminal.

    Args:
        keep: leave Ray, PostgreSQL and the pool running.
        count: flights to load, 1 to 336,776.

    Returns:
        Exit status: 0, or 130 if it was stopped.

    Raises:
        RaypgError: it failed; says why.
    """
    if not 1 <= count <= flights.ROWS:
        raise ConfigError(f"--flights {count}: there are 1 to {flights.ROWS:,} to load")
    flights.locate()
    console = Console()
    stopping = _Stopping()
    stopping.watch()
    adopt_orphans()
    directory = Path(public_directory(server_account()), f"raypg-demo-{secrets.token_hex(4)}")
    kept, failure = False, ""
    try:
        directory.mkdir(0o711)  # the server may run as another user, who has to pass
        kept = _show(console, directory, keep, count, stopping)
    except DemoFailed as failed:
        failure = str(failed)
    finally:
        if not kept:
            _clean(directory, 0.0 if stopping.urgent else 3.0)
    if stopping.since is not None and not kept:
        console.print("[yellow]stopped; nothing is left behind[/]")
        return 130
    if failure:
        raise RaypgError(f"the demo failed: {failure}")
    if not keep:
        console.print("All of it has ended. To look around in it: raypg demo --keep", highlight=False)
    return 0


def _show(console: Console, directory: Path, keep: bool, count: int, stopping: _Stopping) -> bool:
    """Start the host and show what it tells. Whether it runs on."""
    with (directory / "host.log").open("wb") as log:
        host = stopping.host = subprocess.Popen(
            [sys.executable, "-m", "raypg.demo_host", str(directory), str(count), "keep" if keep else "end"],
            # Ray reads how to authenticate when it is imported.
            env={**LocalCluster(directory / "ray").environment(), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
            stdin=subprocess.PIPE,  # it ends when this pipe does
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for us, and what is kept must survive the terminal
        )
    stopping.tell_host()
    with Screen(console) as screen:
        for line in _lines(host, stopping):
            message = json.loads(line)
            screen.show(message)
            if message["kind"] == "kept":
                return True
    if stopping.since is None and host.wait() != 0:
        said = (directory / "host.log").read_text(errors="replace").strip().splitlines()
        raise DemoFailed(said[-1] if said else f"its host ended with status {host.returncode}")
    return False


def _lines(host: subprocess.Popen[bytes], stopping: _Stopping) -> Iterator[bytes]:
    """What the host tells, until it ends or has had its time."""
    assert host.stdout is not None
    rest = b""
    while not stopping.overdue:
        if not select.select([host.stdout], [], [], 0.2)[0]:
            continue
        part = os.read(host.stdout.fileno(), 65536)
        if not part:
            return
        *lines, rest = (rest + part).split(b"\n")
        yield from lines


def _clean(directory: Path, patience: float) -> None:
    """End what still runs, and delete all files."""
    left = end_descendants(patience)
    shutil.rmtree(directory, ignore_errors=True)
    if left:
        raise RaypgError(f"these processes could not be ended: {', '.join(map(str, sorted(left)))}")
