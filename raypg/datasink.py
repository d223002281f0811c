"""Ray Data writes PostgreSQL through a pool: ``ds.write_datasink(PostgresDatasink("main_pool", table=…))``."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from ray.data import Datasink
from ray.data.block import BlockAccessor

from raypg import background
from raypg.core.write_state import BATCH_ROWS, at_most_rows, part_id
from raypg.errors import ConfigError
from raypg.ingest.writing import Order, WriteResult, write
from raypg.pool import WorkflowConnectionPool, get_pool

if TYPE_CHECKING:
    from ray.data._internal.execution.interfaces import TaskContext

__all__ = ["PostgresDatasink"]

PIPELINE = "ray_data"
"""Under whose name the ledger has the batches of datasets."""


class PostgresDatasink(Datasink):  # type: ignore[misc]
    """Writes a Dataset into a table, by COPY through the pool and within its cap.

    Each batch commits in a transaction of its own, together with its row in the ledger ``raypg.batches``: a task that
    Ray runs again writes only what is not there yet. So does the same write with the same *write_id*, as long as each
    write task has the same rows as before; where one has not, :class:`BatchConflictError` says so. They have if the
    dataset is read by tasks that write as well (Ray Data fuses ``Read->Map->Write``), or is materialised. Behind
    anything else (actors, a shuffle, another ``concurrency`` for the write) Ray Data numbers blocks as they are ready:
    set ``ds.context.execution_options.preserve_order = True``.

    Args:
        pool: a running pool, or its name.
        table: name of the table, as in SQL; may have a schema. Columns go by their names.
        mode, key, on_bad_rows: as for :meth:`raypg.QueryPipelineNode.write`.
        write_id: names this write in the ledger; a random one by default, so that another write of the same dataset
            writes it again. Without one, small blocks are put together for one task.
        batch_rows: rows in a batch, at most.

    Raises:
        ConfigError: a value is wrong.

    Attributes:
        result: of the last write, a :class:`raypg.ingest.writing.WriteResult`; ``None`` before its end.
    """

    def __init__(
        self,
        pool: WorkflowConnectionPool | str,
        table: str,
        *,
        mode: str = "append",
        key: str | Sequence[str] | None = None,
        write_id: str | None = None,
        on_bad_rows: str = "fail",
        batch_rows: int = BATCH_ROWS,
    ) -> None:
        try:
            at_most_rows(batch_rows)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.write_id = secrets.token_hex(8) if write_id is None else write_id
        self._min_rows = batch_rows if write_id is None else None
        self._pool = pool if isinstance(pool, WorkflowConnectionPool) else get_pool(pool)
        self._order = Order(table, mode, key, PIPELINE, self.write_id, on_bad_rows)
        self._batch_rows = batch_rows
        self.result: WriteResult | None = None

    def __repr__(self) -> str:
        return f"<PostgresDatasink into {self._order.into!r} of pool {self._pool.name!r}, write {self.write_id!r}>"

    # --- what Ray Data asks ---

    def get_name(self) -> str:
        """As Ray Data calls it where it says what was written; its bar of write tasks is called ``Write``."""
        return f"PostgreSQL {self._order.into}"

    @property
    def min_rows_per_write(self) -> int | None:
        """Small blocks are put together for one task: each batch is a transaction. Which ones depends on when they are
        ready, so not for a write that may be made again."""
        return self._min_rows

    def write(self, blocks: Iterable[Any], ctx: TaskContext) -> WriteResult:
        """Write the blocks of one task. The same task has the same number when Ray runs it again."""
        order = replace(self._order, batch_id=part_id(self.write_id, ctx.task_idx))
        return background.run(lambda: write(self._pool._dispatcher, _tables(blocks), order, self._batch_rows))

    def on_write_complete(self, write_result: Any) -> None:
        """Add up what the tasks have done."""
        self.result = _sum(write_result.write_returns)


def _tables(blocks: Iterable[Any]) -> Iterator[pa.Table]:
    for block in blocks:
        yield BlockAccessor.for_block(block).to_arrow()


def _sum(results: Iterable[WriteResult]) -> WriteResult:
    """All of them together; the seconds are those of the longest."""
    counts: Counter[str] = Counter()
    workers: Counter[int] = Counter()
    seconds = 0.0
    for result in results:
        for name in ("rows", "batches", "duplicates", "quarantined", "known_batches", "known_rows"):
            counts[name] += getattr(result, name)
        workers.update(result.workers)
        seconds = max(seconds, result.seconds)
    return WriteResult(**counts, seconds=seconds, workers=dict(sorted(workers.items())))
