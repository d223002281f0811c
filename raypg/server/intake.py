"""What comes into a worker's engine in batches: statements of many callers; and callers that leave too early."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from raypg.core.sql import classify_under
from raypg.messages import MANY, Run
from raypg.portable import pack_error
from raypg.server.replies import BatchState, Client
from raypg.server.routed import RoutedRead
from raypg.server.work import Statement, refuse

if TYPE_CHECKING:
    from raypg.server.engine import Engine


def submit(engine: Engine, client: Client, number: int, runs: Sequence[Run]) -> BatchState:
    """Take in a batch; the outcomes appear in the returned state as they come."""
    now = engine.now()
    total = sum(len(rows) for _, _, rows, *_ in runs)
    batch = BatchState(client, number, total)
    client.batches[number] = batch
    position = 0
    for mode, sql, rows, timeout, settings, where in runs:
        verdict = classify_under(sql, settings)
        refusal = engine.closed or engine.draining or refuse(verdict, sql)
        if timeout is None:
            timeout = engine.config.command_timeout
        deadline = now + (
            engine.config.acquire_timeout if timeout is None else min(timeout, engine.config.acquire_timeout)
        )
        expires_at = None if timeout is None else now + timeout
        replicas = None if where is None or mode == MANY else engine.replicas
        kind = Statement if replicas is None else RoutedRead
        reads: list[RoutedRead] = []
        for arguments in rows:
            if refusal is not None:
                batch.finish(position, None, None, pack_error(refusal))
            elif client.early and client.early.pop((number, position), False):
                batch.finish(position, None, None, pack_error(TimeoutError("cancelled before it ran")))
            else:
                statement = kind(batch, position, mode, sql, arguments, verdict, now, deadline, expires_at, settings)
                batch.statements[position] = statement
                if isinstance(statement, RoutedRead):
                    reads.append(statement)
                else:
                    engine.enqueue(client.job, statement, cost=len(arguments) / 8 if mode == MANY else 1.0)
            position += 1
        if replicas is not None and where is not None:
            replicas.take(reads, where)
    engine.pump()
    return batch


def cancel(engine: Engine, client: Client, number: int, position: int) -> None:
    """One caller left. What still waits is taken out; what runs, runs alone, and is cancelled on the server."""
    batch = client.batches.get(number)
    if batch is None:
        client.left_early(number, position)
        return
    statement = batch.statements.get(position)
    if statement is None:
        return
    statement.cancelled = True
    if statement.connection is not None:
        statement.connection.cancel("caller")
    elif statement.withdraw(engine):
        statement.fail(pack_error(TimeoutError("cancelled before it ran")))
