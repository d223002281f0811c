"""The command ``raypg`` on a real Ray cluster and a real PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from commands import RAYPG, run, variables_of
from pools import unique_name
from waiting import eventually, wait_until

import raypg
from raypg.demo_cluster import LocalCluster
from raypg.embedded import EmbeddedServer

SOMEBODY_IS_SILENT = re.compile(r'does not answer|silent for|"(circuit_breaker|alerts|figures)": null')
"""In what ``raypg status`` says: an actor that was asked has needed longer than its moment."""


class Command:
    """``raypg`` in an empty directory."""

    def __init__(self, cluster: LocalCluster, pg: EmbeddedServer, directory: Path) -> None:
        self.environment = {**cluster.environment(), **variables_of(pg)}
        self.directory = directory
        self.password = pg.password

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = run(RAYPG, *arguments, environment=self.environment, cwd=self.directory)
        assert self.password not in done.stdout + done.stderr
        return done

    def good(self, *arguments: str) -> str:
        """Its output, of a run that must succeed and may not complain."""
        done = self(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def bad(self, *arguments: str) -> str:
        """The one line of complaint, of a run that must fail."""
        done = self(*arguments)
        assert done.returncode == 1, done
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("raypg: ")
        return line

    def status(self, *arguments: str) -> str:
        """What ``status`` says, which is asked again while somebody has not answered it in time."""

        def told() -> str | None:
            shown = self.good("status", *arguments)
            return None if SOMEBODY_IS_SILENT.search(shown) else shown

        return wait_until(told, timeout=60, what="everybody answers `raypg status`") or ""

    def configure(self, text: str) -> None:
        """Write raypg.toml."""
        (self.directory / "raypg.toml").write_text(text)


@pytest.fixture
def command(command_cluster: LocalCluster, pg18: EmbeddedServer, tmp_path: Path) -> Command:
    return Command(command_cluster, pg18, tmp_path)


@pytest.fixture(scope="module")
def running(
    command_cluster: LocalCluster, pg18: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Name of a pool that runs. Nobody asks it for anything but the one test that counts what it was asked."""
    name = unique_name("cli")
    command = Command(command_cluster, pg18, tmp_path_factory.mktemp("running"))
    command.good("up", name)  # PG* alone say where
    yield name
    command.good("down", name)


def table_of(name: str, pg: EmbeddedServer, more: str = "") -> str:
    at = pg.parameters
    return f"""
[pools.{name}]
host = "{at["host"]}"
port = {at["port"]}
user = "{at["user"]}"
database = "{at["database"]}"
password_env = "DB_PASSWORD"
max_connections = 3
application_name = "{name}"
{more}
"""


async def connections(direct: asyncpg.Connection, name: str) -> int:
    query = "select count(*)::int from pg_stat_activity where application_name like $1"
    return int(await direct.fetchval(query, f"raypg:%{name}"))


async def test_up_status_down(command: Command, pg18: EmbeddedServer, direct: asyncpg.Connection) -> None:
    name = unique_name("cli")
    del command.environment["PGPASSWORD"]  # the file says where it is
    command.configure(table_of(name, pg18))
    assert command.good("up") == f"{name}: started, at most 3 connections\n"
    assert command.good("up") == f"{name}: runs already, at most 3 connections\n"
    assert 1 <= await connections(direct, name) <= 3

    shown = command.status()  # of all pools
    assert re.search(rf"{name}  postgres@127.0.0.1:{pg18.port}/postgres  \d of 3 connections, 0 waiting", shown)
    (figures,) = json.loads(command.status(name, "--json"))
    assert figures["pool_name"] == name
    assert figures["max_connections"] == 3
    assert [worker["reachable"] for worker in figures["workers"]] == [True]

    command.configure(table_of(name, pg18).replace("max_connections = 3", "max_connections = 4"))
    assert "max_connections: runs with 3, asked for 4" in command.bad("up")

    done = command.good("scale", name, "--workers", "2", "--max-connections", "5")
    assert done == f"{name}: at most 5 connections, 2 workers\n"
    assert "each worker needs a connection" in command.bad("scale", name, "--workers", "9")
    assert command.good("restart", "--pool", name) == f"{name}: 2 workers replaced, and the pool's own actor\n"
    shown = command.status(name)
    assert re.search(r"\d of 5 connections, 0 waiting", shown)
    assert shown.count(" serving ") == 2
    assert "give the name of one pool" in command("restart").stderr

    assert command.good("down", name) == f"{name}: ended\n"

    async def none_left() -> bool:
        return await connections(direct, name) == 0

    await eventually(none_left, 10)
    assert f"no pool named '{name}' runs" in command.bad("down", name)
    assert f"no pool named '{name}' runs" in command.bad("status", name)


HOLD = """
import asyncio, sys, ray
from raypg import get_pool

async def hold():
    async with get_pool(sys.argv[1]).acquire() as connection:
        print(connection.backend_pid, flush=True)
        await asyncio.to_thread(sys.stdin.read)

ray.init(logging_level="ERROR", log_to_driver=False)
asyncio.run(hold())
"""


def test_status_names_who_holds_a_lease(command: Command, running: str) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, running],
        env=command.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        backend = holder.stdout.readline().strip()
        assert backend.isdigit()
        shown = command.status(running)
        (line,) = [line for line in shown.splitlines() if f" {backend} " in line]
        assert "driver" in line
        assert f" {holder.pid} " in line
    finally:
        holder.communicate("", timeout=30)


FORCE = """
import asyncio, sys, ray, raypg
ray.init(logging_level="ERROR", log_to_driver=False)
name, how, reason = sys.argv[1:]
asyncio.run(getattr(raypg.get_pool(name).circuit_breaker, how)(reason))
"""


async def test_status_says_that_the_breaker_is_open_and_why(command: Command, running: str) -> None:
    def force(how: str, reason: str) -> None:
        forced = run(sys.executable, "-c", FORCE, running, how, reason, environment=command.environment)
        assert forced.returncode == 0, forced.stderr

    shown = command.status(running)
    assert "circuit breaker" not in shown  # nothing is wrong
    assert "alert:" not in shown
    force("force_open", "maintenance until noon")
    shown = command.status(running)
    (line,) = [line for line in shown.splitlines() if "circuit breaker" in line]
    assert line.strip() == "circuit breaker: open; until it is lifted: maintenance until noon"

    def fires() -> str | None:
        return next((line for line in command.status(running).splitlines() if "alert:" in line), None)

    alert = await eventually(fires, timeout=30)
    assert re.fullmatch(
        r" *alert: Circuit breaker open \(critical, for \d+ s\): .*: circuit_breaker_open is 1, .*half_open is 0",
        alert,
    )
    (told,) = json.loads(command.status(running, "--json"))
    assert told["circuit_breaker"]["forced_reason"] == "maintenance until noon"
    assert [(alert["rule_id"], alert["state"]) for alert in told["alerts"]] == [("default-breaker-open", "firing")]
    force("force_close", "it is noon")


def test_what_is_wrong_is_said_before_a_cluster_is_looked_for(command: Command) -> None:
    command.environment["RAY_ADDRESS"] = "127.0.0.1:1"
    command.configure("[pools.a]\nmax_conections = 3")
    assert "max_conections: unknown setting (did you mean 'max_connections'?)" in command.bad("up")


def test_a_wrong_password(command: Command) -> None:
    command.environment["PGPASSWORD"] = "n0t-the-passw0rd"
    name = unique_name("cli")
    complaint = command.bad("up", name)
    assert name in complaint
    assert "password authentication failed" in complaint
    assert "n0t-the-passw0rd" not in complaint
    assert name not in command.good("status")


def test_where_no_cluster_is(command: Command) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        complaint = command.bad("status", "--address", address)
    assert f"no Ray cluster answers at {address}" in complaint
    assert "ray start --head" in complaint


def test_without_the_token(command: Command) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        del command.environment[name]
    done = run(RAYPG, "status", environment=command.environment, cwd=command.directory)
    assert done.returncode == 1
    assert "asks for a token: set RAY_AUTH_MODE=token" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_version_and_help(command: Command) -> None:
    assert command.good("--version") == f"raypg {raypg.__version__}\n"
    shown = command.good("--help")
    assert all(word in shown for word in ("demo", "up", "status", "down"))
    assert command("wrong").returncode == 2


def spawn(command: Command, *arguments: str, program: str = RAYPG) -> tuple[int, int]:
    """Run ``raypg``, or another *program*, on a terminal of its own: (process id, terminal)."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background are deaf to it
        os.chdir(command.directory)
        os.execve(program, [program, *arguments], {**command.environment, "TERM": "xterm", "COLUMNS": "200"})
    return pid, terminal


async def shows(terminal: int, expected: str, timeout: float = 60.0) -> str:
    """All that is written to the terminal until *expected* is among it."""
    seen = ""

    def more() -> bool:
        nonlocal seen
        while select.select([terminal], [], [], 0)[0]:
            seen += os.read(terminal, 65536).decode(errors="replace")
        return re.search(expected, seen) is not None

    await eventually(more, timeout=timeout, what=f"the terminal shows {expected}")
    return seen


WRITES = """
import ray, raypg
ray.init(address="auto", log_to_driver=False)
pool = raypg.get_pool("{pool}")
pool.sync.execute("create table numbers (id bigint)")
context = ray.data.DataContext.get_current()
context.enable_rich_progress_bars, context.use_ray_tqdm = True, False
ray.data.range(8_000, override_num_blocks=8).write_datasink(raypg.PostgresDatasink(pool, "numbers", batch_rows=2_000))
print("the write is over,", pool.sync.fetchval("select count(*) from numbers"), "rows")
pool.sync.execute("drop table numbers")
"""


async def test_a_write_is_seen_in_ray_datas_own_bars(command: Command) -> None:
    name = unique_name("bars")
    command.good("up", name)
    program = command.directory / "writes.py"
    program.write_text(WRITES.format(pool=name))
    pid, terminal = spawn(command, str(program), program=sys.executable)
    seen = await shows(terminal, "the write is over, .*rows", timeout=120)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    assert "the write is over, 8000 rows" in plain
    assert re.search(r"Write +100% \S+ 4/4 ", plain), plain
    assert "PostgreSQL numbers finished. 8000 rows" in plain
    await asyncio.to_thread(os.waitpid, pid, 0)
    command.good("down", name)


async def test_watch_and_metrics(command: Command, running: str) -> None:
    code = (
        "import ray, raypg; ray.init(address='auto', log_to_driver=False);"
        f"pool = raypg.get_pool('{running}'); [pool.sync.fetch('select 40 + 2 as answer') for _ in range(7)]"
    )
    done = run(sys.executable, "-c", code, environment=command.environment, cwd=command.directory)
    assert done.returncode == 0, done.stderr
    watching, terminal = spawn(command, "status", "--watch")
    serving, output = spawn(command, "metrics", "serve", "--port", "0")
    try:
        seen = await shows(terminal, rf"{running}[^\n]*closed[^\n]*1 of 1")
        assert "select $1 + $2 as answer" in seen
        at = re.search(r"http://\S+/metrics", await shows(output, r"http://\S+/metrics"))
        assert at is not None

        async def scraped() -> str:
            text: str = await asyncio.to_thread(lambda: urllib.request.urlopen(at[0], timeout=10).read().decode())
            return text if f'queries_total{{pool="{running}"' in text else ""

        text = await eventually(scraped)
        assert f'connection_pool_queries_total{{pool="{running}",type="SELECT"}} 7.0' in text
        assert "raypg_metrics_up 1.0" in text
    finally:
        for pid in (watching, serving):
            os.kill(pid, signal.SIGINT)
        ended = await asyncio.to_thread(lambda: [os.waitpid(pid, 0)[1] for pid in (watching, serving)])
    assert ended == [0, 0]


def test_the_dashboard_where_serve_does_not_run_and_its_port_is_busy(command: Command) -> None:
    """`raypg up` starts Serve for it, and it shows pools that other jobs have made."""
    name, other = unique_name("cli"), unique_name("cli")
    command.configure(
        f"[pools.{name}]\nmax_connections = 2\nenable_monitoring = true\nmonitoring_port = 0\n"
        f"[pools.{other}]\nmax_connections = 3\n"
    )
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # somebody else has it
            busy = stack.enter_context(socket.socket())
            busy.bind(("127.0.0.1", 8000))
            busy.listen()
        done = command("up", name)
    assert done.returncode == 0, done.stderr
    assert "Serve is started without HTTP" in done.stderr
    (url,) = re.findall(r"^dashboard: (http://localhost:\d+)$", done.stdout, re.MULTILINE)
    try:
        command.good("up", other)

        def both() -> dict[str, Any] | None:  # it has just begun to look
            with urllib.request.urlopen(f"{url}/api/pools", timeout=10) as answer:
                shown: dict[str, Any] = json.load(answer)
            return shown if {name, other} <= shown.keys() else None

        shown = wait_until(both, timeout=30) or {}
        assert (shown[name]["max_connections"], shown[other]["max_connections"]) == (2, 3)
        port = url.rpartition(":")[2]
        assert command.good("dashboard", "--port", port) == f"dashboard: {url} (runs already)\n"
        assert len(command.good("token").strip()) >= 16
    finally:
        assert f"{url}: ended" in command.good("dashboard", "--stop")
    assert command.good("dashboard", "--stop") == "no dashboard runs in this Ray cluster\n"
    stopped = run(sys.executable, "-c", "from ray import serve; serve.shutdown()", environment=command.environment)
    assert stopped.returncode == 0, stopped.stderr  # whoever is next wants HTTP
    command.good("down", name)
    command.good("down", other)


def test_files_for_prometheus_and_grafana(command: Command) -> None:
    assert command.good("metrics", "rules").startswith("# Alert rules for raypg")
    assert json.loads(command.good("metrics", "grafana"))["title"] == "raypg"


def test_tables_are_watched_for_caches_until_they_are_not(command: Command, running: str, table: str) -> None:
    assert command.good("cache", "watch", table, "--pool", running) == f"{running}: watched are {table}\n"
    assert command.good("cache", "unwatch", table, "--pool", running) == f"{running}: watched are no tables\n"
