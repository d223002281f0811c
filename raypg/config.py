"""The configuration of a pool: the one place where what a user wrote becomes what raypg works with."""

from __future__ import annotations

import contextlib
import operator
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from pydantic import Field, InstanceOf, ValidationError

from raypg import naming
from raypg.arguments import CONNECTION_KEYS, PASSWORD_KEYS, ConnectionArguments
from raypg.breaker_config import CircuitBreakerConfig, breaker_config
from raypg.core.breaker import BreakerConfig
from raypg.core.nearest import did_you_mean
from raypg.errors import ConfigError
from raypg.secret import PasswordSource
from raypg.target import Target
from raypg.tunables import Tunables

__all__ = ["KEYS", "Differences", "PoolConfig", "from_kwargs"]

Differences = dict[str, tuple[Any, Any]]
"""Setting → (value of the first, value of the second)."""

KEYS: frozenset[str] = frozenset(
    {"name", "database_type", "connection_string", "replicas", "circuit_breaker", *CONNECTION_KEYS, *PASSWORD_KEYS}
    | set(Tunables.model_fields)
)
"""Every key that a pool's constructor takes."""

# What other libraries call our keys, where the spelling alone would not lead to them.
_OTHER_NAMES = {
    "dbname": "database",
    "db": "database",
    "dsn": "connection_string",
    "url": "connection_string",
    "uri": "connection_string",
    "conninfo": "connection_string",
    "username": "user",
    "hostname": "host",
    "ssl": "sslmode",
    "min_size": "min_connections",
    "max_size": "max_connections",
    "pool_size": "max_connections",
    "timeout": "acquire_timeout",
    "max_queries": "max_lifetime",
    "pool_name": "name",
}
_MAY_BE_NONE = frozenset({"command_timeout", "max_lifetime", "max_idle"})
_SECRET_KEYS = frozenset({*PASSWORD_KEYS, "connection_string", "replicas"})
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,32}")


class PoolConfig(Tunables):
    """A pool's complete, checked configuration; made by ``from_kwargs``.

    Immutable, small to pickle, and without a secret in its repr.

    Attributes:
        name: of the pool.
        target: the primary database.
        replicas: its replicas; what their strings leave out is the primary's.
        connection_string: as it was read, for display: secrets are ``***``.
        explicit: the keys that the user gave, also those given inside ``connection_string``.
    """

    name: str
    target: InstanceOf[Target] = Field(exclude=True)
    replicas: tuple[InstanceOf[Target], ...] = Field((), exclude=True)
    connection_string: str | None = None
    explicit: frozenset[str] = frozenset()

    @property
    def hosts(self) -> tuple[tuple[str, int], ...]:
        return self.target.hosts

    @property
    def database(self) -> str:
        return self.target.database

    @property
    def user(self) -> str:
        return self.target.user

    @property
    def sslmode(self) -> str:
        return self.target.tls.sslmode

    @property
    def password_source(self) -> PasswordSource:
        return self.target.password_source

    def breaker(self) -> BreakerConfig:
        """What the circuit breaker is to do."""
        return breaker_config(self)

    def identity(self) -> dict[str, Any]:
        """What makes it the same database: hosts, database, user, TLS; plain data."""
        return self.target.identity()

    def tunables(self) -> dict[str, Any]:
        """All other settings but the name and the password; plain data without secrets."""
        return {
            **{key: _copied(getattr(self, key)) for key in Tunables.model_fields},
            "target_session_attrs": self.target.target_session_attrs,
            "replicas": [str(replica) for replica in self.replicas],
        }

    def differences(self, other: PoolConfig) -> tuple[Differences, Differences]:
        """Compare what runs (self) with what is asked for (other).

        Returns:
            (differences of identity, differences of tunables); tunables only as far as ``other`` gives them
            explicitly.
        """
        mine, theirs = self.identity(), other.identity()
        identity = {key: (mine[key], theirs[key]) for key in mine if mine[key] != theirs[key]}
        mine, theirs = self.tunables(), other.tunables()
        tunables = {key: (mine[key], theirs[key]) for key in mine if key in other.explicit and mine[key] != theirs[key]}
        return identity, tunables

    def changed(self, **changes: Any) -> PoolConfig:
        """A checked copy with other tunables; they count as explicit.

        Raises:
            ConfigError: a key is no tunable, or its value is wrong.
        """
        problems = [
            f"{key}: cannot be changed in a running pool{did_you_mean(key, Tunables.model_fields)}"
            for key in changes
            if key not in Tunables.model_fields
        ]
        _raise_for(problems)
        tunables = {key: getattr(self, key) for key in Tunables.model_fields}
        tunables |= _normalised(changes)
        _lower_default_minimum(tunables, explicit=self.explicit | changes.keys())
        checked = _checked_tunables(tunables, problems)
        _raise_for(problems)
        assert checked is not None
        return self.model_copy(
            update={**dict(checked), "explicit": self.explicit | changes.keys()},
        )

    def with_password_source(self, source: PasswordSource) -> PoolConfig:
        """A copy for a rotated password. Replicas that shared the old source share the new one."""
        old = self.password_source

        def renewed(target: Target) -> Target:
            if target.password_source != old:
                return target
            return Target.from_dict(target.to_dict(), source)

        return self.model_copy(update={"target": renewed(self.target), "replicas": tuple(map(renewed, self.replicas))})

    def connect_arguments(self, target: Target | None = None) -> dict[str, Any]:
        """Exactly the keyword arguments of ``asyncpg.connect``, but ``password`` and ``server_settings``.

        Call it once for each connection, on the node that connects. Give ``password`` always, ``""`` if the
        source knows none: for None asyncpg would look into places of its own.

        Args:
            target: one of ``replicas``; None = the primary.

        Raises:
            ConnectError: a certificate or key cannot be used on this node.
        """
        target = self.target if target is None else target
        timeout = self.connect_timeout
        if target is not self.target and target.connect_timeout is not None:
            timeout = target.connect_timeout
        return {
            **target.connect_arguments(),
            "timeout": timeout,
            "command_timeout": self.command_timeout,
            # A transaction pooler hands each transaction another backend, with nothing prepared there.
            "statement_cache_size": 0 if self.pooler == "transaction" else self.statement_cache_size,
        }

    @property
    def safety_settings(self) -> dict[str, str]:
        """Server settings that end what dead clients leave behind, as far as the user did not set them.

        Poolers refuse all of them at connect; PostgreSQL < 14 does not know
        ``client_connection_check_interval``.
        """
        ours = {
            # Without it a backend outlives its client by the whole statement.
            "client_connection_check_interval": "500ms",
            "tcp_user_timeout": "30s",
            "idle_in_transaction_session_timeout": f"{idle_limit(self.lease_timeout)}ms",
        }
        taken = {name.lower() for name in (*self.server_settings, *self.target.server_settings)}
        return {name: value for name, value in ours.items() if name not in taken}

    def server_settings_for(
        self, application_name: str, *, safety: bool = True, target: Target | None = None
    ) -> dict[str, str]:
        """The ``server_settings`` of one connection.

        Args:
            application_name: raypg's part (ASCII); the user's is appended, cut at 63 bytes together.
            safety: include ``safety_settings``.
            target: one of ``replicas``; None = the primary.
        """
        target = self.target if target is None else target
        settings = self.safety_settings if safety else {}
        settings |= {**target.server_settings, **self.server_settings}
        settings["application_name"] = naming.application_name(application_name, self.users_name(target))
        return settings

    def users_name(self, target: Target | None = None) -> str | None:
        """The user's part of ``application_name``, if there is one."""
        target = self.target if target is None else target
        settings = {**target.server_settings, **self.server_settings}
        return self.application_name or settings.get("application_name") or target.application_name

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for messages. Every secret is under ``"password"``; pop it where none is wanted."""
        return {
            **{key: _copied(getattr(self, key)) for key in Tunables.model_fields},
            "name": self.name,
            "connection_string": self.connection_string,
            "explicit": sorted(self.explicit),
            "target": self.target.to_dict(),
            "replicas": [replica.to_dict() for replica in self.replicas],
            "password": [target.password_source.to_dict() for target in (self.target, *self.replicas)],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PoolConfig:
        """The counterpart of ``to_dict``; without ``"password"`` the worker's environment is the source.

        The data is trusted to come from ``to_dict`` of the same version, and not checked again.
        """
        values = dict(data)
        targets = [values["target"], *values["replicas"]]
        packed = values.pop("password", None)
        sources = map(PasswordSource.from_dict, packed) if packed else [PasswordSource.none()] * len(targets)
        values["target"], *replicas = map(Target.from_dict, targets, sources)
        values["replicas"] = tuple(replicas)
        values["explicit"] = frozenset(values["explicit"])
        return cls.model_construct(**values)

    def __reduce__(self) -> tuple[Callable[[Mapping[str, Any]], PoolConfig], tuple[dict[str, Any]]]:
        return PoolConfig.from_dict, (self.to_dict(),)


def idle_limit(seconds: float) -> int:
    """Milliseconds after which the server ends a transaction that is idle: the backstop of the deadline of a lease that
    lasts *seconds*, late enough never to come before it."""
    return int(seconds * 1000) + 30_000


def from_kwargs(*, environ: Mapping[str, str] | None = None, **given: Any) -> PoolConfig:
    """Check a pool's settings, and find out which database they mean.

    A place is looked for in: arguments, connection string, service file, PG* environment, libpq's defaults
    (but TCP on localhost instead of a socket, for workers run on other nodes). A password: one explicit
    source (``password`` or one inside the connection string, ``password_env``, ``passfile``,
    ``password_command``), the service file, PGPASSWORD here, and, on the worker, PGPASSFILE, ``~/.pgpass``. An
    argument of None counts as not given, except where None means *no limit*.

    Args:
        environ: environment to read PG* variables from; ``os.environ`` by default. given: the constructor's
        keys, see ``KEYS``; units are in the descriptions of ``PoolConfig.model_fields``.

    Raises:
        ConfigError: with every problem that was found, one a line; never shows a secret.
    """
    if environ is None:
        environ = os.environ
    problems = [f"{key}: unknown setting{_meant(key)}" for key in given if key not in KEYS]
    given = {key: value for key, value in given.items() if key in KEYS and (value is not None or key in _MAY_BE_NONE)}
    given = _normalised(_with_breaker(given, problems))
    _check_name(given.get("name"), problems)
    _check_database_type(given.get("database_type", "postgresql"), problems)

    found = ConnectionArguments(given, environ, problems)
    tunables = {key: value for key, value in given.items() if key in Tunables.model_fields}
    checked = _checked_tunables(_joined(found.tunables, tunables), problems)
    _raise_for(problems)
    assert checked is not None
    assert found.target is not None
    target = found.target
    if target.password_source.kind == "none" and environ.get("PGPASSWORD"):
        # The worker that connects may run where the caller's environment is not known.
        target = Target.from_dict(target.to_dict(), PasswordSource.literal(environ["PGPASSWORD"]))
    return PoolConfig(
        **dict(checked),
        name=given["name"],
        target=target,
        replicas=found.replicas,
        connection_string=found.shown,
        explicit=frozenset(given) | found.explicit,
    )


def _with_breaker(given: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """``circuit_breaker=CircuitBreakerConfig(…)`` as the single settings that it stands for."""
    values = dict(given)
    together = values.pop("circuit_breaker", None)
    if together is None:
        return values
    if not isinstance(together, CircuitBreakerConfig):
        problems.append(f"circuit_breaker={_brief(together)}: must be a CircuitBreakerConfig")
        return values
    settings = together.settings()
    twice = sorted(settings.keys() & values.keys())
    if twice:
        problems.append(f"circuit_breaker and {', '.join(twice)}: give one or the other")
    return {**settings, **values}


def _meant(key: str) -> str:
    other = _OTHER_NAMES.get(key.lower())
    return f" (did you mean {other!r}?)" if other else did_you_mean(key, KEYS)


def _check_name(name: Any, problems: list[str]) -> None:
    if name is None:
        problems.append("name: give the pool a name, by which other jobs find it")
    elif not isinstance(name, str) or not _NAME.fullmatch(name):
        problems.append(f"name={name!r}: must be 1 to 32 characters of A–Z, a–z, 0–9, '_', '.', '-'")


def _check_database_type(kind: Any, problems: list[str]) -> None:
    if kind != "postgresql":
        problems.append(f"database_type={kind!r}: raypg is for PostgreSQL; must be 'postgresql'")


def _normalised(given: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of numpy and the like as Python's own."""
    values = dict(given)
    for key, value in given.items():
        if not isinstance(value, (bool, int, str)):
            with contextlib.suppress(TypeError):
                values[key] = operator.index(value)
    return values


def _joined(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Tunables of connection string and environment under those given as arguments."""
    values = {**below, **above}
    _lower_default_minimum(values, explicit=above.keys())
    settings = above.get("server_settings")
    if isinstance(settings, dict):
        # Names have no case in PostgreSQL.
        taken = {name.lower() for name in settings if isinstance(name, str)}
        kept = {name: value for name, value in below.get("server_settings", {}).items() if name not in taken}
        values["server_settings"] = {**kept, **settings}
        if "application_name" in settings and "application_name" not in above:
            values.pop("application_name", None)
    return values


def _lower_default_minimum(values: dict[str, Any], explicit: Collection[str]) -> None:
    """Who asks for one connection need not say that at least two are not wanted."""
    most, least = values.get("max_connections"), Tunables.model_fields["min_connections"].default
    if "min_connections" not in explicit and isinstance(most, int) and 1 <= most < least:
        values["min_connections"] = most


def _checked_tunables(values: Mapping[str, Any], problems: list[str]) -> Tunables | None:
    try:
        return Tunables.model_validate(dict(values))
    except ValidationError as error:
        problems.extend(_sentences(error, values))
        return None


def _sentences(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """One sentence for each key that pydantic refused: key, value, unit, what is allowed."""
    reasons: dict[str, list[str]] = {}
    for item in error.errors(include_url=False, include_input=False):
        key = str(item["loc"][0]) if item["loc"] else ""
        reason = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        reason = reason[:1].lower() + reason[1:]
        if key in values and isinstance(values[key], dict) and len(item["loc"]) > 1:
            reason = f"{item['loc'][1]!r} {reason}"
        reasons.setdefault(key, []).append(reason)
    sentences = []
    for key, found in reasons.items():
        # Several reasons for one key are the alternatives of a union.
        text = " or ".join(dict.fromkeys(found)).replace(" or must be ", " or ")
        if not key:
            sentences.append(text)
            continue
        extra = Tunables.model_fields[key].json_schema_extra
        unit = f" [{extra['unit']}]" if isinstance(extra, dict) else ""
        # A setting of the application's own may hold a secret.
        shown = key if key == "server_settings" else f"{key}={_brief(values[key])}"
        sentences.append(f"{shown}: {text}{unit}")
    return sentences


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def _raise_for(problems: list[str]) -> None:
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} settings are wrong:\n{lines}")
