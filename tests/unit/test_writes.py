"""Leave to write: who waits for it waits no longer than its own time limit."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from raypg.core.coherence import EVERYTHING
from raypg.errors import QueryTimeoutError
from raypg.server.writes import Writes


async def test_a_statement_waits_no_longer_than_its_own_timeout() -> None:
    writes = Writes(SimpleNamespace(), "w")  # type: ignore[arg-type]
    writes.use(0)
    writes.watched, writes.intents.era, writes.intents.word = True, 1, time.monotonic()  # and nobody answers
    connection: Any = SimpleNamespace(held=None)
    began = time.monotonic()
    with pytest.raises(QueryTimeoutError, match=r"timeout of 0\.05 s"):
        await asyncio.wait_for(writes.begin(connection, ("insert into t values (1)",), 0.05), 2)
    assert time.monotonic() - began < 1
    assert set(writes.intents.report(time.monotonic()).intents.values()) == {EVERYTHING}
    connection.held.end()
    writes.use(0)
