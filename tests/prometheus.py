"""Prometheus and its promtool, of the system."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from pgserver import in_ci


def require_prometheus(program: str = "promtool") -> str:
    """Path of ``prometheus`` or ``promtool``; skips the test without one, or fails it under ``CI``."""
    found = shutil.which(program)
    if found is not None:
        return found
    reason = f"no {program} is installed by the system (Debian: apt-get install prometheus)"
    if in_ci():
        pytest.fail(f"{reason}, and CI may skip nothing")
    pytest.skip(reason)


def promtool(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run promtool to its end, with *text* as its input."""
    command = [require_prometheus(), *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
