"""What the Metrics actor knows of alerts: the rules, what has become of them, and who is told.

All of it is in Ray's key-value store the moment it changes. So the next life of the actor has the rules, does not fire
again what fires, and tells webhooks what they were not told; one that was told just before the end may be told twice,
with the same ``id``.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from raypg import _compat, naming
from raypg.actors.webhooks import Message, Webhooks
from raypg.core.alert_rule import DEFAULTS, Rule, make_rule, without_secrets
from raypg.core.alerts import FIRING, Alert, Alerts
from raypg.core.figures_by_name import DESCRIPTIONS, Snapshot, figures
from raypg.core.nearest import nearest
from raypg.errors import AlertRuleNotFoundError, ConfigError

__all__ = ["AlertKeeper"]

logger = logging.getLogger("raypg.alerts")

MOST_RULES = 200
"""Rules that there may be: all are looked at once a second, for each pool."""

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR, "critical": logging.CRITICAL}


class AlertKeeper:
    """Rules and alerts of all pools."""

    def __init__(self) -> None:
        _log_somewhere()
        self.rules: dict[str, Rule] = {rule.id: rule for rule in _stored_rules()}
        self._alerts, waiting = _stored_state()
        self._kept = self._alerts.changes
        self._webhooks = Webhooks(waiting, self._keep)

    def evaluate(self, pools: Mapping[str, Snapshot | None], now: float) -> None:
        """See which rules hold.

        Args:
            pools: snapshots of all pools; ``None`` for those of which not all is known yet.
            now: seconds since the epoch.
        """
        rules = tuple(self.rules.values())
        named = {
            pool: None
            if known is None
            else figures(known, {n for r in rules if r.is_for(pool) for n in r.parsed.names})
            for pool, known in pools.items()
        }
        self._tell(self._alerts.evaluate(rules, named, now))

    # --- for those who look ---

    def describe(self, pool: str | None, history: int, names: bool) -> dict[str, Any]:
        """Rules, what is pending or fires, and what has fired, the newest first.

        Args:
            pool: only what is for this one.
            history: how many of what has fired.
            names: whether with the figures that a condition may name.
        """
        rules = [rule for rule in self.rules.values() if pool is None or rule.is_for(pool)]
        active, fired = (
            [alert for alert in alerts if pool in (None, alert.pool)]
            for alerts in (self._alerts.active(), reversed(self._alerts.history))
        )
        return {
            "rules": [_shown(rule) for rule in rules],
            "active": [alert.to_dict() for alert in active],
            "history": [alert.to_dict() for alert in fired[:history]],
            "webhooks": self._webhooks.status({rule.webhook_url for rule in self.rules.values() if rule.webhook_url}),
            "names": dict(DESCRIPTIONS) if names else {},
        }

    def states(self, pool: str) -> list[tuple[str, str, bool]]:
        """(Name, severity, whether it fires) of each rule for *pool*."""
        firing = {alert.rule_id for alert in self._alerts.active() if alert.pool == pool and alert.state == FIRING}
        return [(rule.name, rule.severity, rule.id in firing) for rule in self.rules.values() if rule.is_for(pool)]

    # --- for those who change rules ---

    def add(self, given: Mapping[str, Any]) -> str:
        """Add a rule; its id. One that says the same as another is that one.

        Raises:
            ConfigError: it is no good, or there are too many.
        """
        rule = make_rule(given, secrets.token_hex(3))
        words = re.sub("[^a-z0-9]+", "-", rule.name.lower()).strip("-")[:40]
        rule = replace(rule, id=f"{words or 'rule'}-{rule.id}")
        for other in self.rules.values():
            if other.says_the_same(rule):
                return other.id
        if len(self.rules) >= MOST_RULES:
            raise ConfigError(f"there are {MOST_RULES} alert rules, which is the most there may be; delete one first")
        self.rules[rule.id] = rule
        self._keep_rules()
        return rule.id

    def delete(self, id: str, now: float) -> None:
        """Delete a rule; what it fired is resolved.

        Raises:
            AlertRuleNotFoundError: there is none of this id.
        """
        if id not in self.rules:
            raise AlertRuleNotFoundError(id, sorted(self.rules), nearest(id, self.rules))
        self._tell(self._alerts.drop(id, now))
        del self.rules[id]
        self._keep_rules()

    # --- inside ---

    def _tell(self, news: list[Alert]) -> None:
        for alert in news:
            url = self.rules[alert.rule_id].webhook_url if alert.rule_id in self.rules else None
            if url is not None:
                at = alert.fired_at if alert.resolved_at is None else alert.resolved_at
                self._webhooks.send(url, self._body(alert), at or 0.0)
        if self._kept != self._alerts.changes:
            self._keep()
        for alert in news:  # now that the next life knows of it
            logger.log(_LEVELS[alert.severity], "%s", _text(alert))

    def _body(self, alert: Alert) -> dict[str, Any]:
        return {
            "id": f"{alert.rule_id}/{alert.pool}/{alert.fired_at:.3f}/{alert.state}",
            "text": _text(alert),  # what Slack, Mattermost and others show
            "condition": self.rules[alert.rule_id].text,
            **alert.to_dict(),
        }

    def _keep(self) -> None:
        state = {"alerts": self._alerts.to_dict(), "waiting": self._webhooks.waiting()}
        _compat.kv_put(naming.ALERT_STATE_KEY, json.dumps(state).encode())
        self._kept = self._alerts.changes

    def _keep_rules(self) -> None:
        rules = [rule.to_dict() for rule in self.rules.values()]
        _compat.kv_put(naming.ALERT_RULES_KEY, json.dumps(rules).encode())


def _text(alert: Alert) -> str:
    return f"{alert.state} [{alert.severity}] {alert.name}, pool {alert.pool}: {alert.message}"


def _shown(rule: Rule) -> dict[str, Any]:
    shown = rule.to_dict()
    if rule.webhook_url is not None:
        shown["webhook_url"] = without_secrets(rule.webhook_url)
    return shown


def _stored(key: str) -> Any:
    """What an earlier life kept; ``None`` if there is nothing that can be read."""
    stored = _compat.kv_get(key)
    try:
        return None if stored is None else json.loads(stored)
    except ValueError:
        logger.error("what was kept of alerts under %s cannot be read; it begins anew", key)
        return None


def _stored_rules() -> list[Rule]:
    stored = _stored(naming.ALERT_RULES_KEY)
    if not isinstance(stored, list):
        return list(DEFAULTS)
    rules = []
    for kept in stored:
        try:
            rules.append(Rule(**kept))
        except (ConfigError, TypeError) as error:
            logger.error("an alert rule was kept by another version of raypg, and is not watched: %s", error)
    return rules


def _stored_state() -> tuple[Alerts, list[Message]]:
    kept = _stored(naming.ALERT_STATE_KEY)
    if kept is None:
        return Alerts(), []
    try:
        return Alerts.from_dict(kept["alerts"]), kept["waiting"]
    except (TypeError, KeyError, ValueError):
        logger.error("what has fired was kept by another version of raypg; it begins anew")
        return Alerts(), []


def _log_somewhere() -> None:
    """To standard error, which Ray keeps in files and shows to drivers, unless somebody has said where to."""
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
