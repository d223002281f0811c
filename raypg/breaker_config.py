"""The breaker's settings as users give them: one by one to the pool, or together, with the guide's three presets."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from raypg.core.breaker import BreakerConfig
from raypg.errors import ConfigError
from raypg.tunables import Tunables

__all__ = ["CircuitBreakerConfig", "breaker_config"]

PREFIX = "circuit_breaker_"

GROWTH_BY_DEFAULT = 10.0
"""How many times ``recovery_timeout`` it may grow to, if ``max_recovery_timeout`` is not given."""


@dataclass(frozen=True, slots=True)
class CircuitBreakerConfig:
    """What opens a pool's circuit breaker, and how it comes back: ``WorkflowConnectionPool(circuit_breaker=…)``.

    Attributes:
        failure_threshold: failures in a row that open it.
        recovery_timeout: seconds from open to the first probe.
        error_rate: share of failed calls within ``window`` above which it opens, 0–1; 1 = never by rate.
        minimum_calls: calls within ``window`` below which no rate opens it.
        window: seconds that rates are taken over.
        slow_call_duration: seconds from which a call counts as slow; ``None`` = none does.
        slow_call_rate: share of slow calls within ``window`` above which it opens, 0–1.
        max_recovery_timeout: seconds that ``recovery_timeout`` may grow to while a server that is there keeps failing;
            ``None`` = ten times.
        half_open_probes: probes that must succeed to close it.
        ramp: seconds from closed to full load.

    Raises:
        ConfigError: a value is out of range.
    """

    failure_threshold: int = 5
    recovery_timeout: float = 60.0
    error_rate: float = 0.5
    minimum_calls: int = 10
    window: float = 30.0
    slow_call_duration: float | None = None
    slow_call_rate: float = 0.8
    max_recovery_timeout: float | None = None
    half_open_probes: int = 3
    ramp: float = 5.0

    def __post_init__(self) -> None:
        try:
            Tunables.model_validate(self.settings())
        except ValidationError as error:
            raise ConfigError("; ".join(map(_sentence, error.errors(include_url=False)))) from None

    @classmethod
    def conservative(cls) -> CircuitBreakerConfig:
        """Opens quickly, recovers slowly: where a wrong answer is worse than none (finance)."""
        return cls(failure_threshold=3, recovery_timeout=120.0, error_rate=0.1)

    @classmethod
    def balanced(cls) -> CircuitBreakerConfig:
        """The defaults."""
        return cls()

    @classmethod
    def tolerant(cls) -> CircuitBreakerConfig:
        """Puts up with more before it opens, and tries again soon (analytics)."""
        return cls(failure_threshold=10, recovery_timeout=30.0, error_rate=0.7)

    def settings(self) -> dict[str, Any]:
        """The same as keys of the pool's constructor: ``circuit_breaker_failure_threshold`` …"""
        return {PREFIX + key: value for key, value in asdict(self).items()}


def breaker_config(tunables: Tunables) -> BreakerConfig:
    """The state machine's configuration, from a pool's settings."""
    given = {key: getattr(tunables, PREFIX + key) for key in CircuitBreakerConfig.__dataclass_fields__}
    if given["max_recovery_timeout"] is None:
        given["max_recovery_timeout"] = GROWTH_BY_DEFAULT * given["recovery_timeout"]
    return BreakerConfig(**given)


def _sentence(problem: Any) -> str:
    key = str(problem["loc"][0]).removeprefix(PREFIX) if problem["loc"] else ""
    reason = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be").replace(PREFIX, "")
    return f"{key}={problem['input']!r}: {reason}" if key else reason
