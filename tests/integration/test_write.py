"""`pipeline.write`: Arrow data of every kind into tables, by COPY over the workers."""

from __future__ import annotations

import asyncio
import datetime
import decimal
import uuid
from typing import Any

import asyncpg
import numpy as np
import pyarrow as pa
import pytest
import ray
from pools import pipeline_of

from raypg import ConfigError, IncompatibleDataError, StatementNotAllowedError, WorkflowConnectionPool

ROWS = 5_000


def numbers(count: int = ROWS, first: int = 0) -> pa.Table:
    """*count* rows (id, label, amount)."""
    ids = np.arange(first, first + count)
    return pa.table({"id": ids, "label": [f"row {i}" for i in ids], "amount": ids % 100})


async def test_a_table_is_appended_in_batches(
    pool: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    written = await pipeline_of(pool).write(numbers(), into=table, batch_rows=1_000)
    assert (written.rows, written.batches, written.duplicates, written.quarantined) == (ROWS, 5, 0, 0)
    assert sum(written.workers.values()) == ROWS
    assert written.seconds > 0
    stored = await direct.fetch(f"select id, label, amount from {table} order by id")
    assert [tuple(row) for row in stored] == [(i, f"row {i}", i % 100) for i in range(ROWS)]
