"""One database to connect to, put together from arguments, connection string, service and environment."""

from __future__ import annotations

import dataclasses
import os
import pwd
import random
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from raypg.core import conninfo, libpq
from raypg.errors import ConfigError
from raypg.secret import PasswordSource
from raypg.tls import SYSTEM_ROOTS, TlsSettings, tls_arguments

__all__ = ["Layer", "Target", "environment_layer", "resolve"]


class Layer(NamedTuple):
    """Values from one place. ``label`` names the place in errors; ``values`` are libpq keyword → value."""

    label: str
    values: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A database (one server, or the hosts of a fail-over group), and how to log in to it.

    Attributes:
        hosts: (host or socket directory, port), in the order to try them.
        target_session_attrs: which of the hosts will do, as in libpq.
        load_balance_hosts: ``disable`` or ``random`` order of hosts.
        connect_timeout: seconds, from connection string or environment; None = the pool's default.
        application_name: the user's part of the name.
        server_settings: settings from ``options``.
        tcp: ``keepalives``, ``keepalives_idle`` [s], ``keepalives_interval`` [s], ``keepalives_count``,
            ``tcp_user_timeout`` [ms], as far as given.
        pooler: what the connection string says of a pooler in front; None = nothing.
    """

    hosts: tuple[tuple[str, int], ...]
    database: str
    user: str
    tls: TlsSettings = field(default_factory=TlsSettings)
    target_session_attrs: str = "any"
    load_balance_hosts: str = "disable"
    krbsrvname: str | None = None
    connect_timeout: float | None = None
    application_name: str | None = None
    server_settings: dict[str, str] = field(default_factory=dict)
    tcp: dict[str, int] = field(default_factory=dict)
    pooler: str | None = None
    password_source: PasswordSource = field(default_factory=PasswordSource.none)

    def __str__(self) -> str:
        """``user@host:port,…/database``, for messages."""
        return f"{self.user}@{','.join(self.addresses)}/{self.database}"

    @property
    def addresses(self) -> list[str]:
        """The hosts as text, e.g. ``["db:5432", "[::1]:5432"]``."""
        return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts]

    def identity(self) -> dict[str, Any]:
        """What makes it the same database, as plain data. Without the password, which may be rotated."""
        return {
            "hosts": self.addresses,
            "database": self.database,
            "user": self.user,
            "sslmode": self.tls.sslmode,
            "sslrootcert": self.tls.sslrootcert,
            "sslcert": self.tls.sslcert,
            "sslkey": self.tls.sslkey,
        }

    def connect_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``asyncpg.connect`` for where, who and how securely; without the password.

        Call it once for each connection, on the node that connects: certificates are read here, and hosts
        shuffled.

        Raises:
            ConnectError: a certificate or key cannot be used on this node.
        """
        hosts = list(self.hosts)
        if self.load_balance_hosts == "random":
            random.shuffle(hosts)
        arguments: dict[str, Any] = {
            "host": [host for host, _ in hosts],
            "port": [port for _, port in hosts],
            "database": self.database,
            "user": self.user,
            "target_session_attrs": self.target_session_attrs,
        }
        if self.krbsrvname:
            arguments["krbsrvname"] = self.krbsrvname
        return arguments | tls_arguments(self.tls)

    def socket_options(self) -> list[tuple[int, int, int]]:
        """(level, option, value) for ``setsockopt`` on each TCP connection: asyncpg sets none of libpq's.

        As in libpq, keepalives are on unless ``keepalives=0``, and 0 leaves the system's default.
        """
        tcp = self.tcp
        options = []
        if tcp.get("keepalives", 1):
            options.append((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1))
            for key, option in (
                ("keepalives_idle", socket.TCP_KEEPIDLE),
                ("keepalives_interval", socket.TCP_KEEPINTVL),
                ("keepalives_count", socket.TCP_KEEPCNT),
            ):
                if tcp.get(key):
                    options.append((socket.IPPROTO_TCP, option, tcp[key]))
        if tcp.get("tcp_user_timeout"):
            options.append((socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, tcp["tcp_user_timeout"]))
        return options

    def to_dict(self) -> dict[str, Any]:
        """Plain data without the password source; the counterpart of ``from_dict``."""
        plain = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        del plain["password_source"]
        plain["tls"] = dataclasses.asdict(self.tls)
        plain["server_settings"], plain["tcp"] = dict(self.server_settings), dict(self.tcp)
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], password_source: PasswordSource) -> Target:
        plain = dict(data)
        plain["tls"] = TlsSettings(**plain["tls"])
        plain["hosts"] = tuple((host, port) for host, port in plain["hosts"])
        return cls(**plain, password_source=password_source)


def environment_layer(environ: Mapping[str, str]) -> Layer:
    """libpq's environment variables.

    Raises:
        ConfigError: one of them holds what cannot be honoured.
    """
    values = libpq.keywords_of_environment(environ)
    problems = [text for key in values if (text := libpq.problem(key, values[key], libpq.KEYWORDS[key].environ))]
    if problems:
        raise ConfigError(f"environment: {'; '.join(problems)}")
    return Layer("environment", {key: value for key, value in values.items() if libpq.KEYWORDS[key].honoured})


def resolve(
    layers: Sequence[Layer], environment: Layer, environ: Mapping[str, str], source: PasswordSource | None
) -> Target:
    """Merge layers; the first that has a (non-empty) value wins. Then the service file, then the environment.

    Args:
        layers: checked values, e.g. arguments before the connection string.
        environment: from ``environment_layer``.
        environ: to find the service file.
        source: an explicit source of the password; None = the service file's, or the worker's environment.

    Raises:
        ConfigError: the values contradict each other, or the service does not exist.
    """
    above = _merged(layers)
    service = above.get("service") or environment.values.get("service")
    below = [_service_layer(service, environ), environment] if service else [environment]
    values = _merged([Layer("", above), *below])
    if "host" in values and "hostaddr" in values:
        raise ConfigError("hostaddr: asyncpg cannot connect to an address under another name; give host or hostaddr")
    hosts = conninfo.endpoints(values.get("host") or values.get("hostaddr", ""), values.get("port", ""))
    user = values.get("user") or _os_user()
    tls_settings = _tls_settings(values)
    if contradictions := tls_settings.contradictions():
        raise ConfigError("; ".join(contradictions))
    if source is None:
        source = _inherited_source(values)
    options = values.get("options", "")
    parsed_options = libpq.settings_of_options(options)
    return Target(
        hosts=hosts,
        database=values.get("dbname", user),
        user=user,
        tls=tls_settings,
        target_session_attrs=values.get("target_session_attrs", "any"),
        load_balance_hosts=values.get("load_balance_hosts", "disable"),
        krbsrvname=values.get("krbsrvname"),
        connect_timeout=float(values["connect_timeout"]) if "connect_timeout" in values else None,
        application_name=values.get("application_name") or values.get("fallback_application_name"),
        # What is no list of settings, such as Neon's endpoint=…, goes to the server as it is.
        server_settings={"options": options} if parsed_options is None else parsed_options,
        tcp={key: int(values[key]) for key in _TCP_KEYWORDS if key in values},
        pooler={"true": "transaction", "false": "off"}.get(values.get(conninfo.POOLER_HINT, "")),
        password_source=source,
    )


_TCP_KEYWORDS = (
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_count",
    "tcp_user_timeout",
)


def _merged(layers: Sequence[Layer]) -> dict[str, str]:
    values: dict[str, str] = {}
    for layer in layers:
        for key, value in layer.values.items():
            if value:
                values.setdefault(key, value)
    return values


def _tls_settings(values: Mapping[str, str]) -> TlsSettings:
    given = {item.name: values[item.name] for item in dataclasses.fields(TlsSettings) if item.name in values}
    for key in ("ssl_min_protocol_version", "ssl_max_protocol_version"):
        if key in given:  # libpq takes any case, Python's ssl takes TLSv1.2
            given[key] = "TLSv" + given[key][len("TLSv") :]
    if given.get("sslrootcert") == SYSTEM_ROOTS:
        given.setdefault("sslmode", "verify-full")
    return TlsSettings(**given)


def _inherited_source(values: Mapping[str, str]) -> PasswordSource:
    if "password" in values:
        return PasswordSource.literal(values["password"])
    if "passfile" in values:
        return PasswordSource.file(values["passfile"])
    return PasswordSource.none()


def _service_layer(service: str, environ: Mapping[str, str]) -> Layer:
    """A section of the service file: PGSERVICEFILE or ~/.pg_service.conf, then PGSYSCONFDIR/pg_service.conf.

    https://www.postgresql.org/docs/18/libpq-pgservice.html
    """
    own = environ.get("PGSERVICEFILE") or os.path.join(
        environ.get("HOME") or os.path.expanduser("~"), ".pg_service.conf"
    )
    paths = [Path(own)]
    if environ.get("PGSYSCONFDIR"):
        paths.append(Path(environ["PGSYSCONFDIR"]) / "pg_service.conf")
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"service {service!r}: {path} cannot be read: {type(error).__name__}") from None
        values = conninfo.service_section(text, service)
        if values is not None:
            return Layer(f"service {service!r}", values)
    raise ConfigError(f"service {service!r}: not found in {' or '.join(map(str, paths))}")


def _os_user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise ConfigError("user: give user=…; this process runs under a user id without a name") from None
