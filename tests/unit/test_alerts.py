"""Alerts fire once, when they must and not before, and end; whatever becomes of the process that watches them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypg.core.alert_rule import Rule
from raypg.core.alerts import MOST_REMEMBERED, Alerts

START = 1_000_000.0
BAD, GOOD, UNKNOWN = {"queue_depth": 5.0}, {"queue_depth": 0.0}, {"queue_depth": math.nan}
Figures = dict[str, float] | None


def rule(id: str = "r", duration: float = 0.0, cooldown: float = 0.0, severity: str = "warning", **more: str) -> Rule:
    return Rule(id, id.upper(), "queue_depth", 3.0, duration, cooldown, severity, **more)  # type: ignore[arg-type]


def kept_and_restored(alerts: Alerts) -> Alerts:
    return Alerts.from_dict(json.loads(json.dumps(alerts.to_dict())))


steps = st.lists(
    st.tuples(st.sampled_from([0.5, 1.0, 7.0]), st.sampled_from([BAD, BAD, BAD, GOOD, UNKNOWN, None])), max_size=40
)


@given(steps, st.sampled_from([0.0, 3.0, 10.0]), st.sampled_from([0.0, 5.0, 20.0]))
def test_it_fires_exactly_when_it_must(
    steps: Sequence[tuple[float, Figures]], duration: float, cooldown: float
) -> None:
    watched = rule(duration=duration, cooldown=cooldown)
    alerts, twin = Alerts(), Alerts()
    now, held_since, quiet_until, firing = START, math.inf, -math.inf, False
    told = []
    for passed, figures in steps:
        now += passed
        news = alerts.evaluate([watched], {"p": figures}, now)
        twin = kept_and_restored(twin)  # this one is killed after every step
        assert twin.evaluate([watched], {"p": figures}, now) == news
        expected = []
        if figures is not None:  # else nothing is known, and nothing changes
            holds = figures is BAD
            held_since = min(held_since, now) if holds else math.inf
            if firing and not holds:
                firing, quiet_until = False, now + cooldown
                expected = ["resolved"]
            elif not firing and now - held_since >= duration and now >= quiet_until:
                firing = True
                expected = ["firing"]
        assert [alert.state for alert in news] == expected
        states = [alert.state for alert in alerts.active()]
        assert states == ([] if held_since == math.inf else ["firing" if firing else "pending"])
        assert all(alert.since == held_since for alert in alerts.active())
        told += news
    assert kept_and_restored(alerts).to_dict() == alerts.to_dict() == twin.to_dict()
    fired = [alert for alert in told if alert.state == "firing"]
    assert [alert.fired_at for alert in alerts.history] == [alert.fired_at for alert in fired]
    assert [alert.state for alert in alerts.history] == ["resolved"] * (len(fired) - firing) + ["firing"] * firing


def test_what_is_told() -> None:
    alerts = Alerts()
    (fired,) = alerts.evaluate([rule()], {"p": BAD}, START)
    assert fired.to_dict() == {
        "rule_id": "r",
        "name": "R",
        "pool": "p",
        "severity": "warning",
        "state": "firing",
        "since": START,
        "fired_at": START,
        "resolved_at": None,
        "value": 5.0,
        "message": "queue_depth > 3: queue_depth is 5",
    }
    assert alerts.evaluate([rule()], {"p": {"queue_depth": 9.0}}, START + 1) == []
    assert alerts.active()[0].value == 9
    (resolved,) = alerts.evaluate([rule()], {"p": GOOD}, START + 2)
    assert (resolved.state, resolved.resolved_at, resolved.value) == ("resolved", START + 2, 9.0)
    assert fired.state == "firing"  # what was told does not change


def test_each_pool_by_itself() -> None:
    alerts = Alerts()
    rules = [rule(), rule("only", pool="q")]
    news = alerts.evaluate(rules, {"p": BAD, "q": BAD}, START)
    assert sorted((alert.rule_id, alert.pool) for alert in news) == [("only", "q"), ("r", "p"), ("r", "q")]
    news = alerts.evaluate(rules, {"p": GOOD, "q": BAD}, START + 1)
    assert [(alert.rule_id, alert.pool, alert.state) for alert in news] == [("r", "p", "resolved")]


def test_what_is_gone_is_resolved() -> None:
    alerts = Alerts()
    rules = [rule("a"), rule("b", duration=60), rule("c")]
    alerts.evaluate(rules, {"p": BAD, "q": BAD}, START)
    assert [(alert.pool, alert.message) for alert in alerts.drop("a", START + 1)] == [
        ("p", "queue_depth > 3: queue_depth is 5; the rule was deleted"),
        ("q", "queue_depth > 3: queue_depth is 5; the rule was deleted"),
    ]
    (ended,) = alerts.evaluate(rules[1:], {"q": BAD}, START + 2)
    assert (ended.rule_id, ended.pool, ended.state) == ("c", "p", "resolved")
    assert ended.message.endswith("; the pool has ended")
    (deleted,) = alerts.evaluate(rules[1:2], {"q": BAD}, START + 3)
    assert (deleted.rule_id, deleted.message.partition("; ")[2]) == ("c", "the rule was deleted")
    assert [alert.state for alert in alerts.active()] == ["pending"]


def test_the_worst_comes_first() -> None:
    alerts = Alerts()
    rules = [rule("i", severity="info"), rule("c", severity="critical"), rule("p", 60.0, severity="critical")]
    alerts.evaluate(rules[:1], {"p": BAD}, START)
    alerts.evaluate(rules, {"p": BAD}, START + 1)
    assert [alert.rule_id for alert in alerts.active()] == ["c", "i", "p"]


def test_the_history_is_bounded() -> None:
    alerts = Alerts()
    for second in range(2 * MOST_REMEMBERED + 100):
        alerts.evaluate([rule()], {"p": GOOD if second % 2 else BAD}, START + second)
    assert len(alerts.history) == MOST_REMEMBERED
    assert alerts.history[-1].fired_at == START + 2 * MOST_REMEMBERED + 98
    assert len(json.dumps(alerts.to_dict())) < 100_000


def test_changes_say_when_to_keep_it() -> None:
    alerts = Alerts()
    watched = [rule(duration=2)]
    counts = []
    for second, figures in enumerate([GOOD, BAD, BAD, BAD, BAD, GOOD, GOOD]):
        alerts.evaluate(watched, {"p": figures}, START + second)
        counts.append(alerts.changes)
    assert counts == [0, 1, 1, 2, 2, 3, 3]


def test_a_clock_that_was_set_back_silences_nobody() -> None:
    alerts = Alerts()
    watched = [rule(cooldown=60)]
    alerts.evaluate(watched, {"p": BAD}, START)
    alerts.evaluate(watched, {"p": GOOD}, START + 1)
    assert alerts.evaluate(watched, {"p": BAD}, START + 2) == []
    alerts.evaluate(watched, {"p": GOOD}, START + 3)
    (fired,) = alerts.evaluate(watched, {"p": BAD}, START - 86_400)
    assert fired.state == "firing"


@pytest.mark.parametrize("figures", [GOOD, UNKNOWN])
def test_what_is_unknown_does_not_hold(figures: dict[str, float]) -> None:
    alerts = Alerts()
    alerts.evaluate([rule()], {"p": BAD}, START)
    (resolved,) = alerts.evaluate([rule()], {"p": figures}, START + 1)
    assert resolved.state == "resolved"
