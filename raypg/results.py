"""Results of a pipeline: one for each query, in order of submission, made only when looked at."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from raypg.portable import PortableError, unpack_error
from raypg.row import row_type

__all__ = ["PipelineResult", "PipelineResults"]


@dataclass(frozen=True, slots=True)
class PipelineResult:
    """The outcome of one query of a pipeline.

    Attributes:
        query_id: what ``add_query`` returned.
        success: whether it took effect.
        result: list of :class:`raypg.Row` for a query, the command tag (``INSERT 0 1``) for any other statement,
            ``None`` if it failed.
        error: the error that a call of its own would have raised, ``None`` if it succeeded.
        execution_time_ms: time on the server and on the wire; of a group, its time divided by its size.
        retry_count: how often it was sent again.
        callback_id: what ``add_query`` was given under that name, if anything.
    """

    query_id: str
    success: bool
    result: Any = None
    error: BaseException | None = None
    execution_time_ms: float = 0.0
    retry_count: int = 0
    callback_id: Any = None


class PipelineResults(Sequence[PipelineResult]):
    """The results of one flush. What a success without rows takes is a few bytes: results are made when looked at.

    Args:
        query_id: names the query of a number.
        first: number of the first query.
    """

    def __init__(self, query_id: Callable[[int], str], first: int = 0) -> None:
        self._query_id = query_id
        self.first = first
        # For each query: which entry of the table is its outcome, and how long it took. Entry 0: not known yet.
        self._codes = array("I")
        self._milliseconds = array("f")
        self._table: list[tuple[Any, PortableError | BaseException | None, int]] = [(None, None, 0)]
        self._tags: dict[tuple[str, int], int] = {}
        self.callbacks: dict[int, Any] = {}
        self.failures = 0

    def add(
        self,
        first: int,
        count: int,
        result: Any,
        error: PortableError | BaseException | None,
        milliseconds: float | Sequence[float],
        retries: int,
    ) -> None:
        """Note the outcome of queries *first* … *first + count − 1* (numbers of the pipeline), in any order."""
        begin = first - self.first
        end = begin + count
        missing = end - len(self._codes)
        if missing > 0:
            self._codes.frombytes(bytes(4 * missing))
            self._milliseconds.frombytes(bytes(4 * missing))
        code = self._code(result, error, retries)
        if count == 1:
            self._codes[begin] = code
        else:
            self._codes[begin:end] = array("I", (code,)) * count
        if isinstance(milliseconds, Sequence):
            self._milliseconds[begin:end] = array("f", milliseconds)
        else:
            self._milliseconds[begin:end] = array("f", (milliseconds,)) * count
        if error is not None:
            self.failures += count

    def _code(self, result: Any, error: PortableError | BaseException | None, retries: int) -> int:
        if error is None and type(result) is str:
            known = self._tags.get((result, retries))
            if known is not None:
                return known
            self._tags[result, retries] = len(self._table)
        self._table.append((result, error, retries))
        return len(self._table) - 1

    def is_known(self, number: int) -> bool:
        """Whether the outcome of query *number* is here."""
        index = number - self.first
        return 0 <= index < len(self._codes) and self._codes[index] != 0

    def fail_all(self, count: int, error: BaseException) -> int:
        """Let the successes among the first *count* queries fail with *error*; returns how many there were."""
        code = self._code(None, error, 0)
        changed = 0
        for index in range(min(count, len(self._codes))):
            known = self._codes[index]
            if known and self._table[known][1] is None:
                self._codes[index] = code
                changed += 1
        self.failures += changed
        return changed

    def split(self, count: int) -> tuple[PipelineResults, PipelineResults]:
        """The results of the first *count* queries, and those of the rest."""
        rest = PipelineResults(self._query_id, self.first + count)
        if count >= len(self._codes):
            rest.callbacks = {number: key for number, key in self.callbacks.items() if number >= rest.first}
            return self, rest
        done = PipelineResults(self._query_id, self.first)
        for part, where in ((done, slice(None, count)), (rest, slice(count, None))):
            part._codes = self._codes[where]
            part._milliseconds = self._milliseconds[where]
            part._table = list(self._table)
            part._tags = dict(self._tags)
            part.failures = sum(1 for code in part._codes if part._table[code][1] is not None)
            part.callbacks = {
                number: key for number, key in self.callbacks.items() if (number < rest.first) == (part is done)
            }
        return done, rest

    def __len__(self) -> int:
        return len(self._codes)

    def __iter__(self) -> Iterator[PipelineResult]:
        return map(self._make, range(len(self._codes)))

    @overload
    def __getitem__(self, index: int) -> PipelineResult: ...
    @overload
    def __getitem__(self, index: slice) -> list[PipelineResult]: ...
    def __getitem__(self, index: int | slice) -> PipelineResult | list[PipelineResult]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(len(self._codes)))]
        if index < 0:
            index += len(self._codes)
        if not 0 <= index < len(self._codes):
            raise IndexError("pipeline result index out of range")
        return self._make(index)

    def __repr__(self) -> str:
        return f"<PipelineResults {len(self)} results, {self.failures} failed>"

    def _make(self, index: int) -> PipelineResult:
        number = self.first + index
        result, error, retries = self._table[self._codes[index]]
        milliseconds = self._milliseconds[index]
        key = self.callbacks.get(number) if self.callbacks else None
        if error is not None:
            problem = error if isinstance(error, BaseException) else unpack_error(error)
            return PipelineResult(self._query_id(number), False, None, problem, milliseconds, retries, key)
        if isinstance(result, tuple):
            _, names, rows = result
            result = list(map(row_type(names), rows)) if rows else []
        return PipelineResult(self._query_id(number), True, result, None, milliseconds, retries, key)
