"""Reads PostgreSQL connection strings: URIs, ``keyword=value`` lists, and sections of a service file.

The grammar is libpq's (https://www.postgresql.org/docs/18/libpq-connect.html#LIBPQ-CONNSTRING), and tests
compare with libpq itself. Stricter in one way: where a password that should have been percent-encoded gives a
URI a second reading, libpq takes one of them, and this refuses. No error shows any part of a string that may
be a password.
"""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

from raypg.core import libpq
from raypg.core.nearest import did_you_mean
from raypg.errors import ConfigError

__all__ = ["POOLER_HINT", "endpoints", "parse", "redacted", "service_section", "split"]

POOLER_HINT = "pgbouncer"
"""The one known parameter that is not libpq's: ``?pgbouncer=true``, which Prisma brought into many URIs."""

DEFAULT_HOST = "localhost"
DEFAULT_PORT = 5432

_SPACE = " \t\n\v\f\r"
_SCHEMES = ("postgresql://", "postgres://")
_ENCODE = (
    "percent-encode the user and the password (@ is %40, / is %2F, : is %3A, ? is %3F, % is %25), or pass password=…"
)
_AMBIGUOUS = f"the connection URI can be read in two ways; {_ENCODE}"


def parse(conninfo: str) -> dict[str, str]:
    """Read a connection string.

    Args:
        conninfo: ``postgresql://…`` or ``keyword=value …``.

    Returns:
        libpq keyword → value, of the keywords that raypg honours; hosts and ports comma-separated as in
        libpq. A ``pgbouncer`` parameter comes back as ``"true"`` or ``"false"``.

    Raises:
        ConfigError: the syntax is wrong, a keyword is unknown, or its value cannot be honoured.
    """
    values = split(conninfo)
    problems = [text for key, value in values.items() if key in libpq.KEYWORDS and (text := libpq.problem(key, value))]
    if not problems:
        try:
            endpoints(values.get("host", "") or values.get("hostaddr", ""), values.get("port", ""))
        except ConfigError as error:
            problems = [str(error)]
    if problems:
        raise ConfigError(f"connection string: {'; '.join(problems)}")
    return {key: value for key, value in values.items() if key == POOLER_HINT or libpq.KEYWORDS[key].honoured}


def split(conninfo: str) -> dict[str, str]:
    """Split a connection string into keywords and values, as libpq's ``PQconninfoParse``; values unchecked.

    Raises:
        ConfigError: the syntax is wrong, or a keyword is unknown.
    """
    if "\0" in conninfo:
        raise ConfigError("connection string: it holds a NUL character")
    scheme = re.match(r"\s*(?:jdbc:)?([A-Za-z][A-Za-z0-9+.-]*)://", conninfo)
    if scheme is None:
        return _split_pairs(conninfo)
    for known in _SCHEMES:
        if conninfo[: len(known)].lower() == known:
            return _split_uri(conninfo[len(known) :])
    name = scheme[1].lower()
    if name.startswith("postgres"):
        raise ConfigError("connection string: begin it with postgresql://, without a driver's name or space before it")
    raise ConfigError(f"connection string: raypg is for PostgreSQL; the scheme is {name!r}, not postgresql")


def endpoints(host: str, port: str) -> tuple[tuple[str, int], ...]:
    """Pair comma-separated hosts with ports, as libpq does: one port serves all hosts, an empty one is 5432.

    Raises:
        ConfigError: the numbers of hosts and ports differ.
    """
    hosts = [name.strip() or DEFAULT_HOST for name in host.split(",")]
    ports = [int(text) if text.strip() else DEFAULT_PORT for text in port.split(",")]
    if len(ports) == 1:
        ports *= len(hosts)
    if len(ports) != len(hosts):
        raise ConfigError(
            f"{len(ports)} ports do not match {len(hosts)} host{'s' * (len(hosts) > 1)}; give one port, "
            "or as many as hosts"
        )
    return tuple(zip(hosts, ports, strict=True))


def redacted(values: dict[str, str]) -> str:
    """A connection string to show: what ``parse`` read, as ``keyword=value``, with secrets as ``***``."""
    words = []
    for key, value in values.items():
        if key in libpq.KEYWORDS and libpq.KEYWORDS[key].secret:
            text = "***"
        elif value and not re.search(r"[\s'\\]", value):
            text = value
        else:
            text = "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
        words.append(f"{key}={text}")
    return " ".join(words)


def service_section(text: str, service: str) -> dict[str, str] | None:
    """Keywords and values of one section of a ``pg_service.conf``; None if it has no such section.

    Raises:
        ConfigError: a line of the section is wrong.
    """
    values: dict[str, str] | None = None
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            if values is not None:
                break
            if line == f"[{service}]":
                values = {}
            continue
        if values is None:
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or key == "service" or key not in libpq.KEYWORDS:
            raise ConfigError(f"service {service!r}: line {number} of the service file is not a libpq keyword=value")
        if wrong := libpq.problem(key, value):
            raise ConfigError(f"service {service!r}, line {number} of the service file: {wrong}")
        if libpq.KEYWORDS[key].honoured:
            values.setdefault(key, value)
    return values


def _split_uri(rest: str) -> dict[str, str]:
    values: dict[str, str] = {}
    # As in libpq, credentials end at the first '@' that comes before any '/'.
    end = re.search("[@/]", rest)
    has_credentials = end is not None and end[0] == "@"
    if end is not None and has_credentials:
        credentials, rest = rest[: end.start()], rest[end.end() :]
        if re.search(r"\?\w+=", credentials):
            raise ConfigError(f"connection string: {_AMBIGUOUS}")
        user, _, password = credentials.partition(":")
        for key, text in (("user", user), ("password", password)):
            if text:
                values[key] = _decoded(text)
    location, question, query = rest.partition("?")
    authority, _, database = location.partition("/")
    # An '@' left over is the tail of a password, or cannot be told from one.
    if "@" in authority or ("@" in database and (has_credentials or ":" in authority)):
        raise ConfigError(f"connection string: {_AMBIGUOUS}")
    hosts, ports = _split_authority(authority)
    if hosts:
        values["host"] = _decoded(hosts)
    if ports:
        values["port"] = _decoded(ports)
    if database:
        values["dbname"] = _decoded(database)
    if question:
        values.update(_split_query(query))
    return values


def _split_authority(authority: str) -> tuple[str, str]:
    hosts, ports = [], []
    # A comma or colon inside the brackets of an IPv6 address separates nothing.
    for part in re.findall(r"(?:^|,)((?:\[[^\]]*\]?)?[^,]*)", authority) or [""]:
        if part.startswith("["):
            host, bracket, port = part[1:].partition("]")
            if not bracket or not host or (port and not port.startswith(":")):
                raise ConfigError(
                    f"connection string: an IPv6 address is written [::1] or [::1]:5432; otherwise {_ENCODE}"
                )
            port = port[1:]
        else:
            host, _, port = part.partition(":")
        hosts.append(host)
        ports.append(port)
    return ",".join(hosts), ",".join(ports)


def _split_query(query: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for parameter in query.removesuffix("&").split("&") if query else ():
        if parameter.count("=") != 1:
            raise ConfigError(f"connection string: each parameter after '?' is name=value with one '='; {_ENCODE}")
        key, value = (_decoded(part) for part in parameter.split("="))
        if key == "ssl" and value == "true":  # JDBC's spelling, which libpq knows too
            key, value = "sslmode", "require"
        if key == POOLER_HINT:
            if value.lower() not in {"true", "false"}:
                raise ConfigError(f"connection string: {POOLER_HINT} must be true or false")
            value = value.lower()
        elif key not in libpq.KEYWORDS:
            raise ConfigError(_unknown(key) if "@" not in query else f"connection string: {_AMBIGUOUS}")
        values[key] = value
    return values


def _unknown(key: str) -> str:
    hint = " (did you mean 'dbname'?)" if key == "database" else did_you_mean(key, libpq.KEYWORDS)
    return (
        f"connection string: unknown parameter {key!r}{hint}; a setting of the server goes into "
        "server_settings={'search_path': …}"
    )


def _decoded(text: str) -> str:
    text = text.strip(_SPACE)
    if re.search(rf"[{_SPACE}]", text):
        raise ConfigError(f"connection string: a space in a URI is written %20; otherwise {_ENCODE}")
    if re.search(r"%(?![0-9A-Fa-f]{2})", text):
        raise ConfigError(f"connection string: a '%' is not followed by two hexadecimal digits; {_ENCODE}")
    decoded = unquote_to_bytes(text)
    if b"\0" in decoded:
        raise ConfigError("connection string: %00 is not allowed")
    try:
        return decoded.decode()
    except UnicodeDecodeError:
        # `from None`: the original error holds the bytes.
        raise ConfigError("connection string: what is percent-encoded must be UTF-8") from None


def _split_pairs(text: str) -> dict[str, str]:
    values: dict[str, str] = {}
    position, previous = 0, ""
    while match := _PAIR.match(text, position):
        key, quoted, bare = match["key"], match["quoted"], match["bare"]
        if key not in libpq.KEYWORDS:
            raise ConfigError(_unknown_keyword(key, previous))
        raw = bare if quoted is None else quoted
        values[key] = re.sub(r"\\(.?)", r"\1", raw, flags=re.DOTALL)
        position, previous = match.end(), key
    if text[position:].strip(_SPACE):
        where = f"after the value of {previous!r}" if previous else "at the beginning"
        raise ConfigError(
            f"connection string: keyword=value expected {where}; a value with spaces is written "
            r"in single quotes, and inside them \' and \\ stand for ' and \ (or begin the string with postgresql://)"
        )
    return values


_PAIR = re.compile(
    rf"""[{_SPACE}]*(?P<key>[^={_SPACE}]+)[{_SPACE}]*=[{_SPACE}]*
    (?:'(?P<quoted>(?:[^'\\]|\\.)*)'|(?P<bare>(?!')(?:[^\\{_SPACE}]|\\.|\\\Z)*))""",
    re.VERBOSE | re.DOTALL,
)


def _unknown_keyword(key: str, previous: str) -> str:
    if previous and libpq.KEYWORDS[previous].secret:
        # What looks like a keyword here may be the rest of a password with a space in it.
        return f"connection string: unknown keyword after {previous!r}; a value with spaces needs single quotes"
    return _unknown(key)
