"""A Ray cluster of this machine alone, for the demo: beside any other, on free ports, gone when its owner is gone.

It is ``ray start --head --block`` and not ``ray.init(address="local")``, because only the command lets the port of
the node's agent be chosen: with the default one a second cluster on a machine cannot run submitted jobs.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from raypg.errors import RaypgError

PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.05


class ClusterError(RaypgError):
    """Ray did not start. ``args``: (message,), which ends with what Ray said."""


class LocalCluster:
    """One Ray node with dashboard and job submission.

    Args:
        directory: for Ray's files and the token; created if missing. Short: socket paths end at 107 bytes.
        environment: variables for Ray's processes, beside our own.
        cpus: CPUs that the node offers.

    Attributes:
        address: of the cluster, once it is started, as ``ray.init`` and ``RAY_ADDRESS`` take it.
        session: directory of the session's logs and sockets.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str] | None = None, cpus: int | None = None) -> None:
        self.directory = directory
        self.address = ""
        self.session = directory / "session_latest"
        self._cpus = cpus or max(2, os.cpu_count() or 2)
        self._extra = dict(environment or {})
        self._log = directory / "ray.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def variables(self) -> dict[str, str]:
        """What a process needs in its environment to reach the cluster: before it imports Ray, which reads
        ``RAY_AUTH_MODE`` only then. The token itself is in a file."""
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.directory / "token")}
        return {"RAY_ADDRESS": self.address, **token} if self.address else token

    def environment(self) -> dict[str, str]:
        """Our environment with :attr:`variables`, and without what would lead to another cluster."""
        kept = {name: value for name, value in os.environ.items() if name not in _OF_OTHER_CLUSTERS}
        return {**kept, **self._extra, **self.variables}

    def start(self, timeout: float = 90.0) -> LocalCluster:
        """Start Ray and wait until it can be connected to.

        Raises:
            ClusterError: it did not start within *timeout* seconds.
        """
        # Ray's ports are open to the network, so even a demo's cluster wants a token of its own.
        self.directory.mkdir(parents=True, exist_ok=True)
        token = self.directory / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        client, agent = _free_ports(2)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0"),
                    *("--disable-usage-stats", f"--temp-dir={self.directory}", f"--num-cpus={self._cpus}"),
                    *("--dashboard-host=127.0.0.1", f"--dashboard-port={_free_ports(1, first=8265)[0]}"),
                    *(f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
                    *("--object-store-memory", str(512 * 1024 * 1024)),
                ],
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in a terminal is for the owner, who ends us in good order
                preexec_fn=_die_with_parent,
            )
        return self._wait(time.monotonic() + timeout)

    def _wait(self, deadline: float) -> LocalCluster:
        assert self._process is not None
        found = self.directory / "ray_current_cluster"
        # The address is there before the node is; the last line of the log comes after both.
        while not (found.exists() and b"--block" in self._log.read_bytes()):
            if self._process.poll() is not None:
                raise ClusterError(f"Ray ended while it started: {self._said()}")
            if time.monotonic() > deadline:
                raise ClusterError(f"Ray did not start in time: {self._said()}")
            time.sleep(POLL_SECONDS)
        self.address = found.read_text().strip()
        return self

    def stop(self, timeout: float = 5.0) -> None:
        """End Ray's processes: politely, and after *timeout* seconds not. Twice does nothing."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()  # the kernel then ends its children
                process.wait()

    def __enter__(self) -> LocalCluster:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _said(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"


_OF_OTHER_CLUSTERS = frozenset(
    {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_CONFIG_JSON_ENV_VAR"}
)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _free_ports(count: int, first: int = 0) -> list[int]:
    """Ports that nobody uses now, *first* among them if it is one."""
    with ExitStack() as probes:
        ports: list[int] = []
        while len(ports) < count:
            probe: Any = probes.enter_context(socket.socket())
            try:
                probe.bind(("127.0.0.1", first))
            except OSError:
                first = 0
                continue
            ports.append(int(probe.getsockname()[1]))
            first = 0
        return ports
