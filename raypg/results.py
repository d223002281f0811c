"""Results of a pipeline: one for each query, in order of submission, made only when looked at."""

from __future__ import annotations

from bisect import bisect_right
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
    """

    query_id: str
    success: bool
    result: Any = None
    error: BaseException | None = None
    execution_time_ms: float = 0.0
    retry_count: int = 0


class PipelineResults(Sequence[PipelineResult]):
    """The results of one flush. Rows-less successes are kept as ranges: a million of them takes a few bytes."""

    def __init__(self, query_id: Callable[[int], str]) -> None:
        self._query_id = query_id
        self._starts: list[int] = []
        self._spans: list[tuple[int, int, Any, PortableError | BaseException | None, float, int]] = []
        self._length = 0
        self.failures = 0
        self.first = 0

    def add(
        self, first: int, count: int, result: Any, error: PortableError | BaseException | None, ms: float, retries: int
    ) -> None:
        """Note the outcome of queries *first* … *first + count − 1* (numbers of the pipeline), in any order."""
        self._spans.append((first, count, result, error, ms, retries))
        self._length += count
        if error is not None:
            self.failures += count

    def complete(self) -> None:
        """All outcomes are there: bring them in order of submission."""
        self._spans.sort(key=lambda span: span[0])
        self._starts = [span[0] for span in self._spans]
        self.first = self._starts[0] if self._starts else 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[PipelineResult]:
        for span in self._spans:
            for number in range(span[0], span[0] + span[1]):
                yield self._make(span, number)

    @overload
    def __getitem__(self, index: int) -> PipelineResult: ...
    @overload
    def __getitem__(self, index: slice) -> list[PipelineResult]: ...
    def __getitem__(self, index: int | slice) -> PipelineResult | list[PipelineResult]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        if index < 0:
            index += self._length
        if not 0 <= index < self._length:
            raise IndexError("pipeline result index out of range")
        number = self.first + index
        return self._make(self._spans[bisect_right(self._starts, number) - 1], number)

    def __repr__(self) -> str:
        return f"<PipelineResults {self._length} results, {self.failures} failed>"

    def _make(self, span: tuple[int, int, Any, Any, float, int], number: int) -> PipelineResult:
        _, _, result, error, ms, retries = span
        if error is not None:
            problem = error if isinstance(error, BaseException) else unpack_error(error)
            return PipelineResult(self._query_id(number), False, None, problem, ms, retries)
        if isinstance(result, tuple):
            _, names, rows = result
            result = list(map(row_type(names), rows)) if rows else []
        return PipelineResult(self._query_id(number), True, result, None, ms, retries)
