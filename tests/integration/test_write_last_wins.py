"""`pipeline.write` with `ignore` and `upsert`: of equal keys in a batch the last wins, whatever else is in it."""

from __future__ import annotations

import asyncpg
import pyarrow as pa
import pytest
from pools import unique_name

from raypg import QueryPipelineNode, WorkflowConnectionPool


@pytest.fixture
def pipeline(pool: WorkflowConnectionPool) -> QueryPipelineNode:
    """A pipeline with a name of its own, so that its bad rows are."""
    return QueryPipelineNode(name=unique_name("load"), connection_pool=pool)


@pytest.mark.parametrize("mode", ["ignore", "upsert"])
async def test_of_equal_keys_in_a_batch_the_last_wins(
    pipeline: QueryPipelineNode, table: str, direct: asyncpg.Connection, mode: str
) -> None:
    data = pa.table({"id": [2, 1, 2, 1, 2], "amount": [1, 2, 3, 4, 5]})
    written = await pipeline.write(data, into=table, mode=mode, key=["id"])
    assert (written.rows, written.duplicates) == (2, 3)
    assert [tuple(row) for row in await direct.fetch(f"select id, amount from {table} order by id")] == [(1, 4), (2, 5)]


@pytest.mark.parametrize("mode", ["ignore", "upsert"])
@pytest.mark.parametrize("bad", [[3], [0, 3, 6], [6]])
async def test_with_bad_rows_the_last_of_equal_keys_wins_too(
    pipeline: QueryPipelineNode, table: str, direct: asyncpg.Connection, mode: str, bad: list[int]
) -> None:
    """Duplicates lie on either side of a bad row, and where a bad row is the last of its key the one before wins."""
    keys, amounts = [1, 2, 1, 9, 2, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]
    for row in bad:
        amounts[row] = -1
    data = pa.table({"id": keys, "amount": amounts})
    expected = {key: amount for key, amount in zip(keys, amounts, strict=True) if amount >= 0}
    written = await pipeline.write(data, into=table, mode=mode, on_bad_rows="quarantine", batch_id=f"{mode}{bad}")
    assert {row["id"]: row["amount"] for row in await direct.fetch(f"select id, amount from {table}")} == expected
    quarantined = await direct.fetch("select row from raypg.quarantine where pipeline = $1", pipeline.name)
    assert {row["row"] for row in quarantined} == set(bad)
    assert (written.rows, written.quarantined) == (len(expected), len(bad))
    assert written.duplicates == len(keys) - len(expected) - len(bad)


@pytest.mark.parametrize("on_bad_rows", ["fail", "quarantine"])
async def test_rows_that_only_go_one_after_the_other_count_once(
    pipeline: QueryPipelineNode, schema: str, direct: asyncpg.Connection, on_bad_rows: str
) -> None:
    """In the order of the key row 1 takes what row 2 has not given up yet; in the order of the data it does."""
    into = f"{schema}.places"
    await direct.execute(
        f"create table {into} (id int primary key, place int unique); insert into {into} values (1, 1), (2, 2)"
    )
    data = pa.table({"id": [2, 3, 2, 1], "place": [7, 4, 3, 2]})
    written = await pipeline.write(data, into=into, mode="upsert", on_bad_rows=on_bad_rows)
    assert (written.rows, written.duplicates, written.quarantined) == (3, 1, 0)
    stored = await direct.fetch(f"select id, place from {into} order by id")
    assert [tuple(row) for row in stored] == [(1, 2), (2, 3), (3, 4)]


async def test_ignore_without_a_key_keeps_the_last_with_bad_rows(
    pipeline: QueryPipelineNode, schema: str, direct: asyncpg.Connection
) -> None:
    into = f"{schema}.k"
    await direct.execute(f"create table {into} (a int unique, b int check (b > 0))")
    data = pa.table({"a": [1, 2, 1, 2], "b": [1, 2, 3, -1]})
    written = await pipeline.write(data, into=into, mode="ignore", on_bad_rows="quarantine")
    assert (written.rows, written.duplicates, written.quarantined) == (2, 1, 1)
    assert {tuple(row) for row in await direct.fetch(f"select a, b from {into}")} == {(1, 3), (2, 2)}
