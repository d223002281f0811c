"""What is learnt of statements: it comes from what happened, ages, is bounded, and decides as it says."""

from __future__ import annotations

import pytest

from raypg.core.patterns import HALF_LIFE, LEAST, TRY_EVERY, FoldGain, Frequent, Pattern, Patterns

BY_ID = "select a from t where id = $1"


def pattern(seconds: float = 0.001, target: str = "primary") -> Pattern:
    found = Patterns().of(BY_ID, 0.0)
    for _ in range(10):
        found.asked(target, seconds, 1, 0.0)
    return found


def keeps(found: Pattern, now: float = 0.0) -> int:
    """How many of the next 160 results are to be kept."""
    return sum(found.is_worth_keeping(now) for _ in range(160))


def test_what_is_read_again_is_kept_and_what_is_dropped_before_is_not() -> None:
    assert keeps(pattern()) == 160  # nothing is known yet
    read_again, dropped = pattern(), pattern()
    for _ in range(20):
        read_again.ended(3, False, 0.0)
        dropped.ended(0, True, 0.0)
    assert keeps(read_again) == 160
    assert keeps(dropped) == 160 // TRY_EVERY


def test_what_is_asked_faster_than_it_is_kept_is_not_kept() -> None:
    quick, slow = pattern(seconds=30e-6), pattern(seconds=0.01)
    for _ in range(20):
        quick.ended(1, False, 0.0)
        slow.ended(1, True, 0.0)
    assert keeps(quick) < 160 // 8
    assert keeps(slow) == 160


def test_a_load_that_changes_is_learnt_anew() -> None:
    found = pattern()
    for _ in range(20):
        found.ended(0, True, 0.0)
    assert keeps(found) < 160
    for _ in range(20):
        found.ended(50, False, 10.0)
    assert keeps(found, 10.0) == 160
    for _ in range(2000):
        found.ended(0, True, 20.0)
    assert keeps(found, 20.0) < 160
    assert keeps(found, 20.0 + 20 * HALF_LIFE) == 160  # forgotten


def test_times_are_learnt_by_target_and_forgotten() -> None:
    found = pattern(0.001, "a")
    for _ in range(10):
        found.asked("b", 0.004, 2, 0.0)
    found.asked("c", 9.0, 1, 0.0)
    assert found.expected() == pytest.approx({"a": 0.001, "b": 0.004})  # one call is no knowledge
    assert found.by_target()["b"] == pytest.approx((10, 0.004, 2))
    for _ in range(int(LEAST) + 1):
        found.asked("b", 0.001, 2, 10 * HALF_LIFE)
    assert found.expected() == pytest.approx({"b": 0.001}, rel=0.01)


def test_texts_that_differ_in_literals_are_one_pattern() -> None:
    patterns = Patterns()
    one = patterns.of("select a from t where id = 1", 0.0)
    assert patterns.of("select a from t where id = 2", 0.0) is one
    assert patterns.of("select b from t where id = 2", 0.0) is not one
    assert "= 1" not in one.text


def test_the_least_valuable_are_forgotten_first() -> None:
    patterns = Patterns(most=100)
    texts = [f"select c{number} from t" for number in range(100)]
    for number, text in enumerate(texts):
        for _ in range(number + 1):
            patterns.of(text, 0.0).asked("primary", 0.001, 1, 0.0)
    patterns.of("select new from t", 0.0)
    assert len(patterns) == 91
    shown = patterns.insights(0.0, most=100)["detected_patterns"]
    assert [entry["recent_calls"] for entry in shown[:3]] == [100, 99, 98]
    assert min(entry["recent_calls"] for entry in shown if entry["recent_calls"]) == 11
    for number in range(10_000):
        patterns.of(f"select d{number} from t", 0.0)
    assert len(patterns) <= 100
    assert len(patterns._by_text) <= 400


def test_insights_are_measured_or_not_there() -> None:
    patterns = Patterns()
    assert patterns.insights(0.0) == {}
    found = patterns.of(BY_ID, 0.0)
    for second in range(600):
        now = float(second)
        patterns.called(now)
        patterns.called(now)
        found.asked("replica", 0.002, 3, now)
        if second < 9:
            assert "workload_forecast" not in patterns.insights(now)
    insights = patterns.insights(600.0)
    (entry,) = insights["detected_patterns"]
    assert entry["by_target"]["replica"].items() >= {"avg_time_ms": pytest.approx(2.0), "avg_rows": 3.0}.items()
    assert "cache" not in entry
    assert insights["workload_forecast"] == {
        "queries_per_second": pytest.approx(2.0, rel=0.02),
        "expected_queries": pytest.approx(120.0, rel=0.02),
        "horizon_seconds": 60.0,
    }
    found.ended(4, False, 600.0)
    found.hit(600.0)
    (entry,) = patterns.insights(600.0)["detected_patterns"]
    assert entry["cache"]["uses_per_result"] == 4.0
    assert entry["cache"]["saved_ms"] == pytest.approx(1.98)
    assert "gain_per_result_ms" not in entry["cache"]  # one is no knowledge


def test_the_most_frequent_of_now_are_known_in_bounded_memory() -> None:
    frequent = Frequent(most=16)
    for number in range(1_000):
        frequent.note(f"rare {number}")
        frequent.note("old")
    for _ in range(2_000):
        frequent.note("new")
        frequent.note("newer")
    for number in range(1_000):
        frequent.note(f"other {number}")
        frequent.note("new")
    assert frequent.top(1) == ["new"]
    assert len(frequent._counts) <= 16
    assert Frequent().top(5) == []
    once = Frequent()
    once.note("once")
    assert once.top(5) == []


def test_reads_go_together_only_where_that_is_faster() -> None:
    gain = FoldGain(most=10)
    assert gain.pays("new")
    for _ in range(20):
        gain.note("quick", 0.0003, False)
        gain.note("quick", 0.0001, True)
        gain.note("heavy", 0.0031, False)
        gain.note("heavy", 0.0030, True)
        gain.note("alone", 0.0031, False)
    assert gain.gain("quick") == pytest.approx(3.0)
    assert gain.gain("alone") is None
    assert [sum(gain.pays(text) for _ in range(160)) for text in ("quick", "heavy", "alone")] == [160, 10, 160]
    for _ in range(200):
        gain.note("heavy", 0.0003, False)
        gain.note("heavy", 0.0001, True)
    assert sum(gain.pays("heavy") for _ in range(160)) == 160  # its table has an index now
    for number in range(100):
        gain.note(f"other {number}", 0.001, True)
    assert len(gain._known) <= 10


def test_replicas_that_are_slow_at_a_statement_are_named_and_tried_again() -> None:
    patterns = Patterns()
    for _ in range(20):
        for target, seconds in (("primary", 0.0001), ("a", 0.001), ("b", 0.0014), ("c", 0.0016), ("d", 0.5)):
            patterns.of(BY_ID, 0.0).asked(target, seconds, 1, 0.0)
    patterns.of(BY_ID, 0.0).asked("e", 9.0, 1, 0.0)  # once is no knowledge
    named = [patterns.slow_ones(BY_ID, 0.0) for _ in range(160)]
    assert set(named) == {("c", "d"), ()}
    assert named.count(()) == 160 // TRY_EVERY
    assert patterns.slow_ones("select other from t", 0.0) == ()
    assert patterns.slow_ones(BY_ID, 20 * HALF_LIFE) == ()  # forgotten
