"""Runs all tests, as ``make test`` does: what kills processes and nodes alone, the rest in two processes at once.

A machine of two cores has room for two: tests that share servers keep about one of them busy.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from typing import IO

ALONE = ("tests/cluster", "tests/faults", "tests/contract", "tests/browser")
"""What must be noticed in time, while processes and nodes are killed, or by a browser that is busy itself."""

COMMANDS = tuple(
    f"tests/integration/test_{name}.py" for name in ("cli", "demo", "embedded", "examples", "two_clusters")
)
"""What runs commands and programs, with servers of their own."""

OPTIONS = ("-q", "--durations=15")


def pytest(*arguments: str, output: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Start pytest, without this directory in its sys.path; its output goes to *output*, or where ours goes."""
    return subprocess.Popen([sys.executable, "-P", "-m", "pytest", *OPTIONS, *arguments], stdout=output, stderr=output)


def main() -> int:
    """Exit status: 0, or that of a part that failed."""
    failures = [pytest(*ALONE).wait()]
    with tempfile.TemporaryFile() as log:
        beside = pytest(*COMMANDS, output=log)
        try:
            failures.append(pytest("tests", *(f"--ignore={path}" for path in (*ALONE, *COMMANDS))).wait())
        finally:  # after Ctrl-C too, which it has heard
            failures.append(beside.wait())
            log.seek(0)
            shutil.copyfileobj(log, sys.stdout.buffer)
            sys.stdout.buffer.flush()
    return max(failures, key=abs)


if __name__ == "__main__":
    sys.exit(main())
