"""Find the bad rows of a group that fails as a whole, in few trips to the server.

An ``executemany`` is atomic, and its error does not say which row is to blame. So a failing group is halved:
good ranges commit, and each bad row is found alone with its own error. Rows are applied in the order they
were submitted.
"""

from __future__ import annotations

import math
from typing import Final, Literal, NamedTuple

__all__ = ["Bisection", "Failure", "RowStatus"]

Failure = Literal["row", "again", "stop"]
"""``row``: an error of a row. ``again``: serialization failure or deadlock. ``stop``: anything else."""

RowStatus = Literal["untried", "good", "bad", "stopped"]

_MOST_BAD: Final = 0.05  # part of the rows; above it one by one is cheaper (measured)
_TRIES: Final = 3  # of the same range after a serialization failure or deadlock


class _Range(NamedTuple):
    start: int
    end: int
    suspect: bool = False  # the range around it failed and its left half passed: do not try it as a whole
    alone: bool = False  # row by row
    tries: int = 0


class Bisection:
    """Plans the trips for ``rows`` rows; pure, knows nothing of SQL::

        plan = Bisection(len(rows))
        while (trip := plan.next()) is not None:
            try:
                await run(rows[slice(*trip)])  # as one unit
            except asyncpg.PostgresError as error:
                if plan.failed(bisection_kind(error.sqlstate)):
                    ...  # the error is final for these rows
            else:
                plan.passed()

    It goes on row by row, left to right, when more than 5 % of the rows (and more than one) turned out bad, or
    after 2 × log2(rows) failing trips with none between them that passed: halving would cost more than it saves.

    A range that fails with ``again`` is tried three times, then row by row; a single row three times, then it
    is bad.

    Attributes:
        trips: how many were asked for.
        one_by_one: whether halving was given up.
    """

    def __init__(self, rows: int) -> None:
        if rows < 1:
            raise ValueError(f"a group has at least 1 row, not {rows}")
        self.rows = rows
        self.trips = 0
        self.one_by_one = False
        self._statuses: list[RowStatus] = ["untried"] * rows
        self._todo = [_Range(0, rows)]  # from right to left: the next one is the last
        self._trip: _Range | None = None
        self._bad = 0
        self._failing_trips = 0
        self._most_failing_trips = 2 * math.log2(rows)

    @property
    def statuses(self) -> tuple[RowStatus, ...]:
        """Of each row: ``good`` (applied), ``bad`` (refused by an error of its own), ``stopped`` (in the
        range whose failure ended it all) or ``untried`` (never sent).
        """
        return tuple(self._statuses)

    def next(self) -> tuple[int, int] | None:
        """The next range to try, as (start, end), end exclusive; None when all is said.

        Raises:
            RuntimeError: the outcome of the last range was not told.
        """
        if self._trip is not None:
            raise RuntimeError(f"the outcome of the rows {self._trip.start} to {self._trip.end} was not told")
        if not self._todo:
            return None
        trip = self._todo.pop()
        while trip.end - trip.start > 1:
            if self.one_by_one or trip.alone:
                self._todo.append(_Range(trip.start + 1, trip.end, alone=trip.alone))
                trip = _Range(trip.start, trip.start + 1)
            elif trip.suspect:
                trip = self._split(trip)
            else:
                break
        self._trip = trip
        self.trips += 1
        return trip.start, trip.end

    def passed(self) -> tuple[int, int]:
        """The range was applied. Returns it."""
        trip = self._outcome()
        self._settle(trip, "good")
        self._failing_trips = 0
        return trip.start, trip.end

    def failed(self, kind: Failure) -> bool:
        """The range was not applied, none of its rows.

        Returns:
            Whether that is final for these rows: they have got their status, and this error is theirs.
        """
        trip = self._outcome()
        single = trip.end - trip.start == 1
        if kind == "stop":
            self._settle(trip, "stopped")
            self._todo.clear()
            return True
        if kind == "again":
            if trip.tries + 1 < _TRIES:
                self._todo.append(trip._replace(tries=trip.tries + 1))
                return False
            if not single:
                self._todo.append(_Range(trip.start, trip.end, alone=True))
                return False
        self._failing_trips += 1
        if self._todo:
            # The failure of what it follows may have been the only one.
            self._todo[-1] = self._todo[-1]._replace(suspect=False)
        if single:
            self._settle(trip, "bad")
            self._bad += 1
        else:
            self._todo.append(self._split(trip))
        if self._bad > max(1, _MOST_BAD * self.rows) or self._failing_trips > self._most_failing_trips:
            self.one_by_one = True
        return single

    def _outcome(self) -> _Range:
        trip, self._trip = self._trip, None
        if trip is None:
            raise RuntimeError("ask for a range before telling its outcome")
        return trip

    def _settle(self, trip: _Range, status: RowStatus) -> None:
        self._statuses[trip.start : trip.end] = [status] * (trip.end - trip.start)

    def _split(self, trip: _Range) -> _Range:
        """Queue the right half, return the left one."""
        middle = (trip.start + trip.end) // 2
        self._todo.append(_Range(middle, trip.end, suspect=True))
        return _Range(trip.start, middle)

    def __repr__(self) -> str:
        count = self._statuses.count
        return (
            f"<Bisection of {self.rows} rows: {count('good')} good, {count('bad')} bad, "
            f"{count('untried')} untried, {self.trips} trips>"
        )
