"""Runs ``raypg`` and ``ray`` as a user does: as commands, in an environment that leads to one Ray cluster."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from raypg.demo_cluster import LocalCluster
from raypg.embedded import EmbeddedServer

BIN = Path(sys.executable).parent
RAYPG = str(BIN / "raypg")
RAY = str(BIN / "ray")


def variables_of(server: EmbeddedServer) -> dict[str, str]:
    """The PG* variables that lead to *server*, with its password."""
    at = server.parameters
    names = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "database": "PGDATABASE", "password": "PGPASSWORD"}
    return {name: str(at[key]) for key, name in names.items()}


@contextmanager
def local_cluster(environment: Mapping[str, str]) -> Iterator[LocalCluster]:
    """A Ray cluster with job submission, whose nodes have *environment*."""
    with (
        tempfile.TemporaryDirectory(prefix="raypg-ray-", dir="/tmp", ignore_cleanup_errors=True) as directory,
        LocalCluster(Path(directory), {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", **environment}) as cluster,
    ):
        yield cluster


def run(
    *command: str, environment: Mapping[str, str], cwd: Path | None = None, timeout: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command, env=dict(environment), cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )
