"""Reads before writes: in which order the statements of a batch run, where it cannot make a difference.

A read moves ahead of a write only if their tables are disjoint and nothing in either is volatile, so that each gives
what it would have given in its place. Reads keep their order among themselves, and writes theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from raypg.core.planner import TableFacts
from raypg.core.shape import Shape

__all__ = ["Effect", "effect", "order"]


class Effect(NamedTuple):
    """What a statement does, as far as others may pass it.

    Attributes:
        kind: ``read`` (may move ahead), ``write`` (may be passed), or ``barrier``.
        tables: object ids of the tables that it reads (a read) or writes (a write), their families included.
    """

    kind: str
    tables: frozenset[int] = frozenset()


BARRIER = Effect("barrier")


def effect(shape: Shape, target: TableFacts | None, read: Sequence[TableFacts | None]) -> Effect:
    """The effect of a statement.

    Args:
        target: facts of the table that it writes, if any.
        read: facts of the tables that it reads; only looked at for a SELECT.
    """
    if not shape.pure:
        return BARRIER
    if shape.command == "SELECT":
        tables: set[int] = set()
        for facts in read:
            if facts is None or not facts.is_table or facts.triggers or facts.rules:
                return BARRIER
            if facts.row_security or facts.foreign_keys:
                return BARRIER
            tables.update(facts.family)
        return Effect("read", frozenset(tables))
    if target is None or not target.is_table or target.triggers or target.rules or target.row_security:
        return BARRIER
    if target.actions or target.computed or target.deferrable:
        return BARRIER
    return Effect("write", frozenset(target.family))


def order(effects: Sequence[Effect]) -> list[int]:
    """The order in which statements of these effects run: a permutation of their indexes."""
    result: list[int] = []
    for index, new in enumerate(effects):
        place = len(result)
        if new.kind == "read":
            while place and _may_pass(new, effects[result[place - 1]]):
                place -= 1
        result.insert(place, index)
    return result


def _may_pass(read: Effect, other: Effect) -> bool:
    return other.kind == "write" and read.tables.isdisjoint(other.tables)
