"""Runs all tests, as ``make test`` does: what kills processes and nodes first, then the rest in two processes at once.

A machine of two cores has room for two: tests that share servers keep about one of them busy. Beside the first, which
must not be slowed down, only what needs no server and takes what is left of the processor.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import IO

ALONE = ("tests/cluster", "tests/faults", "tests/contract", "tests/browser")
"""What must be noticed in time, while processes and nodes are killed, or by a browser that is busy itself."""

COMMANDS = tuple(
    f"tests/integration/test_{name}.py" for name in ("cli", "demo", "embedded", "examples", "two_clusters")
)
"""What runs commands and programs, with servers of their own."""

WITHOUT_SERVERS = "tests/unit"

OPTIONS = ("-q", "--durations=15")


def pytest(
    *arguments: str, output: IO[bytes] | None = None, first: Callable[[], object] | None = None
) -> subprocess.Popen[bytes]:
    """Start pytest, without this directory in its sys.path.

    Args:
        output: where its output goes; else where ours goes.
        first: what its process does before.
    """
    command = [sys.executable, "-P", "-m", "pytest", *OPTIONS, *arguments]
    return subprocess.Popen(command, stdout=output, stderr=output, preexec_fn=first)


@contextlib.contextmanager
def beside(*arguments: str, niceness: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """Run pytest while the block runs, and to its end; what it prints follows then."""
    with tempfile.TemporaryFile() as log:
        running = pytest(*arguments, output=log, first=lambda: os.nice(niceness))
        try:
            yield running
        finally:  # after Ctrl-C too, which it has heard
            running.wait()
            log.seek(0)
            shutil.copyfileobj(log, sys.stdout.buffer)
            sys.stdout.buffer.flush()


def main(files: list[str]) -> int:
    """Run all tests, or those in *files* in two processes at once; exit status: 0, or that of a part that failed."""
    if files:
        with beside(*files[::2]) as half:
            return max((pytest(*files[1::2]).wait(), half.wait()), key=abs)
    elsewhere = [f"--ignore={path}" for path in (*ALONE, *COMMANDS, WITHOUT_SERVERS)]
    with beside(WITHOUT_SERVERS, niceness=19) as unit:
        alone = pytest(*ALONE).wait()
    with beside(*COMMANDS) as commands:
        rest = pytest("tests", *elsewhere).wait()
    return max((unit.wait(), alone, commands.wait(), rest), key=abs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
