"""The embedded server: real ones, started, crashed, orphaned; as root and as a plain user."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest
from pgserver import backends, require_system_binaries
from waiting import wait_until

from raypg import binaries
from raypg.embedded import EmbeddedServer, EmbeddedServerError, stop_detached, system_binaries
from raypg.errors import ConfigError

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(settings={"max_connections": "20"}) as running:
        yield running


@pytest.fixture
def public_path() -> Iterator[Path]:
    """Like tmp_path, which only its owner may reach."""
    base = binaries.public_directory(binaries.server_account())
    path = base / f"raypg-test-{os.urandom(6).hex()}"
    path.mkdir(0o755)
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


async def fetchval(server: EmbeddedServer, query: str) -> object:
    connection = await asyncpg.connect(server.dsn)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_start_gives_a_safe_server_on_loopback_only(server: EmbeddedServer) -> None:
    assert server.running
    assert await fetchval(server, "select current_setting('fsync')") == "on"
    assert await fetchval(server, "select current_setting('max_connections')") == "20"
    assert await fetchval(server, "select current_setting('server_encoding')") == "UTF8"
    listening = {
        connection.laddr.ip
        for connection in psutil.Process(server.pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


async def test_a_wrong_password_is_refused(server: EmbeddedServer) -> None:
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(server.conninfo(password="wrong"))


async def test_conninfo_quotes_what_it_is_given(server: EmbeddedServer) -> None:
    password = "p@ss/w:rd%?ü"
    connection = await asyncpg.connect(server.dsn)
    await connection.execute(f"create role \"o'dd@user\" login password '{password}'")
    await connection.close()
    dsn = server.conninfo(user="o'dd@user", password=password, application_name="a b")
    odd = await asyncpg.connect(dsn)
    assert await odd.fetchrow("select current_user, current_setting('application_name')") == (
        "o'dd@user",
        "a b",
    )
    await odd.close()


def test_the_password_is_in_no_repr_and_no_file(server: EmbeddedServer) -> None:
    assert server.password not in repr(server)
    assert not list(server.directory.glob(".password"))
    assert server.password not in " ".join(psutil.Process(server.pid).cmdline())


def test_start_twice_changes_nothing(server: EmbeddedServer) -> None:
    before = server.pid
    assert server.start().pid == before


def test_its_programs_run_as_its_user(server: EmbeddedServer) -> None:
    assert server.run("psql", "-Atc", "select 6 * 7").stdout.strip() == "42"
    assert server.bin("pg_basebackup").is_file()
    with pytest.raises(ConfigError, match="pg_nothing"):
        server.bin("pg_nothing")


@pytest.mark.parametrize("mode", ["smart", "fast", "immediate", "kill"])
async def test_data_survives_every_way_to_stop(server: EmbeddedServer, mode: str) -> None:
    port = server.port
    connection = await asyncpg.connect(server.dsn)
    await connection.execute("create table if not exists kept (mode text)")
    await connection.execute("insert into kept values ($1)", mode)
    children = backends(server)
    if mode == "smart":  # waits for its clients
        await connection.close()
    if mode == "kill":
        server.kill()
    else:
        server.stop(mode)  # type: ignore[arg-type]
    assert not server.running
    assert server.pid is None
    assert all(gone(pid) for pid in children)
    connection.terminate()
    with pytest.raises(ConnectionRefusedError):
        await asyncpg.connect(server.dsn)
    server.start()
    assert server.port == port
    assert await fetchval(server, f"select count(*) from kept where mode = '{mode}'") == 1


async def test_kill_ends_busy_backends_too(server: EmbeddedServer) -> None:
    connection = await asyncpg.connect(server.dsn)
    # Computes without ever looking whether the postmaster lives.
    busy = connection.fetch("select count(*) from generate_series(1, 100000000000::bigint)")
    task = asyncio.ensure_future(busy)
    pid = connection.get_server_pid()
    server.kill()
    assert gone(pid)
    with pytest.raises(asyncpg.ConnectionDoesNotExistError):
        await task
    server.start()


async def test_restart_keeps_the_port_and_the_data(server: EmbeddedServer) -> None:
    await fetchval(server, "create table over_restart as select 1 as one")
    port, pid = server.port, server.pid
    server.restart()
    assert server.port == port
    assert server.pid != pid
    assert await fetchval(server, "select one from over_restart") == 1


def test_close_leaves_nothing() -> None:
    server = EmbeddedServer().start()
    directory, processes = server.directory, [server.pid, *backends(server)]
    server.close()
    server.close()
    assert not directory.exists()
    assert all(gone(pid) for pid in processes if pid)


def test_a_kept_directory_is_used_again(public_path: Path) -> None:
    directory = public_path / "pg"
    with EmbeddedServer(directory, password="first") as server:
        server.run("psql", "-c", "create table t as select 5 as five")
    with pytest.raises(ConfigError, match="password"):
        EmbeddedServer(directory)
    with EmbeddedServer(directory, password="first") as server:
        assert server.run("psql", "-Atc", "select five from t").stdout == "5\n"
    assert directory.exists()


def test_a_bad_setting_is_reported_with_the_log() -> None:
    server = EmbeddedServer(settings={"shared_buffers": "plenty"})
    with pytest.raises(EmbeddedServerError, match='invalid value for parameter "shared_buffers"'):
        server.start()
    server.close()
    assert not server.directory.exists()


def test_a_port_in_use_is_reported_with_the_log() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        server = EmbeddedServer(port=busy.getsockname()[1])
        with pytest.raises(EmbeddedServerError, match="Address already in use"):
            server.start()
        server.close()


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_cannot_be_is_refused(port: int) -> None:
    with pytest.raises(ConfigError, match=str(port)):
        EmbeddedServer(port=port)


def test_a_directory_without_a_server_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no PostgreSQL server"):
        EmbeddedServer(binaries=tmp_path)


@pytest.mark.pg15
async def test_the_systems_postgresql(pg15: EmbeddedServer) -> None:
    expected = require_system_binaries().parent.name
    assert pg15.version.split(".")[0] == expected
    assert str(await fetchval(pg15, "show server_version")).startswith(expected)


def test_system_binaries_of_a_version_that_is_not_there() -> None:
    assert system_binaries(7) is None


# -- what happens to it when its owner goes -----------------------------------------------------------------

OWNER = textwrap.dedent("""
    import sys, threading
    from raypg.embedded import EmbeddedServer
    servers = []
    def start():
        servers.append(EmbeddedServer(detach={detach}).start())
    # The thread that forks ends long before the process does.
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    server = servers[0]
    print(server.pid, server._watchdog.pid, server.directory, server.dsn, flush=True)
    sys.stdin.readline()
    {end}
""")


def start_owner(
    end: str = "", detach: bool = False, python: Path | str = sys.executable, **options: Any
) -> tuple[subprocess.Popen[str], list[str]]:
    script = OWNER.format(end=end, detach=detach)
    owner = subprocess.Popen(
        [python, "-c", script],
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )
    assert owner.stdout is not None
    words = owner.stdout.readline().split()
    assert len(words) == 4, "the owner did not start its server"
    return owner, words


def check_that_nothing_is_left(postmaster: int, watchdog: int, directory: str) -> None:
    wait_until(lambda: gone(postmaster), 15, "the postmaster has gone")
    wait_until(lambda: gone(watchdog), 15, "the watchdog has gone")
    wait_until(lambda: not Path(directory).exists(), 5, "its directory has gone")


@pytest.mark.parametrize(
    "end",
    [
        pytest.param("", id="return"),
        pytest.param("sys.exit(3)", id="exit"),
        pytest.param("raise RuntimeError('wanted by the test')", id="exception"),
        pytest.param("import os; os._exit(0)", id="_exit"),
        pytest.param("import os, signal; os.kill(os.getpid(), signal.SIGINT)", id="ctrl-c"),
        pytest.param("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", id="sigterm"),
        pytest.param("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", id="sigkill"),
    ],
)
def test_nothing_outlives_the_owner(end: str) -> None:
    owner, (postmaster, watchdog, directory, _) = start_owner(end, stderr=subprocess.DEVNULL)
    assert not gone(int(postmaster)), "the end of the thread that started it must not end the server"
    owner.communicate("\n", timeout=30)
    check_that_nothing_is_left(int(postmaster), int(watchdog), directory)


def test_a_killed_watchdog_takes_the_server_with_it() -> None:
    owner, (postmaster, watchdog, _, _) = start_owner()
    os.kill(int(watchdog), signal.SIGKILL)
    wait_until(lambda: gone(int(postmaster)), 15, "the postmaster has gone")
    owner.communicate("\n", timeout=30)


def test_a_forked_child_of_the_owner_does_not_end_it(server: EmbeddedServer) -> None:
    child = os.fork()
    if child == 0:
        server.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert server.run("psql", "-Atc", "select 1").stdout == "1\n"


async def test_a_detached_server_outlives_its_owner() -> None:
    owner, (postmaster, watchdog, directory, dsn) = start_owner(detach=True)
    owner.kill()
    owner.communicate()
    connection = await asyncpg.connect(dsn)
    assert await connection.fetchval("select 1") == 1
    await connection.close()
    assert stop_detached(directory)
    assert not stop_detached(directory)
    wait_until(lambda: gone(int(postmaster)) and gone(int(watchdog)), 15, "both have gone")
    shutil.rmtree(directory)


# -- users and permissions ----------------------------------------------------------------------------------


@as_root
def test_as_root_the_server_is_another_user(server: EmbeddedServer) -> None:
    account = binaries.server_account()
    assert account is not None
    assert psutil.Process(server.pid).uids().effective == account.uid != 0
    assert psutil.Process(server.pid).gids().effective == account.gid != 0
    assert (server.directory / "data").stat().st_uid == account.uid


@as_root
def test_as_a_plain_user() -> None:
    user = pwd.getpwnam("nobody")
    account = binaries.Account("nobody", user.pw_uid, user.pw_gid, frozenset({user.pw_gid}))
    # The Python of a virtual environment may be one below /root; the system's can use the same packages.
    same = Path("/usr/bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    pythons = [path.resolve() for path in (Path(sys.executable), same) if path.exists()]
    packages = [Path(binaries.__file__).parents[1], binaries.wheel_binaries().parents[2]]
    python = next((path for path in pythons if binaries.may_reach(path.parent, account)), None)
    if python is None or not all(binaries.may_reach(path, account) for path in packages):
        pytest.skip("user nobody cannot reach this checkout or its Python")
    owner, (postmaster, watchdog, directory, _) = start_owner(
        python=python,
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=[],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(map(str, packages))},
    )
    assert psutil.Process(int(postmaster)).uids().effective == user.pw_uid
    owner.kill()
    owner.communicate()
    check_that_nothing_is_left(int(postmaster), int(watchdog), directory)


@as_root
def test_a_private_directory_is_refused_with_a_reason(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(ConfigError, match="cannot be reached by user"):
        EmbeddedServer(tmp_path / "pg").start()


@as_root
@pytest.mark.parametrize("mode", [0o700, 0o755], ids=["private parent", "umask 077"])
def test_programs_that_only_root_can_reach(mode: int, public_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a virtual environment below /root, or one that was made under umask 077."""
    original = binaries.wheel_binaries()
    package = original.parent.parent
    site = public_path / "site-packages"
    skip = shutil.ignore_patterns("include", "pginstall")
    shutil.copytree(package, site / package.name, ignore=skip)
    shutil.copytree(package.parent / f"{package.name}.libs", site / f"{package.name}.libs")
    if mode == 0o755:
        for path in site.rglob("*"):
            path.chmod(0o700 if path.is_dir() or path.stat().st_mode & 0o100 else 0o600)
    else:
        site.chmod(mode)
    private = site / package.name / original.parent.name / "bin"
    with pytest.raises((PermissionError, subprocess.CalledProcessError)):
        subprocess.run([private / "postgres", "--version"], check=True, user="nobody", group=65534, extra_groups=[])
    copies = public_path / "tmp"
    copies.mkdir()
    copies.chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(copies))
    with EmbeddedServer(binaries=private) as server:
        assert server.run("psql", "-Atc", "select 1").stdout == "1\n"
        first = server.bin("postgres")
        assert first.is_relative_to(copies)
    stamp = first.stat().st_ino
    with EmbeddedServer(binaries=private) as again:
        assert again.bin("postgres").stat().st_ino == stamp, "copied once"
    (first.parent / "pgbench").unlink()
    assert binaries.readable_tree(private, binaries.server_account()) == first.parent, "the same place"
    assert (first.parent / "pgbench").exists(), "a copy that lost a file is made anew"
    copy = next(path for path in copies.iterdir() if path.name.startswith("raypg-postgresql-"))
    os.chown(copy, 65534, 65534)
    with pytest.raises(ConfigError, match="belongs to another user"):
        EmbeddedServer(binaries=private)
