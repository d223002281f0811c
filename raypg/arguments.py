"""Turns the constructor's arguments that say *where and who* into targets."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from raypg.core import conninfo, libpq
from raypg.errors import ConfigError
from raypg.secret import PasswordSource
from raypg.target import Layer, Target, environment_layer, resolve

__all__ = ["CONNECTION_KEYS", "PASSWORD_KEYS", "ConnectionArguments"]

CONNECTION_KEYS: Mapping[str, str] = {
    "host": "host",
    "port": "port",
    "database": "dbname",
    "user": "user",
    "sslmode": "sslmode",
    "sslrootcert": "sslrootcert",
    "sslcert": "sslcert",
    "sslkey": "sslkey",
    "ssl_min_protocol_version": "ssl_min_protocol_version",
    "target_session_attrs": "target_session_attrs",
}
"""Constructor key → libpq keyword."""

PASSWORD_KEYS = ("password", "password_env", "passfile", "password_command")

# What a connection string can set beside the place → the constructor's key for it.
_TUNABLE_KEYWORDS = {
    "connect_timeout": "connect_timeout",
    "application_name": "application_name",
    "options": "server_settings",
    conninfo.POOLER_HINT: "pooler",
}
# A replica is another server of the same database: these say which server, and are not the primary's.
_NOT_INHERITED = frozenset(
    {
        "host",
        "hostaddr",
        "port",
        "service",
        "password",
        "passfile",
        "target_session_attrs",
        conninfo.POOLER_HINT,
    }
)


class ConnectionArguments:
    """Reads the connection arguments, and appends what is wrong with them to ``problems``.

    Attributes:
        target: the primary; None if there was a problem.
        replicas: as far as they are right.
        tunables: tunables that connection string or environment set.
        explicit: keys of tunables and places that the connection string gives.
        shown: the connection string without secrets.
    """

    def __init__(self, given: Mapping[str, Any], environ: Mapping[str, str], problems: list[str]) -> None:
        self.target: Target | None = None
        self.replicas: tuple[Target, ...] = ()
        self.tunables: dict[str, Any] = {}
        self.explicit: frozenset[str] = frozenset()
        self.shown: str | None = None
        self._problems = problems

        known_before = len(problems)
        arguments = _arguments(given, problems)
        string = self._connection_string(given)
        self._refuse_contradictions(given, arguments, string)
        source = self._source(given, string)
        environment = Layer("environment", {})
        try:
            environment = environment_layer(environ)
        except ConfigError as error:
            problems.append(str(error))
        if len(problems) > known_before:
            return
        layers = [Layer("argument", arguments), Layer("connection_string", string)]
        try:
            self.target = resolve(layers, environment, environ, source)
        except ConfigError as error:
            problems.append(str(error))
            return
        self._take_tunables(string, self.target)
        self.replicas = self._replicas(given.get("replicas", ()), layers, environment, environ)

    def _connection_string(self, given: Mapping[str, Any]) -> dict[str, str]:
        text = given.get("connection_string")
        if text is None:
            return {}
        if not isinstance(text, str):
            self._problems.append(f"connection_string: must be a string, not {type(text).__name__}")
            return {}
        if not text.strip():
            self._problems.append("connection_string: it is empty (a variable that is not set?)")
            return {}
        try:
            values = conninfo.parse(text)
        except ConfigError as error:
            self._problems.append(str(error))
            return {}
        self.shown = conninfo.redacted(values)
        keys = {keyword: key for key, keyword in CONNECTION_KEYS.items()} | _TUNABLE_KEYWORDS
        self.explicit = frozenset(keys[keyword] for keyword, value in values.items() if value and keyword in keys)
        return values

    def _refuse_contradictions(
        self, given: Mapping[str, Any], arguments: Mapping[str, str], string: Mapping[str, str]
    ) -> None:
        for key, keyword in CONNECTION_KEYS.items():
            here, there = arguments.get(keyword), string.get(keyword)
            if not here or not there or here == there:
                continue
            if keyword == "port" and _same_ports(here, there):
                continue
            self._problems.append(f"{key}={given[key]!r} contradicts {there!r} of connection_string; give it once")

    def _source(self, given: Mapping[str, Any], string: Mapping[str, str]) -> PasswordSource | None:
        """The one explicit source of the password."""
        found: dict[str, PasswordSource] = {}
        makers: dict[str, tuple[Callable[[Any], PasswordSource], tuple[type, ...]]] = {
            "password": (PasswordSource.literal, (str,)),
            "password_env": (PasswordSource.env, (str,)),
            "passfile": (PasswordSource.file, (str, os.PathLike)),
            "password_command": (PasswordSource.command, (str, list, tuple)),
        }
        for key, (make, types) in makers.items():
            value = given.get(key)
            if value is None or (key == "password" and value == ""):
                continue
            if not isinstance(value, types):
                self._problems.append(f"{key}: must be a string, not {type(value).__name__}")
                continue
            try:
                found[key] = make(value)
            except ConfigError as error:
                self._problems.append(str(error))
        if string.get("password"):
            in_string = PasswordSource.literal(string["password"])
            if found.get("password") != in_string:
                found["the password in connection_string"] = in_string
        if string.get("passfile"):
            in_string = PasswordSource.file(string["passfile"])
            if found.get("passfile") != in_string:
                found["passfile in connection_string"] = in_string
        if len(found) > 1:
            self._problems.append(f"the password has {len(found)} sources ({', '.join(found)}); give one")
        return next(iter(found.values()), None)

    def _take_tunables(self, string: Mapping[str, str], target: Target) -> None:
        if target.connect_timeout is not None:
            self.tunables["connect_timeout"] = target.connect_timeout
        if target.application_name is not None:
            self.tunables["application_name"] = target.application_name
        if target.pooler is not None:
            self.tunables["pooler"] = target.pooler
        if target.server_settings:
            self.tunables["server_settings"] = target.server_settings

    def _replicas(
        self, strings: Any, layers: list[Layer], environment: Layer, environ: Mapping[str, str]
    ) -> tuple[Target, ...]:
        if isinstance(strings, str) or not isinstance(strings, (list, tuple)):
            self._problems.append("replicas: must be a list of connection strings")
            return ()
        assert self.target is not None
        inherited = [_without(layer, _NOT_INHERITED) for layer in layers]
        environment = _without(environment, _NOT_INHERITED)
        replicas = []
        for number, text in enumerate(strings, start=1):
            label = f"replicas[{number - 1}]"
            if not isinstance(text, str) or not text.strip():
                self._problems.append(f"{label}: must be a connection string")
                continue
            try:
                own = conninfo.parse(text)
                if not (own.get("host") or own.get("hostaddr") or own.get("service")):
                    raise ConfigError("it names no host")
                # Two passwords of one replica: libpq takes the literal one, and so do we.
                source = None if own.get("service") else self.target.password_source
                if own.get("passfile"):
                    source = PasswordSource.file(own["passfile"])
                if own.get("password"):
                    source = PasswordSource.literal(own["password"])
                replicas.append(resolve([Layer(label, own), *inherited], environment, environ, source))
            except ConfigError as error:
                self._problems.append(f"{label}: {error}")
        return tuple(replicas)


def _arguments(given: Mapping[str, Any], problems: list[str]) -> dict[str, str]:
    """The connection arguments as libpq keyword → value."""
    values: dict[str, str] = {}
    for key, keyword in CONNECTION_KEYS.items():
        if key not in given:
            continue
        try:
            value = _ports(given[key]) if key == "port" else _text(key, given[key])
        except ConfigError as error:
            problems.append(str(error))
            continue
        if problem := libpq.problem(keyword, value, key):
            problems.append(problem)
        else:
            values[keyword] = value
    return values


def _text(key: str, value: Any) -> str:
    if key == "host" and isinstance(value, (list, tuple)):
        if not value or not all(isinstance(host, str) and host.strip() for host in value):
            raise ConfigError("host: must be a host name, or a list of host names")
        return ",".join(value)
    if isinstance(value, os.PathLike) and key.startswith("ssl"):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise ConfigError(f"{key}={value!r}: must be a string, not {type(value).__name__}")
    if not value.strip():
        raise ConfigError(f"{key}: it is empty (a variable that is not set?)")
    return value


def _ports(value: Any) -> str:
    ports = value if isinstance(value, (list, tuple)) else [value]
    for port in ports:
        if isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= 65535:
            raise ConfigError(f"port={value!r}: must be a whole number from 1 to 65535, or a list of such")
    if not ports:
        raise ConfigError("port: the list is empty")
    return ",".join(map(str, ports))


def _same_ports(here: str, there: str) -> bool:
    """Whether two lists name the same ports; one port stands for all hosts, an empty one for 5432."""
    mine, theirs = ([int(port or conninfo.DEFAULT_PORT) for port in text.split(",")] for text in (here, there))
    if len(mine) == 1:
        mine *= len(theirs)
    if len(theirs) == 1:
        theirs *= len(mine)
    return mine == theirs


def _without(layer: Layer, keywords: frozenset[str]) -> Layer:
    return Layer(layer.label, {key: value for key, value in layer.values.items() if key not in keywords})
