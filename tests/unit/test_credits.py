"""Credits are divided fairly over jobs and their clients, and never below what keeps a client going."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raypg.core.credits import GRACE, LEAST, SECONDS, Ledger, shares

MB = 1_000_000


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 100), max_size=8), st.integers(0, 300))
def test_shares_are_max_min_fair(wanted: dict[str, int], whole: int) -> None:
    granted = shares(wanted, whole)
    assert granted.keys() == wanted.keys()
    assert all(granted[key] <= wanted[key] for key in wanted)
    assert sum(granted.values()) <= whole
    if sum(wanted.values()) <= whole:
        assert granted == wanted
    else:
        assert sum(granted.values()) == whole
        # Who did not get all it wanted has at least as much as anybody else, but for what cannot be divided.
        for key in wanted:
            if granted[key] < wanted[key]:
                assert all(granted[key] >= other - 1 for other in granted.values())


def test_a_lone_client_gets_what_it_wants() -> None:
    assert Ledger(100 * MB).take("a", "j", 30 * MB, 0.0) == 30 * MB
    assert Ledger(10 * MB).take("a", "j", 30 * MB, 0.0) == 10 * MB


def test_jobs_share_and_not_clients() -> None:
    """A job of nine clients gets no more than a job of one."""
    ledger = Ledger(20 * MB)
    for client in range(9):
        ledger.take(f"heavy{client}", "heavy", 100 * MB, 0.0)
    assert ledger.take("light", "light", 100 * MB, 0.0) == 10 * MB
    assert ledger.take("heavy0", "heavy", 100 * MB, 0.0) == 10 * MB // 9


def test_what_a_modest_job_leaves_goes_to_others() -> None:
    ledger = Ledger(20 * MB)
    ledger.take("a", "modest", 1 * MB, 0.0)
    assert ledger.take("b", "greedy", 100 * MB, 0.0) == 19 * MB


def test_nobody_stands_still() -> None:
    ledger = Ledger(1 * MB)
    granted = [ledger.take(f"c{n}", f"j{n}", 50 * MB, 0.0) for n in range(500)]
    assert min(granted) >= LEAST


def test_who_leaves_or_does_not_ask_again_is_forgotten() -> None:
    ledger = Ledger(20 * MB)
    ledger.take("a", "one", 100 * MB, 0.0)
    assert ledger.take("b", "two", 100 * MB, 0.5) == 10 * MB
    ledger.leave("a")
    assert ledger.take("b", "two", 100 * MB, 0.6) == 20 * MB
    ledger.take("a", "one", 100 * MB, 1.0)
    assert ledger.take("b", "two", 100 * MB, 1.0 + SECONDS + GRACE) == 20 * MB
    assert len(ledger) == 1
    ledger.leave("nobody")
