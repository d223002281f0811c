"""The settings of a pool that do not say which database it is for: sizes, times, limits, switches."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from raypg.core.history import bytes_needed
from raypg.core.nearest import did_you_mean

__all__ = ["CODECS", "Tunables"]

CODECS = ("hstore", "json", "text", "vector")
"""Names of the codecs that workers know; see the key ``codecs``."""

_DAY = 86_400.0
_LONGEST_RETENTION = 7 * 24 * 60

_Count = Annotated[int, Field(ge=1)]
_Seconds = Annotated[float, Field(gt=0, le=365 * _DAY)]


def _setting(default: Any, unit: str, description: str) -> Any:
    return Field(default, description=f"{description} [{unit}]", json_schema_extra={"unit": unit})


class Tunables(BaseModel):
    """Validated settings; the unit of each is in its description. Immutable.

    Types are taken strictly (a bool is no number, a string no number), and times are finite.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    min_connections: Annotated[int, Field(ge=0)] = _setting(2, "connections", "kept open when idle, in the cluster")
    max_connections: _Count = _setting(10, "connections", "hard cap for the whole cluster, replicas included")
    workers: Literal["per_node"] | _Count = _setting("per_node", "worker actors", "'per_node', or how many in all")
    node_labels: dict[str, str] = _setting({}, "label → value", "only nodes with these Ray labels get workers")
    pre_warm: bool = _setting(True, "switch", "open min_connections before the first caller waits")
    adaptive_sizing: bool = _setting(False, "switch", "size between min and max by load")
    enable_query_routing: bool = _setting(False, "switch", "let reads go to replicas")

    connect_timeout: _Seconds = _setting(10.0, "s", "longest time to make one connection")
    acquire_timeout: _Seconds = _setting(30.0, "s", "longest wait for a connection to become free")
    command_timeout: _Seconds | None = _setting(None, "s", "default limit of a statement; None = no limit")
    drain_timeout: _Seconds = _setting(60.0, "s", "that work on a worker which is taken away may take to end")
    lease_timeout: _Seconds = _setting(300.0, "s", "longest time a lease may be held")
    max_waiting: _Count = _setting(10_000, "callers", "most that may wait at one worker")

    max_lifetime: _Seconds | None = _setting(3600.0, "s", "age at which a connection is replaced, with jitter")
    max_idle: _Seconds | None = _setting(600.0, "s", "idle time after which a surplus connection is closed")
    health_check_interval: _Seconds = _setting(30.0, "s", "time between pings of an idle connection")
    health_threshold: Annotated[float, Field(ge=0, le=100)] = _setting(
        50, "score 0–100", "health below which a connection is replaced"
    )
    statement_cache_size: Annotated[int, Field(ge=0)] = _setting(
        256, "statements", "prepared statements kept per connection; 0 = none"
    )
    server_settings: dict[str, str] = _setting({}, "name → value", "PostgreSQL settings of each connection")
    codecs: dict[str, str] = _setting({}, "type → codec", f"codec of a PostgreSQL type: {', '.join(CODECS)}")
    pooler: Literal["auto", "off", "transaction", "session"] = _setting(
        "auto", "mode", "pooler (PgBouncer …) in front of PostgreSQL; 'auto' finds out"
    )
    application_name: str | None = _setting(None, "text", "appended to raypg's own application_name")

    circuit_breaker_failure_threshold: _Count = _setting(5, "failures", "in a row that open the breaker")
    circuit_breaker_recovery_timeout: _Seconds = _setting(60.0, "s", "time from open to the first probe")
    circuit_breaker_error_rate: Annotated[float, Field(gt=0, le=1)] = _setting(
        0.5, "fraction 0–1", "share of failed calls above which the breaker opens"
    )
    circuit_breaker_minimum_calls: _Count = _setting(10, "calls", "in the window below which no rate opens the breaker")
    circuit_breaker_window: _Seconds = _setting(30.0, "s", "that the breaker's rates are taken over")
    circuit_breaker_slow_call_duration: _Seconds | None = _setting(
        None, "s", "from which a call counts as slow; None = none does"
    )
    circuit_breaker_slow_call_rate: Annotated[float, Field(gt=0, le=1)] = _setting(
        0.8, "fraction 0–1", "share of slow calls above which the breaker opens"
    )
    circuit_breaker_max_recovery_timeout: _Seconds | None = _setting(
        None, "s", "that the recovery timeout may grow to; None = ten times"
    )
    circuit_breaker_half_open_probes: _Count = _setting(3, "probes", "that must succeed to close the breaker")
    circuit_breaker_ramp: Annotated[float, Field(ge=0, le=_DAY)] = _setting(
        5.0, "s", "from the breaker's closing to full load"
    )
    metrics_retention_minutes: float = _setting(60, "minutes", "detailed metrics kept; 1 to 10,080 (7 days)")
    enable_pipelining: bool = _setting(False, "switch", "let pool.pipeline() give pipelines")
    pipeline_batch_size: _Count = _setting(100, "statements", "default size of a pipeline's batch")
    enable_monitoring: bool = _setting(
        False, "switch", "have `raypg up` start the dashboard too; elsewhere start_monitoring does"
    )
    monitoring_host: Annotated[str, Field(min_length=1)] = _setting("127.0.0.1", "address", "of the dashboard")
    monitoring_port: Annotated[int, Field(ge=0, le=65535)] = _setting(
        8080, "port", "of the dashboard; 0 = any free one"
    )

    @field_validator("metrics_retention_minutes")
    @classmethod
    def _check_retention(cls, minutes: float) -> float:
        if not 1 <= minutes <= _LONGEST_RETENTION:
            raise ValueError(
                f"its history would take {bytes_needed(max(minutes, 0)):,} bytes in the Metrics actor, that of 7 days "
                f"takes {bytes_needed(_LONGEST_RETENTION):,}; must be 1 to {_LONGEST_RETENTION}"
            )
        return minutes

    @field_validator("server_settings")
    @classmethod
    def _check_server_settings(cls, settings: dict[str, str]) -> dict[str, str]:
        for name, value in settings.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)*", name):
                raise ValueError(f"{name!r} is no name of a PostgreSQL setting")
            if "\0" in value:
                raise ValueError(f"the value of {name!r} holds a NUL character")
            lowered = name.lower()
            if lowered == "client_encoding" and value.lower().replace("-", "") not in {"utf8", "unicode"}:
                raise ValueError("client_encoding must be UTF8: asyncpg knows no other")
            if lowered in {"user", "database", "replication"}:
                raise ValueError(f"{name!r} is no setting but a part of the connection")
        folded = {name.lower(): value for name, value in settings.items()}  # names are case-insensitive in PostgreSQL
        if len(folded) < len(settings):
            raise ValueError("a name is given twice")
        return folded

    @field_validator("codecs")
    @classmethod
    def _check_codecs(cls, codecs: dict[str, str]) -> dict[str, str]:
        for type_name, codec in codecs.items():
            if not type_name or "\0" in type_name:
                raise ValueError("a PostgreSQL type's name is missing")
            if codec not in CODECS:
                raise ValueError(f"no codec is named {codec!r}{did_you_mean(codec, CODECS)}")
        return codecs

    @field_validator("application_name", "monitoring_host")
    @classmethod
    def _check_text(cls, text: str | None) -> str | None:
        if text is not None and "\0" in text:
            raise ValueError("it holds a NUL character")
        return text

    @model_validator(mode="after")
    def _check_together(self) -> Tunables:
        problems = []
        if self.min_connections > self.max_connections:
            problems.append(
                f"min_connections={self.min_connections} is more than max_connections={self.max_connections}"
            )
        if isinstance(self.workers, int) and self.workers > self.max_connections:
            problems.append(
                f"workers={self.workers} is more than max_connections={self.max_connections}: "
                "each worker needs a connection"
            )
        most, first = self.circuit_breaker_max_recovery_timeout, self.circuit_breaker_recovery_timeout
        if most is not None and most < first:
            problems.append(
                f"circuit_breaker_max_recovery_timeout={most:g} is less than circuit_breaker_recovery_timeout={first:g}"
            )
        named = self.server_settings.get("application_name")
        if named is not None and self.application_name is not None and named != self.application_name:
            problems.append(
                f"application_name={self.application_name!r} contradicts application_name={named!r} of server_settings"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self
