"""Histories of reads and writes from several processes, and a checker that finds answers which are too old.

Every row has a version that only grows: writes add one to it and say which it is now. So of any two answers it is plain
which is newer. Times are of a clock that all processes share (``CLOCK_MONOTONIC`` of one machine).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

__all__ = ["Operation", "check"]

Seen: TypeAlias = "dict[str, int]"
"""Row → its version; a row that is not there has version 0."""


class Operation(NamedTuple):
    """One call, as its caller saw it.

    Attributes:
        session: who called; one call of a session ends before the next begins.
        writes: whether it has written, and ``seen`` is what came of it.
        begun, ended: when it was called, and answered.
        seen: what it showed.
        how: how it was answered, for the report.
    """

    session: str
    writes: bool
    begun: float
    ended: float
    seen: Seen
    how: str = ""


def check(history: Iterable[Operation]) -> list[str]:
    """What is wrong with *history*, in words; nothing if all of this holds.

    - A read shows what any write had written that was acknowledged before the read began.
    - It shows no less than any call, of whatever session, that had ended before it began; so no session ever sees a row
      go back.
    - It shows nothing that nobody had begun to write.
    - No two writes of a row have the same version.
    """
    calls = sorted(history, key=lambda call: call.begun)
    problems = _written_twice(calls)
    written: Seen = {}  # by writes that have ended
    shown: Seen = {}  # by any call that has ended
    begun = _begun_by_end(calls)
    by_session: dict[str, Seen] = {}
    under_way: list[tuple[float, int]] = []
    for number, call in enumerate(calls):
        while under_way and under_way[0][0] < call.begun:
            _, other = heapq.heappop(under_way)
            ended = calls[other]
            _raise_to(shown, ended.seen)
            if ended.writes:
                _raise_to(written, ended.seen)
            _raise_to(by_session.setdefault(ended.session, {}), ended.seen)
        heapq.heappush(under_way, (call.ended, number))
        for row, version in call.seen.items():
            what = f"{call.session} {'wrote' if call.writes else 'read'} {row} at version {version}"
            if version < written.get(row, 0):
                problems.append(f"{what} ({call.how}), but {written[row]} was acknowledged before it began")
            elif version < by_session.get(call.session, {}).get(row, 0):
                problems.append(f"{what} ({call.how}), but it had seen {by_session[call.session][row]} before")
            elif version < shown.get(row, 0):
                problems.append(f"{what} ({call.how}), but somebody had seen {shown[row]} before it began")
            if not call.writes and version > begun[number].get(row, 0):
                problems.append(f"{what} ({call.how}), which nobody had begun to write")
    return problems


def _written_twice(calls: Iterable[Operation]) -> list[str]:
    by_version: dict[tuple[str, int], str] = {}
    problems = []
    for call in calls:
        for row, version in call.seen.items() if call.writes else ():
            other = by_version.setdefault((row, version), call.session)
            if other is not call.session:
                problems.append(f"{call.session} and {other} both wrote {row} at version {version}")
    return problems


def _begun_by_end(calls: list[Operation]) -> dict[int, Seen]:
    """For each read: of the rows in it, the newest version that somebody had begun to write before it ended."""
    starts = [call for call in calls if call.writes]  # in order of begin
    newest: Seen = {}
    found: dict[int, Seen] = {}
    place = 0
    for number in sorted(range(len(calls)), key=lambda number: calls[number].ended):
        call = calls[number]
        while place < len(starts) and starts[place].begun <= call.ended:
            _raise_to(newest, starts[place].seen)
            place += 1
        if not call.writes:
            found[number] = {row: newest.get(row, 0) for row in call.seen}
    return found


def _raise_to(known: Seen, seen: Mapping[str, int]) -> None:
    for row, version in seen.items():
        if version > known.get(row, 0):
            known[row] = version
