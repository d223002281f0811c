"""A real PgBouncer for tests, on a loopback port in front of a running server."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import pytest
from pgserver import in_ci
from waiting import wait_until

from raypg.binaries import clean_environment, public_directory, server_account
from raypg.embedded import EmbeddedServer

HOST = "127.0.0.1"
_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def require_pgbouncer() -> str:
    """Path of the program; skips the test without one, or fails it under ``CI``."""
    found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is not None:
        return found
    reason = "PgBouncer is not installed (Debian: apt-get install pgbouncer)"
    if in_ci():
        pytest.fail(f"{reason}, and CI may skip nothing")
    pytest.skip(reason)


class PgBouncer:
    """One PgBouncer in front of *server*, gone when the process that started it is gone.

    Args:
        server: a running server; its superuser is the one user that PgBouncer lets in.
        mode: what is shared: whole sessions, or transactions.
        size: connections to the server.
        settings: further lines of ``[pgbouncer]``.
    """

    def __init__(
        self,
        server: EmbeddedServer,
        mode: Literal["transaction", "session"] = "transaction",
        size: int = 3,
        **settings: str,
    ) -> None:
        self._program = require_pgbouncer()
        self._server = server
        self._mode = mode
        self._size = size
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def parameters(self) -> dict[str, Any]:
        """``host``, ``port``, ``user``, ``password`` and ``database``, as asyncpg and the pool take them."""
        return {**self._server.parameters, "host": HOST, "port": self.port}

    def __enter__(self) -> Self:
        account = server_account()
        self.directory = Path(tempfile.mkdtemp(prefix="raypg-pgb-", dir=public_directory(account)))
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port = probe.getsockname()[1]
        server = self._server.parameters
        users = self.directory / "users"
        users.write_text(f'"{server["user"]}" "{server["password"]}"\n')
        lines = {
            "listen_addr": HOST,
            "listen_port": str(self.port),
            "unix_socket_dir": "",
            "auth_type": "scram-sha-256",
            "auth_file": str(users),
            "admin_users": server["user"],
            "logfile": str(self.directory / "log"),
            "pool_mode": self._mode,
            "default_pool_size": str(self._size),
            **self._settings,
        }
        config = self.directory / "pgbouncer.ini"
        config.write_text(
            f"[databases]\n* = host={server['host']} port={server['port']}\n[pgbouncer]\n"
            + "".join(f"{key} = {value}\n" for key, value in lines.items())
        )
        if account is not None:
            for path in (self.directory, users, config):
                os.chown(path, account.uid, account.gid)
        self.start()
        return self

    def start(self) -> None:
        """Start it, on the same port as before, and wait until it listens."""
        account = server_account()
        identity: dict[str, Any] = {}
        if account is not None:  # it refuses to run as root
            identity = {"user": account.uid, "group": account.gid, "extra_groups": []}
        self._process = subprocess.Popen(
            [self._program, "-q", str(self.directory / "pgbouncer.ini")],
            cwd="/",
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            preexec_fn=lambda: _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
            **identity,
        )
        wait_until(self._is_up, what=f"PgBouncer listens; its log: {self.log}")

    def _is_up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log
        with socket.socket() as probe:
            return probe.connect_ex((HOST, self.port)) == 0

    @property
    def log(self) -> str:
        """What it has logged so far."""
        log = self.directory / "log"
        return log.read_text() if log.exists() else ""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def stop(self) -> None:
        """End it at once, and with it all its connections."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)  # SIGINT would wait for clients
            self._process.wait(10)
            self._process = None
