"""What a pipeline has been given and not sent: runs of statements of one text, and messages made of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import chain
from sys import getsizeof
from typing import Any

from raypg.core.sql import Verdict, classify

__all__ = ["Buffer", "Message", "Run", "size_of_row"]

ROW_BYTES = 64
"""What a row takes beside its values."""


TAKEN = -1
"""Width of a run that is not in the buffer any more."""


def size_of_row(row: tuple[Any, ...]) -> int:
    """About the bytes that a row takes here and in a message; what is inside of lists is not looked at."""
    return sum(map(getsizeof, row), ROW_BYTES)


class Run:
    """Statements of one text that follow each other.

    Attributes:
        sql: the text.
        width: how many parameters it has; ``None`` if that cannot be told from it; ``TAKEN`` if none may join it.
        rows: one tuple of parameters for each.
        free: in which order they run makes no difference to their outcomes: plain INSERTs of one row.
    """

    __slots__ = ("free", "rows", "sql", "verdict", "width")

    def __init__(self, sql: str) -> None:
        self.sql = sql
        self.verdict: Verdict = classify(sql)
        known = self.verdict.kind in ("read", "write") and self.verdict.statements == 1
        self.width: int | None = self.verdict.parameters if known else None
        self.free = self.verdict.insert_values
        self.rows: list[tuple[Any, ...]] = []


class Message:
    """Statements that travel together.

    Attributes:
        numbers: of its queries, in order.
        runs: (SQL, their parameters).
        size: about how many bytes it takes.
        free: its statements may run before or after those of other messages.
    """

    __slots__ = ("free", "numbers", "retries", "runs", "size")

    def __init__(
        self, numbers: Sequence[int], runs: list[tuple[str, list[tuple[Any, ...]]]], size: int, free: bool
    ) -> None:
        self.numbers = numbers
        self.runs = runs
        self.size = size
        self.free = free
        self.retries = 0

    @property
    def is_reading(self) -> bool:
        """Whether all of it may run twice without harm."""
        return all(classify(sql).retryable for sql, _ in self.runs)

    def packed(self) -> list[tuple[str, int, list[list[Any]]]]:
        """The runs in columns: fewer objects to take apart and to put together. Rows of different widths, which only a
        text that is not understood can have, are runs of their own."""
        packed = []
        for sql, rows in self.runs:
            first = 0
            while first < len(rows):
                end = _same_width(rows, first)
                part = rows if end - first == len(rows) else rows[first:end]
                packed.append((sql, end - first, list(map(list, zip(*part, strict=True)))))
                first = end
        return packed

    def without(self, decided: set[int]) -> Message:
        """What is left when the queries of these positions have their outcome."""
        left: list[tuple[str, list[tuple[Any, ...]]]] = []
        numbers: list[int] = []
        position = 0
        for sql, rows in self.runs:
            part = [row for index, row in enumerate(rows, position) if index not in decided]
            numbers += (self.numbers[i] for i in range(position, position + len(rows)) if i not in decided)
            position += len(rows)
            if part:
                left.append((sql, part))
        rest = Message(numbers, left, self.size, self.free)
        rest.retries = self.retries
        return rest


def _same_width(rows: list[tuple[Any, ...]], first: int) -> int:
    width = len(rows[first])
    if len(set(map(len, rows))) == 1:
        return len(rows)
    end = first
    while end < len(rows) and len(rows[end]) == width:
        end += 1
    return end


class Buffer:
    """What waits to be sent, in order.

    Attributes:
        rows: how many statements.
        bytes: about what they take.
        first: number of the first of them.
        last: the run that the next statement joins if it has the same text.
    """

    __slots__ = ("bytes", "first", "last", "rows", "runs")

    def __init__(self) -> None:
        self.runs: deque[Run] = deque()
        self.last: Run | None = None
        self.rows = 0
        self.bytes = 0
        self.first = 0

    def begin_run(self, sql: str) -> Run:
        """A new run, which the next statements join."""
        if self.last is not None and not self.last.rows:
            self._forget(self.last)  # its first statement was refused
        self.last = run = Run(sql)
        self.runs.append(run)
        self.bytes += len(sql)
        return run

    def texts(self) -> list[tuple[str, int]]:
        """(SQL, how many) of what waits."""
        return [(run.sql, len(run.rows)) for run in self.runs if run.rows]

    def next_is_free(self, sql: str | None, least: int) -> bool:
        """Whether the next message may run in any order with others: statements of *sql*, or, if that is
        ``None``, at least *least* of a text."""
        while self.runs and not self.runs[0].rows:
            self._forget(self.runs[0])
        if not self.runs:
            return False
        run = self.runs[0]
        return run.free and (len(run.rows) >= least if sql is None else run.sql == sql)

    def _forget(self, run: Run) -> None:
        """*run* is not here any more, and no statement may join it."""
        self.runs.remove(run)
        run.width = TAKEN
        if run is self.last:
            self.last = None

    def take(self, most: int, most_bytes: int, alone: bool) -> Message:
        """The next message: at most *most* statements and about *most_bytes*, of one run if it is to be *alone*."""
        taken: list[tuple[str, list[tuple[Any, ...]]]] = []
        count = size = kept = 0
        while self.runs and count < most and size < most_bytes:
            run = self.runs[0]
            rows = run.rows
            if not rows:
                self._forget(run)
                continue
            if len(rows) <= most - count and self.bytes <= most_bytes:
                part, part_size = rows, 0  # all that is left fits: no need to look at each
            else:
                part = rows[: most - count]
                part_size = sum(map(getsizeof, chain.from_iterable(part)), ROW_BYTES * len(part)) + len(run.sql)
                if size and size + part_size > most_bytes:
                    break
                if part_size > most_bytes and len(part) > 1:
                    part = _fitting(part, most_bytes)
                    part_size = sum(map(size_of_row, part)) + len(run.sql)
            taken.append((run.sql, part))
            count += len(part)
            size += part_size
            if len(part) == len(rows):
                self._forget(run)  # what is added from now on must not change a message under way
            else:
                run.rows = rows[len(part) :]
                kept += len(run.sql)  # the text is in the message, and here for the rest
            if alone:
                break
        numbers = range(self.first, self.first + count)
        self.rows -= count
        if not self.rows:
            size, self.bytes = self.bytes, 0
        else:
            self.bytes = max(0, self.bytes - size + kept)
        self.first += count
        return Message(numbers, taken, size, alone)


def _fitting(rows: list[tuple[Any, ...]], most_bytes: int) -> list[tuple[Any, ...]]:
    size = 0
    for index, row in enumerate(rows):
        size += size_of_row(row)
        if size > most_bytes and index:
            return rows[:index]
    return rows
