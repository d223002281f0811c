"""What becomes of alert rules as figures change: pending, firing, resolved; each rule for each pool by itself.

A condition that holds is *pending* until it has held for the rule's ``duration_seconds`` and the rule's
``cooldown_seconds`` since the last time are over; then it *fires*, once. It is *resolved* when it does not hold any
more, or when that cannot be known. The clock is passed in: seconds since the epoch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from raypg.core.alert_rule import SEVERITIES, Rule
from raypg.core.condition import shown

__all__ = ["FIRING", "MOST_REMEMBERED", "PENDING", "RESOLVED", "Alert", "Alerts"]

PENDING: Final = "pending"
FIRING: Final = "firing"
RESOLVED: Final = "resolved"

MOST_REMEMBERED: Final = 200
"""Alerts in the history: the newest."""

DELETED: Final = "the rule was deleted"
ENDED: Final = "the pool has ended"

Key = tuple[str, str]
"""(id of a rule, pool)."""


@dataclass
class Alert:
    """A rule whose condition holds, or held, in one pool.

    Attributes:
        state: ``pending``, ``firing`` or ``resolved``.
        since: when its condition began to hold; all times in seconds since the epoch.
        value: what the condition compares, when it held last; ``None`` if that is not known.
        message: the condition, and its figures when it held last.
    """

    rule_id: str
    name: str
    pool: str
    severity: str
    state: str
    since: float
    fired_at: float | None = None
    resolved_at: float | None = None
    value: float | None = None
    message: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain data, from which ``Alert(**data)`` makes it again."""
        return asdict(self)


class Alerts:
    """The state of all rules in all pools.

    Attributes:
        history: what has fired, oldest first; what fires still is among it.
    """

    def __init__(self) -> None:
        self.history: deque[Alert] = deque(maxlen=MOST_REMEMBERED)
        self._active: dict[Key, Alert] = {}
        self._quiet: dict[Key, float] = {}  # until when it may not fire again
        self._changes = 0

    @property
    def changes(self) -> int:
        """How often any state has changed: what is kept of it elsewhere is as old as its number."""
        return self._changes

    def active(self) -> list[Alert]:
        """What is pending or fires: the firing first, then the worst, then the oldest."""
        return sorted(
            self._active.values(),
            key=lambda alert: (alert.state != FIRING, -SEVERITIES.index(alert.severity), alert.since, alert.name),
        )

    def evaluate(
        self, rules: Collection[Rule], pools: Mapping[str, Mapping[str, float] | None], now: float
    ) -> list[Alert]:
        """See which conditions hold now.

        Args:
            rules: all there are: alerts of others are resolved.
            pools: all there are, with the figures that the rules name; ``None``: these are not known yet, and the
                pool's alerts stay as they are.

        Returns:
            What has just fired or been resolved, in order, as it is now.
        """
        news: list[Alert] = []
        seen: set[Key] = set()
        for rule in rules:
            for pool, figures in pools.items():
                if not rule.is_for(pool):
                    continue
                key = rule.id, pool
                seen.add(key)
                if figures is not None:
                    news += self._look(rule, key, figures, now)
        for key in [key for key in self._active if key not in seen]:
            news += self._end(key, now, 0.0, DELETED if key[1] in pools else ENDED)
        for key in [key for key, until in self._quiet.items() if until <= now]:
            del self._quiet[key]
        return news

    def drop(self, rule_id: str, now: float) -> list[Alert]:
        """This rule was deleted: its alerts are resolved; those that fired are returned."""
        news: list[Alert] = []
        for key in [key for key in self._active if key[0] == rule_id]:
            news += self._end(key, now, 0.0, DELETED)
        return news

    def _look(self, rule: Rule, key: Key, figures: Mapping[str, float], now: float) -> list[Alert]:
        alert = self._active.get(key)
        if rule.parsed.verdict(figures) is not True:
            return [] if alert is None else self._end(key, now, rule.cooldown_seconds)
        if alert is None:
            alert = self._active[key] = Alert(rule.id, rule.name, key[1], rule.severity, PENDING, now)
            self._changes += 1
        value = rule.parsed.value(figures)
        alert.value = value if math.isfinite(value) else None
        alert.message = _message(rule, figures)
        # A clock that was set back makes nobody wait for longer than the rule says.
        quiet = 0 < self._quiet.get(key, -math.inf) - now <= rule.cooldown_seconds
        if alert.state == FIRING or quiet or now - alert.since < rule.duration_seconds:
            return []
        alert.state, alert.fired_at = FIRING, now
        self.history.append(alert)
        self._changes += 1
        return [replace(alert)]

    def _end(self, key: Key, now: float, cooldown: float, why: str = "") -> list[Alert]:
        alert = self._active.pop(key)
        self._changes += 1
        if alert.state != FIRING:
            return []
        alert.state, alert.resolved_at = RESOLVED, now
        if why:
            alert.message = f"{alert.message}; {why}"
        if cooldown:
            self._quiet[key] = now + cooldown
        return [replace(alert)]

    # --- to be kept ---

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "active": [alert.to_dict() for alert in self._active.values()],
            "history": [alert.to_dict() for alert in self.history],
            "quiet": [[*key, until] for key, until in self._quiet.items()],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Alerts:
        """The same from :meth:`to_dict`."""
        alerts = cls()
        alerts.history.extend(Alert(**alert) for alert in data["history"])
        firing = {(alert.rule_id, alert.pool): alert for alert in alerts.history if alert.state == FIRING}
        for plain in data["active"]:
            alert = Alert(**plain)
            key = alert.rule_id, alert.pool
            alerts._active[key] = firing.get(key, alert) if alert.state == FIRING else alert
        alerts._quiet = {(rule_id, pool): until for rule_id, pool, until in data["quiet"]}
        return alerts


def _message(rule: Rule, figures: Mapping[str, float]) -> str:
    named = ", ".join(f"{name} is {shown(figures[name])}" for name in rule.parsed.names)
    return f"{rule.text}: {named}"
