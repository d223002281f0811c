"""What a process may keep of what it has read: taken back before a write to it is sent, whoever writes, and how."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from waiting import eventually

from raypg import WorkflowConnectionPool
from raypg.coherence import Coherence, coherence_of


def shown(table: str) -> frozenset[str]:
    """The table as verdicts name it."""
    return frozenset((".".join(f'"{part}"' for part in table.split(".")),))


@pytest.fixture
async def coherence(pool: WorkflowConnectionPool) -> AsyncIterator[Coherence]:
    found = coherence_of(await pool._dispatcher())
    await found.start()
    yield found
    await found.close()


async def test_a_write_takes_back_what_is_held_before_it_is_sent(
    pool: WorkflowConnectionPool, coherence: Coherence, table: str
) -> None:
    tables = shown(table)
    dropped: list[frozenset[str] | None] = []
    coherence.on_change(dropped.append)
    await eventually(lambda: coherence.may_keep(tables))
    mark = coherence.mark()
    assert coherence.unchanged(tables, mark)
    await pool.execute(f"insert into {table} values (1)")
    assert not coherence.unchanged(tables, mark)
    assert dropped
    await eventually(lambda: coherence.may_keep(tables))
    assert not coherence.unchanged(tables, mark)
