"""Where a password comes from.

What travels to the workers is the description of a source; the password itself is asked for at each connect,
on the node that connects. So a rotated password or a short-lived token is picked up without a restart. A
literal password is the one secret that must travel; it shows in no repr, and leaves the object only through
``read`` and ``to_dict``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import re
import shlex
import signal
import stat
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from raypg.errors import ConfigError, ConnectError

__all__ = ["Kind", "PasswordSource"]

Kind = Literal["none", "literal", "env", "file", "command"]

_COMMAND_TIMEOUT = 10.0  # seconds
_COMMAND_OUTPUT_LIMIT = 64 * 1024  # bytes; cloud tokens have 1–3 kB

_logger = logging.getLogger("raypg")


class PasswordSource:
    """Immutable, picklable description of where to get a password; compares in constant time.

    Make one with ``none``, ``literal``, ``env``, ``file`` or ``command``.

    Attributes:
        kind: ``none`` (PGPASSWORD, then PGPASSFILE or ``~/.pgpass``, of the worker), ``literal``, ``env``
            (an environment variable of the worker), ``file`` (an entry of a passfile) or ``command``.
    """

    __slots__ = ("_timeout", "_value", "kind")

    kind: Kind
    _value: str
    _timeout: float

    def __init__(self, kind: Kind, value: str = "", timeout: float = _COMMAND_TIMEOUT) -> None:
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "_value", value)
        object.__setattr__(self, "_timeout", timeout)

    @classmethod
    def none(cls) -> PasswordSource:
        return cls("none")

    @classmethod
    def literal(cls, password: str) -> PasswordSource:
        """Raises ConfigError if PostgreSQL's protocol cannot carry the password: NUL, or not UTF-8."""
        if not _is_sendable(password):
            raise ConfigError("password: holds a NUL character, or cannot be encoded as UTF-8")
        return cls("literal", password)

    @classmethod
    def env(cls, variable: str) -> PasswordSource:
        """Raises ConfigError if it cannot be the name of an environment variable."""
        # Strict, and not shown: who mistakes this key for `password` has written the password here.
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", variable):
            raise ConfigError("password_env: must be the name of an environment variable, not the password")
        return cls("env", variable)

    @classmethod
    def file(cls, path: str | os.PathLike[str]) -> PasswordSource:
        """A passfile in PostgreSQL's format; ``~`` is the home directory on the worker."""
        text = os.fspath(path)
        if not text or "\0" in text:
            raise ConfigError("passfile: must be the path of a passfile")
        return cls("file", text)

    @classmethod
    def command(cls, command: str | Sequence[str], timeout: float = _COMMAND_TIMEOUT) -> PasswordSource:
        """A program that prints the password; run without a shell.

        Args:
            command: the words, or one string that is split as a shell would split it.
            timeout: seconds it may take.
        """
        try:
            words = shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
        except ValueError:
            # `from None`: the command may hold a secret, and the original error may show it.
            raise ConfigError("password_command: quotes are not closed") from None
        if not words or not words[0] or any("\0" in word for word in words):
            raise ConfigError("password_command: must be a program and its arguments")
        return cls("command", shlex.join(words), timeout)

    async def read(self, *, host: str, port: int, database: str, user: str) -> str | None:
        """Ask the source, here and now.

        The place is needed to find the entry of a passfile, and is given to a command as PGHOST, PGPORT,
        PGDATABASE and PGUSER.

        Returns:
            the password, or None if the source knows none for this place.

        Raises:
            ConnectError: (``authentication_failed``) the source failed; says which, never what it holds.
        """
        if self.kind == "literal":
            return self._value
        if self.kind == "env":
            password = os.environ.get(self._value)
            if password is None:
                raise self._failed("it is not set in the worker's environment")
            if not _is_sendable(password):
                raise self._failed("it is not UTF-8")
            return password
        if self.kind == "command":
            return await self._run({"PGHOST": host, "PGPORT": str(port), "PGDATABASE": database, "PGUSER": user})
        place = (host, str(port), database, user)
        if self.kind == "file":
            try:
                return await asyncio.to_thread(_look_up, self._value, place)
            except (OSError, RuntimeError, UnicodeDecodeError) as error:
                raise self._failed(_why(error)) from None
        return await self._default(place)

    async def _default(self, place: tuple[str, str, str, str]) -> str | None:
        password = os.environ.get("PGPASSWORD")
        if password:
            return password
        path = os.environ.get("PGPASSFILE") or "~/.pgpass"
        # As in libpq, a default passfile that is missing or unreadable is no error.
        with contextlib.suppress(OSError, RuntimeError, UnicodeDecodeError):
            return await asyncio.to_thread(_look_up, path, place)
        return None

    async def _run(self, place: Mapping[str, str]) -> str:
        try:
            transport, output = await asyncio.get_running_loop().subprocess_exec(
                _Output,
                *shlex.split(self._value),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                # Helpers tend to print credentials when they fail: nothing of it may reach an error or a log.
                stderr=subprocess.DEVNULL,
                env={**os.environ, **place},
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise self._failed(f"it could not be started: {_why(error)}") from None
        try:
            async with asyncio.timeout(self._timeout):
                await output.complete.wait()
        except TimeoutError:
            raise self._failed(f"it did not finish within {self._timeout:g} s") from None
        finally:
            await _end(transport, output)
        if output.too_long:
            raise self._failed(f"it printed more than {_COMMAND_OUTPUT_LIMIT} bytes")
        if code := transport.get_returncode():
            raise self._failed(f"it ended with exit code {code}")
        try:
            password = output.text.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise self._failed("it printed something that is not UTF-8") from None
        if not password:
            raise self._failed("it printed nothing")
        if any(character in password for character in "\0\r\n"):
            raise self._failed("it printed more than one line")
        return password

    def _failed(self, why: str) -> ConnectError:
        return ConnectError(f"no password from {self}: {why}", "authentication_failed")

    def to_dict(self) -> dict[str, Any]:
        """Plain data that holds the secret; the counterpart of ``from_dict``."""
        return {"kind": self.kind, "value": self._value, "timeout": self._timeout}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PasswordSource:
        return cls(data["kind"], data["value"], data["timeout"])

    def __str__(self) -> str:
        """Names the source, and nothing of the secret: of a command the program, without arguments."""
        match self.kind:
            case "env":
                return f"environment variable {self._value!r}"
            case "file":
                return f"passfile {self._value!r}"
            case "command":
                return f"command {shlex.split(self._value)[0]!r}"
            case "literal":
                return "a literal password"
            case _:
                return "the worker's environment"

    def __repr__(self) -> str:
        return f"<PasswordSource: {self}>"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PasswordSource):
            return NotImplemented
        mine, theirs = (source._value.encode(errors="surrogatepass") for source in (self, other))
        same_value = hmac.compare_digest(mine, theirs)
        return same_value and self.kind == other.kind and self._timeout == other._timeout

    def __hash__(self) -> int:
        return hash(self.kind)

    def __reduce__(self) -> tuple[Callable[..., PasswordSource], tuple[Kind, str, float]]:
        return PasswordSource, (self.kind, self._value, self._timeout)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a PasswordSource cannot be changed")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("a PasswordSource cannot be changed")


class _Output(asyncio.SubprocessProtocol):
    """What a program prints. ``complete`` is set when it has ended and closed its output, or printed too much."""

    def __init__(self) -> None:
        self.text = bytearray()
        self.too_long = False
        self.complete = asyncio.Event()
        self.exited = asyncio.Event()
        self._closed = False

    def pipe_data_received(self, fd: int, data: bytes | str) -> None:
        assert isinstance(data, bytes)
        if len(self.text) + len(data) <= _COMMAND_OUTPUT_LIMIT:
            self.text += data
        else:
            self.too_long = True
            self.complete.set()

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._closed = True
        self._check()

    def process_exited(self) -> None:
        self.exited.set()
        self._check()

    def _check(self) -> None:
        if self._closed and self.exited.is_set():
            self.complete.set()


async def _end(transport: asyncio.SubprocessTransport, output: _Output) -> None:
    """Leave neither process nor pipe behind, however the waiting ended."""
    if not output.exited.is_set():
        # It leads its own session, so that what it started goes too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(transport.get_pid(), signal.SIGKILL)
        # Reap it. Bounded, for a process in an uninterruptible system call does not even obey SIGKILL.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await output.exited.wait()
    transport.close()


def _is_sendable(password: str) -> bool:
    # The environment gives bytes that are not UTF-8 as lone surrogates.
    return "\0" not in password and not any("\ud800" <= character <= "\udfff" for character in password)


def _why(error: Exception) -> str:
    """A reason without a value: ``str()`` of a decoding error would show the bytes."""
    return os.strerror(error.errno).lower() if isinstance(error, OSError) and error.errno else "it cannot be read"


def _look_up(name: str, place: Sequence[str]) -> str | None:
    """The password of the first entry that fits, by libpq's rules.

    https://www.postgresql.org/docs/18/libpq-pgpass.html
    """
    path = Path(name).expanduser()
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        _logger.warning("passfile %s is ignored: it is not a plain file", path)
        return None
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        _logger.warning("passfile %s is ignored: others may read it; run chmod 600 on it", path)
        return None
    with path.open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            if line.startswith("#"):
                continue
            fields = _fields(line.rstrip("\r\n"))
            if len(fields) >= 5 and all(map(_fits, fields, place)):
                return _unescaped(fields[4]) or None
    return None


def _fields(line: str) -> list[str]:
    """Split at colons that no backslash escapes."""
    fields, start, position = [], 0, 0
    while position < len(line):
        if line[position] == "\\":
            position += 1
        elif line[position] == ":":
            fields.append(line[start:position])
            start = position + 1
        position += 1
    fields.append(line[start:])
    return fields


def _fits(field: str, wanted: str) -> bool:
    if field == "*":
        return True
    entry = _unescaped(field)
    # Entries for Unix sockets are written under the name localhost.
    return entry == wanted or (wanted.startswith("/") and entry == "localhost")


def _unescaped(field: str) -> str:
    characters = iter(field)
    # A backslash at the very end stands for itself.
    return "".join(next(characters, "\\") if character == "\\" else character for character in characters)
