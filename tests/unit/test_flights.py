"""Whose answer a call may wait for: nobody waits longer for another one's than it may for its own."""

from __future__ import annotations

import pytest

from raypg.router_cache import comes_in_time


@pytest.mark.parametrize(
    ("theirs", "ours", "usual", "whether"),
    [
        (1.0, 1.0, 30.0, True),
        (2.0, 1.0, 30.0, False),
        (60.0, None, 30.0, False),  # who names no limit has one all the same
        (None, 10.0, 30.0, False),
        (None, 30.0, 30.0, True),
        (None, None, 30.0, True),
        (60.0, None, None, True),
        (None, 60.0, None, False),
    ],
)
def test_an_answer_is_waited_for_no_longer_than_ones_own(
    theirs: float | None, ours: float | None, usual: float | None, whether: bool
) -> None:
    assert comes_in_time(theirs, ours, usual) is whether
