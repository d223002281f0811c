"""Which texts count as quick."""

from __future__ import annotations

from raypg.server.reads import QUICK, Pace


def test_what_never_ran_is_not_quick() -> None:
    assert not Pace().is_quick("select 1")


def test_one_slow_run_counts_at_once_and_is_forgotten_slowly() -> None:
    pace = Pace()
    pace.note("q", QUICK / 10)
    assert pace.is_quick("q")
    pace.note("q", QUICK * 10)
    assert not pace.is_quick("q")
    runs = 0
    while not pace.is_quick("q"):
        pace.note("q", QUICK / 10)
        runs += 1
    assert 15 < runs < 40


def test_memory_is_bounded_and_keeps_what_was_used_last() -> None:
    pace = Pace(most=10)
    for number in range(100):
        pace.note(f"q{number}", 0.001)
    assert [pace.is_quick(f"q{number}") for number in (0, 89, 90, 99)] == [False, False, True, True]
