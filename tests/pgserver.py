"""PostgreSQL servers for tests."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from raypg.embedded import EmbeddedServer, system_binaries

SETTINGS = {
    "max_connections": "200",
    "log_min_messages": "warning",
    # A commit takes a tenth of the time. What the server has written survives its death, though not the machine's.
    "fsync": "off",
    # So that a test can see who waits for what, and so that a lost client's backend goes quickly.
    "track_activities": "on",
}


def in_ci() -> bool:
    """Whether nothing may be skipped."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def main_server(settings: Mapping[str, str] | None = None) -> EmbeddedServer:
    """A server as most tests use it, not started yet: PostgreSQL 18 of the wheel, or with
    ``RAYPG_TEST_POSTGRES=system`` in the environment that of the system, so that the same tests run on both."""
    if os.environ.get("RAYPG_TEST_POSTGRES") == "system":
        return system_server(settings)
    return EmbeddedServer(settings={**SETTINGS, **(settings or {})})


def require_system_binaries() -> Path:
    """Program directory of the system's PostgreSQL; skips the test without one, or fails it under ``CI``."""
    found = system_binaries(15) or system_binaries()
    if found is not None:
        return found
    reason = "no PostgreSQL is installed by the system (Debian: apt-get install postgresql)"
    if in_ci():
        pytest.fail(f"{reason}, and CI may skip nothing")
    pytest.skip(reason)


def system_server(settings: Mapping[str, str] | None = None) -> EmbeddedServer:
    """A server of the system (PostgreSQL 15 on Debian 12), not started yet; skips where there is none."""
    return EmbeddedServer(settings={**SETTINGS, **(settings or {})}, binaries=require_system_binaries())


def backends(server: EmbeddedServer) -> set[int]:
    """Process ids of all processes of a running server but the postmaster's."""
    if server.pid is None:
        return set()
    return {child.pid for child in psutil.Process(server.pid).children(recursive=True)}
