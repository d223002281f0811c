"""``raypg demo``: the part in the terminal. It starts the host (:mod:`raypg.demo_host`), shows what that tells, and
sees to it that nothing is left behind, however and whenever it is stopped.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from raypg import flights
from raypg.binaries import public_directory, server_account
from raypg.demo_cluster import LocalCluster
from raypg.demo_screen import DemoFailed, Screen
from raypg.errors import RaypgError
from raypg.processes import adopt_orphans, end_descendants

__all__ = ["run"]

GRACE = 12.0
"""Seconds that the host has for ending what it started, before we do it."""

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(keep: bool, count: int) -> int:
    """Run the demo in this terminal.

    Args:
        keep: leave Ray, PostgreSQL and the pool running.
        count: flights to load.

    Returns:
        Exit status: 0, or 130 if it was stopped.

    Raises:
        RaypgError: it failed; says why.
    """
    console = Console()
    ended = "[yellow]stopped; nothing is left behind[/]"
    with _stoppable() as begin_cleaning:
        adopt_orphans()
        directory: Path | None = None
        try:
            directory = Path(tempfile.mkdtemp(prefix="raypg-demo-", dir=public_directory(server_account())))
            directory.chmod(0o711)  # the server may run as another user, who has to pass
            if _show(console, directory, keep, count):
                directory = None  # it is still in use
                return 0
            if not keep:
                console.print("To look around: raypg demo --keep", highlight=False)
            return 0
        except KeyboardInterrupt:
            begin_cleaning()
            console.print("[yellow]stopping …[/]")
            _clean(directory)
            directory = None
            console.print(ended)
            return 130
        except DemoFailed as failure:
            raise RaypgError(f"the demo failed: {failure}") from None
        finally:
            begin_cleaning()
            if directory is not None:
                _clean(directory)


def _show(console: Console, directory: Path, keep: bool, count: int) -> bool:
    """Start the host and show what it tells. Whether it runs on."""
    with (directory / "host.log").open("wb") as log:
        host = subprocess.Popen(
            [sys.executable, "-m", "raypg.demo_host", str(directory), str(count), "keep" if keep else "end"],
            env=LocalCluster(directory / "ray").environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for us, and what is kept must survive the terminal
        )
    assert host.stdout is not None
    with Screen(console) as screen:
        for line in host.stdout:
            message = json.loads(line)
            kept = message["kind"] == "kept"
            screen.show(message)
            if kept:
                return True
    if host.wait() != 0:
        said = (directory / "host.log").read_text(errors="replace").strip().splitlines()
        raise DemoFailed(said[-1] if said else f"its host ended with status {host.returncode}")
    return False


def _clean(directory: Path | None) -> None:
    """End what runs, politely at first, and delete its files."""
    left = end_descendants(patience=GRACE, timeout=GRACE + 10)
    if directory is not None:
        shutil.rmtree(directory, ignore_errors=True)
    if left:
        raise RaypgError(f"these processes could not be ended: {', '.join(map(str, sorted(left)))}")


@contextlib.contextmanager
def _stoppable() -> Iterator[object]:
    """Ctrl-C, a closed terminal and SIGTERM interrupt us: once, and not while we clean up."""


def default_flights() -> int:
    """All of them."""
    return flights.ROWS
