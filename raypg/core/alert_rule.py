"""Rules of alerts: what they say, what they may say, and those that every cluster begins with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final
from urllib.parse import urlsplit

from raypg.core.condition import LONGEST, Condition, parse
from raypg.core.figures_by_name import FIGURES
from raypg.core.nearest import did_you_mean
from raypg.errors import ConfigError

__all__ = ["DEFAULTS", "SEVERITIES", "Rule", "make_rule", "without_secrets"]

SEVERITIES: Final = ("info", "warning", "error", "critical")
"""From least to worst."""

LONGEST_NAME: Final = 100
LONGEST_URL: Final = 2000
LONGEST_TIME: Final = 7 * 86_400.0
"""Seconds that a rule may hold or cool down."""

_GIVEN: Final = (
    "name",
    "condition",
    "threshold",
    "duration_seconds",
    "cooldown_seconds",
    "severity",
    "pool",
    "webhook_url",
)


@dataclass(frozen=True)
class Rule:
    """One rule; it is watched for each pool by itself.

    Attributes:
        id: of this rule alone.
        name: for people.
        condition: as :func:`raypg.core.condition.parse` reads it.
        threshold: what a condition without a comparison is to exceed; ``None`` if it says that itself.
        duration_seconds: for so long it must hold before the alert fires.
        cooldown_seconds: for so long after it was resolved the alert does not fire again.
        severity: one of :data:`SEVERITIES`.
        pool: the only pool that it is for; ``None``: for all.
        webhook_url: where to POST what fires and what is resolved.
        default: whether every cluster begins with it.
    """

    id: str
    name: str
    condition: str
    threshold: float | None = None
    duration_seconds: float = 60.0
    cooldown_seconds: float = 60.0
    severity: str = "warning"
    pool: str | None = None
    webhook_url: str | None = None
    default: bool = False
    parsed: Condition = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parsed", parse(self.condition, FIGURES, self.threshold))

    def is_for(self, pool: str) -> bool:
        """Whether it watches this pool."""
        return self.pool is None or self.pool == pool

    @property
    def text(self) -> str:
        """The whole condition."""
        return f"{self.condition} > {self.threshold:g}" if self.parsed.is_bare else self.condition

    def to_dict(self) -> dict[str, Any]:
        """As plain data, from which ``Rule(**data)`` makes it again."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.init}

    def says_the_same(self, other: Rule) -> bool:
        """Whether both differ in their ids at most."""
        return {**self.to_dict(), "id": ""} == {**other.to_dict(), "id": ""}


def make_rule(given: Mapping[str, Any], id: str) -> Rule:
    """A rule from what a user gave.

    Raises:
        ConfigError: something is missing, unknown or wrong.
        UnknownFigureError: the condition names a figure that there is not.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"an alert rule is a dict with {', '.join(_GIVEN)}, not {type(given).__name__}")
    for key in given:
        if key not in _GIVEN:
            raise ConfigError(f"alert rule: unknown key {key!r}{did_you_mean(str(key), _GIVEN)}")
    if missing := [key for key in ("name", "condition") if given.get(key) is None]:
        raise ConfigError(f"alert rule: {' and '.join(missing)} must be given")
    values = {key: value for key, value in given.items() if value is not None}
    for key, check in _CHECKS.items():
        if key in values:
            values[key] = check(key, values[key])
    return Rule(id, **values)


def without_secrets(url: str) -> str:
    """What may be shown of a webhook's address: paths and queries of many services are passwords."""
    parts = urlsplit(url)
    whole = parts.path in ("", "/") and not parts.query
    return f"{parts.scheme}://{parts.netloc}" + ("" if whole else "/…")


# --- checks ----------------------------------------------------------------------------------------------------------


def _text(most: int) -> Callable[[str, Any], str]:
    def check(key: str, value: Any) -> str:
        if not isinstance(value, str):
            raise ConfigError(f"alert rule: {key} must be a string, not {value!r}")
        if not value.strip() or len(value) > most or not value.isprintable():
            raise ConfigError(f"alert rule: {key} must be 1 to {most} printable characters, not {value[:50]!r}")
        return value.strip()

    return check


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"alert rule: {key} must be a number, not {value!r}")
    return float(value)


def _seconds(key: str, value: Any) -> float:
    seconds = _number(key, value)
    if not 0 <= seconds <= LONGEST_TIME:
        raise ConfigError(f"alert rule: {key} must be 0 to {LONGEST_TIME:.0f} seconds, not {value!r}")
    return seconds


def _severity(key: str, value: Any) -> str:
    if value not in SEVERITIES:
        raise ConfigError(f"alert rule: {key}={value!r}{did_you_mean(str(value), SEVERITIES)}")
    return str(value)


def _url(key: str, value: Any) -> str:
    url = _text(LONGEST_URL)(key, value)
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port that is no number, or half an IPv6 address
        good = False
    if not good or " " in url:
        raise ConfigError(f"alert rule: {key} must be an address http://… or https://…")
    if "@" in parts.netloc:
        raise ConfigError(f"alert rule: {key} holds a user name or password; rules are stored and shown: leave it out")
    return url


_CHECKS: Final[Mapping[str, Callable[[str, Any], Any]]] = {
    "name": _text(LONGEST_NAME),
    "condition": _text(LONGEST),
    "threshold": _number,
    "duration_seconds": _seconds,
    "cooldown_seconds": _seconds,
    "severity": _severity,
    "pool": _text(32),
    "webhook_url": _url,
}

# --- what every cluster begins with ----------------------------------------------------------------------------------

DEFAULTS: Final = tuple(
    Rule(f"default-{id}", name, condition, None, duration, severity=severity, default=True)
    for id, name, condition, duration, severity in (
        # One connection of the cap is for control: of ten, nine can be in use.
        (
            "utilization",
            "Pool saturated",
            "active_connections >= 0.9 * (max_connections - 1) and queue_depth > 0",
            60.0,
            "warning",
        ),
        ("error-rate", "Error rate high", "error_rate > 0.05 and calls_last_minute >= 10", 60.0, "error"),
        ("exhausted", "Pool exhausted", "pool_exhaustion_events_last_minute > 0", 0.0, "error"),
        # Half open it only tries: one outage is one alert.
        (
            "breaker-open",
            "Circuit breaker open",
            "circuit_breaker_open == 1 or circuit_breaker_half_open == 1",
            0.0,
            "critical",
        ),
        ("replica-lag", "Replica behind", "replica_lag_seconds > 30", 60.0, "warning"),
        ("no-data", "Nothing heard of the pool", "seconds_since_report > 10", 0.0, "critical"),
    )
)
"""The rules of a new cluster; they can be deleted."""
