"""What a rule may say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from raypg.core.alert_rule import DEFAULTS, SEVERITIES, Rule, make_rule, without_secrets
from raypg.core.figures_by_name import FIGURES
from raypg.errors import ConfigError, UnknownFigureError

GOOD: dict[str, Any] = {"name": "Slow", "condition": "avg_query_time_ms > 100"}


def test_the_guides_rule_and_what_it_leaves_out() -> None:
    given = {**GOOD, "threshold": 100, "duration_seconds": 60, "severity": "warning"}
    rule = make_rule(given, "slow-1")
    assert rule.to_dict() == {
        **given,
        "id": "slow-1",
        "cooldown_seconds": 60.0,
        "pool": None,
        "webhook_url": None,
        "default": False,
    }
    assert make_rule({**GOOD, "threshold": None, "pool": None}, "x").duration_seconds == 60.0


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"treshold": 1}, "unknown key 'treshold' (did you mean 'threshold'?)"),
        ({"default": True}, "unknown key 'default'"),
        ({"name": None}, "name must be given"),
        ({"name": " "}, "name must be 1 to 100 printable characters"),
        ({"name": "a\nb"}, "name must be 1 to 100 printable characters"),
        ({"name": 5}, "name must be a string, not 5"),
        ({"condition": "avg_query_time_ms"}, "give a threshold"),
        ({"threshold": "abc"}, "threshold must be a number, not 'abc'"),
        ({"threshold": True}, "threshold must be a number, not True"),
        ({"threshold": float("nan")}, "threshold must be a number, not nan"),
        ({"threshold": 200}, "it compares with 100, but threshold is 200"),
        ({"duration_seconds": -1}, "duration_seconds must be 0 to 604800 seconds, not -1"),
        ({"cooldown_seconds": 1e9}, "cooldown_seconds must be 0 to 604800 seconds"),
        ({"severity": "Critcal"}, "severity='Critcal' (did you mean 'critical'?)"),
        ({"severity": 7}, "severity=7 (known: critical, error, info, warning)"),
        ({"webhook_url": "ftp://host/x"}, "webhook_url must be an address http://… or https://…"),
        ({"webhook_url": "http:///x"}, "webhook_url must be an address"),
        ({"webhook_url": "http://host:port/"}, "webhook_url must be an address"),
        ({"webhook_url": "http://[::1/"}, "webhook_url must be an address"),
        ({"webhook_url": "https://me:hunter2@host/"}, "webhook_url holds a user name or password"),
    ],
)
def test_what_is_wrong_is_said(wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_rule({**GOOD, **wrong}, "x")
    assert complaint in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_no_dict_and_no_figure() -> None:
    with pytest.raises(ConfigError, match="an alert rule is a dict"):
        make_rule([], "x")  # type: ignore[arg-type]
    with pytest.raises(UnknownFigureError):
        make_rule({**GOOD, "condition": "avg > 1"}, "x")


def test_it_is_kept_as_json() -> None:
    rule = make_rule({**GOOD, "webhook_url": "https://host/secret", "pool": "main", "severity": "critical"}, "x")
    again = Rule(**json.loads(json.dumps(rule.to_dict())))
    assert again == rule
    assert again.parsed.verdict({"avg_query_time_ms": 101.0}) is True
    assert rule.is_for("main")
    assert not rule.is_for("other")
    assert rule.says_the_same(Rule(**{**rule.to_dict(), "id": "y"}))
    assert not rule.says_the_same(Rule(**{**rule.to_dict(), "severity": "info"}))


def test_what_is_shown_of_an_address() -> None:
    assert without_secrets("https://hooks.example.com/services/T0/B0/xyz") == "https://hooks.example.com/…"
    assert without_secrets("http://[::1]:9/?key=x") == "http://[::1]:9/…"
    assert without_secrets("http://127.0.0.1:8000/") == "http://127.0.0.1:8000"


CALM = {name: 0.0 for rule in DEFAULTS for name in rule.parsed.names} | {"max_connections": 10.0}
"""A pool in which nothing is wrong."""


@pytest.mark.parametrize(
    ("id", "wrong"),
    [
        ("default-utilization", {"active_connections": 9.0, "queue_depth": 1.0}),  # one of ten is for control
        ("default-utilization", {"max_connections": 2.0, "active_connections": 2.0, "queue_depth": 1.0}),
        ("default-error-rate", {"error_rate": 0.06, "calls_last_minute": 10.0}),
        ("default-exhausted", {"pool_exhaustion_events_last_minute": 1.0}),
        ("default-breaker-open", {"circuit_breaker_open": 1.0}),
        ("default-breaker-open", {"circuit_breaker_half_open": 1.0}),
        ("default-replica-lag", {"replica_lag_seconds": 31.0}),
        ("default-no-data", {"seconds_since_report": 11.0}),
    ],
)
def test_the_rules_of_a_new_cluster(id: str, wrong: dict[str, float]) -> None:
    assert [rule.id for rule in DEFAULTS if rule.parsed.verdict(CALM)] == []
    assert [rule.id for rule in DEFAULTS if rule.parsed.verdict({**CALM, **wrong})] == [id]
    (rule,) = (rule for rule in DEFAULTS if rule.id == id)
    assert rule.default
    assert rule.severity in SEVERITIES
    unknown = dict.fromkeys(FIGURES, float("nan"))
    assert rule.parsed.verdict(unknown) is None
