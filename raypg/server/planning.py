"""The planner and the optimizer at work on one connection: they are given the facts that they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import asyncpg

from raypg.core import optimizer
from raypg.core.planner import Plan, plan
from raypg.core.shape import shape_of
from raypg.server.catalogue import ParameterType
from raypg.server.connection import ServerConnection

if TYPE_CHECKING:
    from raypg.server.engine import Engine

__all__ = ["explain", "order", "plan_for", "shape_of"]

MOST_TEXTS = 100
"""Most different texts in a message for which the optimizer looks into the catalogue."""


async def plan_for(
    engine: Engine,
    connection: ServerConnection,
    sql: str,
    count: int,
    *,
    in_transaction: bool,
    shared_now: bool,
) -> tuple[Plan, list[ParameterType] | None]:
    """The plan for *count* statements of one text, and the types of their parameters as far as it needs them.

    Raises:
        ConnectionLost, asyncpg.PostgresError: as :meth:`ServerConnection.run`.
    """
    now = engine.now()
    if engine.catalogue.refused(sql, now):
        return Plan("single", "the server would not take it otherwise"), None
    shape = shape_of(sql)
    if not shape.target or shape.doubt:
        return plan(shape, None, count, in_transaction=in_transaction, shared_now=shared_now), None
    facts = await engine.catalogue.facts(connection, shape.target, now)
    hiding = await engine.catalogue.hiding(connection, shape.reads, now) if facts is not None else []

    def planned(types: list[ParameterType] | None) -> Plan:
        return plan(
            shape,
            facts,
            count,
            types=types,
            hiding=hiding,
            in_transaction=in_transaction,
            shared_now=shared_now,
        )

    first = planned([])
    if first.lane != "unnest":
        return first, None
    types = await engine.catalogue.types(connection, sql, now)
    return planned(types), types


async def order(engine: Engine, connection: ServerConnection, texts: Sequence[str]) -> list[int]:
    """The order in which statements of these texts run.

    Raises:
        ConnectionLost: as :meth:`ServerConnection.run`.
    """
    as_it_is = list(range(len(texts)))
    shapes = {text: shape_of(text) for text in texts}
    if len(shapes) > MOST_TEXTS or not any(shape.command == "SELECT" and shape.pure for shape in shapes.values()):
        return as_it_is
    effects: dict[str, optimizer.Effect] = {}
    now = engine.now()
    try:
        for text, shape in shapes.items():
            if not shape.pure:
                effects[text] = optimizer.BARRIER
                continue
            target = await engine.catalogue.facts(connection, shape.target, now) if shape.target else None
            tables = shape.reads if shape.command == "SELECT" else ()
            read = [await engine.catalogue.facts(connection, table, now) for table in tables]
            effects[text] = optimizer.effect(shape, target, read)
    except (asyncpg.PostgresError, asyncpg.InterfaceError):
        return as_it_is
    return optimizer.order([effects[text] for text in texts])


async def explain(
    engine: Engine, connection: ServerConnection, runs: Sequence[tuple[str, int]], how: tuple[Any, ...]
) -> list[tuple[int, int, str, str]]:
    """How these runs (SQL, number of statements) would travel, in the order in which they would be executed: (first
    position, how many, lane, reason). Nothing is run."""
    strategy, most, optimize, shared_now = how
    firsts: list[int] = []
    total = 0
    for _, count in runs:
        firsts.append(total)
        total += count
    indexes = list(range(len(runs)))
    if optimize and strategy == "best_effort":
        indexes = await order(engine, connection, [sql for sql, _ in runs])
    found: list[tuple[int, int, str, str]] = []
    for index in indexes:
        sql, count = runs[index]
        if strategy in ("sequential", "parallel"):
            step = Plan("single", f"strategy {strategy}: each stands alone")
        else:
            inside = strategy == "transactional"
            size = count if inside else min(count, most)
            step, _ = await plan_for(engine, connection, sql, size, in_transaction=inside, shared_now=shared_now)
        found.append((firsts[index], count, step.lane, step.reason))
    return found
