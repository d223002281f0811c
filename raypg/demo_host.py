"""What ``raypg demo`` runs on: Ray, PostgreSQL and a pool, owned by one process without a terminal.

``python -m raypg.demo_host DIRECTORY FLIGHTS KEEP`` tells its story in JSON lines on standard output; the process in
the terminal (:mod:`raypg.demo`) only shows it. When that one goes away, or SIGTERM comes, everything ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

import asyncpg
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from raypg import WorkflowConnectionPool, flights
from raypg.demo_cluster import LocalCluster
from raypg.demo_job import MARK
from raypg.embedded import EmbeddedServer
from raypg.processes import adopt_orphans, end_descendants

POOL = "flights"
CONNECTIONS = 10
TABLES = ("flights", "flights_arrow")
"""What the job fills, by a pipeline of statements and as Arrow."""

LOOK_EVERY = 0.05
"""Seconds between two looks at pg_stat_activity."""

_BACKENDS = """
SELECT count(*)::int FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
"""


_listener: TextIO = sys.stdout


def _take_standard_output() -> None:
    """Keep standard output for our messages: Ray and its processes print to it too, and go to the log from now on."""
    global _listener
    _listener = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)


def tell(kind: str, **what: Any) -> None:
    """Print one line for the process in the terminal."""
    print(json.dumps({"kind": kind, **what}), file=_listener, flush=True)


@contextlib.contextmanager
def step(text: str) -> Iterator[dict[str, str]]:
    """Tell that something begins, and, when the block ends, what came of it (``text`` of the dict)."""
    tell("begin", text=text)
    outcome = {"text": text}
    started = time.perf_counter()
    yield outcome
    tell("end", seconds=time.perf_counter() - started, **outcome)


class Demo:
    """The demo's servers.

    Args:
        directory: for all their files.
        count: flights to load.
    """

    def __init__(self, directory: Path, count: int) -> None:
        self._count = count
        self.cluster = LocalCluster(directory / "ray")
        self.server = EmbeddedServer(directory / "postgresql")
        self.dashboard = ""
        self._most = 0
        self._looks = 0
        self._sums: dict[str, int] = {}
        self._report: dict[str, dict[str, Any]] = {}

    async def run(self, stop: Callable[..., NoReturn]) -> None:
        """Start everything, run the job, check what it did, and tell the report; *stop* handles SIGTERM."""
        with step("PostgreSQL") as outcome:
            self.server.start()
            outcome["text"] = f"PostgreSQL {self.server.version} on port {self.server.port}"
        with step("Ray") as outcome:
            self.cluster.start()
            os.environ.update(self.cluster.variables)
            context = ray.init(logging_level="ERROR", log_to_driver=False)
            signal.signal(signal.SIGTERM, stop)  # ray.init has put its own there
            self.dashboard = f"http://{context.dashboard_url}"
            outcome["text"] = f"Ray {ray.__version__} with {int(ray.cluster_resources()['CPU'])} CPUs"
        async with self._watching_connections():
            with step("Pool") as outcome:
                # Made here and not in the job: the pool's actors inherit the runtime_env of the job that makes them.
                pool = WorkflowConnectionPool(name=POOL, max_connections=CONNECTIONS, **self.server.parameters)
                await pool.process({"operation": "initialize"})
                outcome["text"] = f"Pool {POOL!r}, at most {CONNECTIONS} connections"
            await self._run_job(JobSubmissionClient(self.dashboard))
        with step("Check") as outcome:
            there = await self._check()
            outcome["text"] = f"{there:,} rows are in both tables, and all {len(flights.COLUMNS)} columns add up"
        tell("report", connections=self._most, cap=CONNECTIONS, looks=self._looks, **self._report)
        if self._most > CONNECTIONS:
            raise RuntimeError(f"PostgreSQL saw {self._most} connections, the cap is {CONNECTIONS}")

    def write_environment(self, file: Path) -> Path:
        """Write a file for a shell to read, with all that finds Ray and PostgreSQL; the secrets stay in files."""
        at = self.server.parameters
        passfile = file.with_name("pgpass")
        passfile.touch(0o600)
        passfile.write_text(f"{at['host']}:{at['port']}:*:{at['user']}:{at['password']}\n")
        variables = {
            **self.cluster.variables,
            **{f"PG{key.upper()}": str(at[key]) for key in ("host", "port", "user", "database")},
            "PGPASSFILE": str(passfile),
        }
        file.write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()))
        return file

    @contextlib.asynccontextmanager
    async def _watching_connections(self) -> AsyncIterator[None]:
        """Count all client connections of the server but our own, over a connection that is not of the pool."""
        connection = await asyncpg.connect(**self.server.parameters)

        async def look() -> None:
            shown = -1
            while True:
                now = await connection.fetchval(_BACKENDS)
                self._looks += 1
                self._most = max(self._most, now)
                if now != shown:
                    tell("connections", now=now, most=self._most, cap=CONNECTIONS)
                    shown = now
                await asyncio.sleep(LOOK_EVERY)

        watcher = asyncio.create_task(look())
        try:
            yield
        finally:
            watcher.cancel()
            await asyncio.wait((watcher,))
            await connection.close()
            if not watcher.cancelled() and (error := watcher.exception()) is not None:
                raise error

    async def _run_job(self, client: JobSubmissionClient) -> None:
        """Submit the job, and pass on what it tells until it ends."""
        with step("Ray job") as outcome:
            command = [sys.executable, "-m", "raypg.demo_job", POOL, str(self._count)]
            job = await asyncio.to_thread(client.submit_job, entrypoint=shlex.join(command))
            outcome["text"] = f"Ray job {job} is submitted"
        # The job's own log, of which the API gives a new part only once a second.
        log = self.cluster.session / "logs" / f"job-driver-{job}.log"
        lines = _Lines(log)
        asked = asyncio.create_task(asyncio.to_thread(client.get_job_status, job))
        while True:
            ended = asked.done() and asked.result().is_terminal()
            for line in lines.new():
                self._heard(line)
            if ended:
                break
            if asked.done():
                asked = asyncio.create_task(asyncio.to_thread(client.get_job_status, job))
            await asyncio.sleep(0.1)
        if asked.result() != JobStatus.SUCCEEDED:
            said = [line for line in lines.other if line.strip()]
            raise RuntimeError(f"the job {asked.result().lower()}: {said[-1] if said else 'it said nothing'}")

    def _heard(self, line: str) -> None:
        if not line.startswith(MARK):
            return
        message = json.loads(line.removeprefix(MARK))
        kind = message.pop("kind")
        if kind == "source":
            self._sums = message["sums"]
        elif kind in ("loaded", "asked"):
            self._report[message.pop("name").replace(" ", "_")] = message
        else:
            tell(kind, **message)

    async def _check(self) -> int:
        """Compare the tables with the source, column by column, over a connection that is not of the pool."""
        connection = await asyncpg.connect(**self.server.parameters)
        try:
            for table in TABLES:
                there = dict(await connection.fetchrow(flights.sums_query(table)))
                wrong = {key: (value, there[key]) for key, value in self._sums.items() if there[key] != value}
                if wrong or there["count"] != self._count:
                    raise RuntimeError(f"table {table} differs from the source (source, table): {wrong}")
        finally:
            await connection.close()
        return self._count


class _Lines:
    """The lines that are added to a file; those for the screen are passed on, the last others remembered."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._position = 0
        self._rest = ""
        self.other: list[str] = []

    def new(self) -> list[str]:
        """Complete lines since the last call."""
        try:
            with self._file.open(encoding="utf-8", errors="replace", newline="\n") as file:
                file.seek(self._position)
                text = self._rest + file.read()
                self._position = file.tell()
        except FileNotFoundError:
            return []
        *lines, self._rest = text.split("\n")
        self.other = [*self.other, *(line for line in lines if not line.startswith(MARK))][-20:]
        return lines


def _end(status: int, directory: Path) -> NoReturn:
    """End all that we started, then us; also from the signal handler, wherever the main thread is."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_descendants(patience=5.0)
    # Whoever started us may be gone.
    shutil.rmtree(directory, ignore_errors=True)
    # Not sys.exit: exit hooks of Ray would wait for the processes that have just been ended.
    os._exit(status)


def _watch_listener(kept: threading.Event) -> None:
    """End with whom we talk to: standard input is a pipe from there, which nobody writes to."""
    sys.stdin.buffer.read()
    if not kept.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


def main(directory: Path, count: int, keep: bool) -> NoReturn:
    """Run the demo and end; exit status 0, 1 after an error, 130 if it was stopped."""
    adopt_orphans()
    _take_standard_output()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    kept = threading.Event()

    def stop(*_: object) -> NoReturn:
        _end(0 if kept.is_set() else 130, directory)

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=_watch_listener, args=(kept,), daemon=True).start()
    try:
        demo = Demo(directory, count)
        asyncio.run(demo.run(stop))
        if keep:
            file = demo.write_environment(directory / "env")
            kept.set()
            tell("kept", pid=os.getpid(), environment=str(file), dashboard=demo.dashboard)
            while True:
                signal.pause()
    except SystemExit:
        stop()  # Ray's handler was the faster one
    except Exception as error:
        tell("error", text=" ".join(str(error).split()) or type(error).__name__)
        _end(1, directory)
    _end(0, directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "keep")
