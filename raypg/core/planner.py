"""How the statements of a pipeline travel: which lane a run of one text takes, and why.

Lanes:

- ``single``: each statement is its own transaction. Several are written to the server at once, each with its own Sync.
- ``many``: a group is one transaction: PostgreSQL executes the statement once for each row (``executemany``); or, where
  counts or rows are wanted, wrapped so that they can be told apart.
- ``unnest``: a group is one statement, which takes arrays for its parameters.

A lane must give what the statements would give one by one; the conditions are those under which it does. Pure: texts
and facts of the catalogue in, lanes and reasons out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from raypg.core.shape import Shape

__all__ = ["MOST_CHANGES", "Lane", "Plan", "TableFacts", "plan", "unnest_types"]

Lane = Literal["single", "many", "unnest"]

UNNEST_FROM: Final = 8
"""Rows from which one statement with arrays is worth its own preparation."""

MOST_CHANGES: Final = 500
"""Most UPDATEs, DELETEs or INSERTs ON CONFLICT in a group: others wait for the rows that it has locked."""


class Plan(NamedTuple):
    """The lane of a run, the reason for it, and the most statements in one group."""

    lane: Lane
    reason: str
    most: int = 1_000_000


@dataclass(frozen=True, slots=True)
class TableFacts:
    """What the catalogue says of a table, its partitions and children included.

    Attributes:
        family: object ids of the table and of all that inherit from it or that it inherits from.
        kinds: its ``relkind``, and theirs.
        row_security, triggers, rules: whether any has row-level security, user triggers, rules.
        deferrable: whether a constraint of it, or a foreign key that points to it, is deferrable.
        self_reference: whether a foreign key of it points to itself.
        foreign_keys: whether it has foreign keys, or others point to it.
        actions: whether a foreign key that points to it does something to the rows there (CASCADE, SET NULL …).
        clocked: columns whose default depends on the clock.
        ticking: columns whose default is ``clock_timestamp()``.
        computed: columns whose default calls a function that is not known.
        columns: all its columns, in order.
        isolation: ``default_transaction_isolation``.
    """

    family: tuple[int, ...] = ()
    kinds: str = ""
    row_security: bool = False
    triggers: bool = False
    rules: bool = False
    deferrable: bool = False
    self_reference: bool = False
    foreign_keys: bool = False
    actions: bool = False
    clocked: tuple[str, ...] = ()
    ticking: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    isolation: str = "read committed"

    @property
    def is_table(self) -> bool:
        """Whether it is nothing but a table, partitioned perhaps."""
        return bool(self.kinds) and set(self.kinds) <= {"r", "p"}


def plan(
    shape: Shape,
    facts: TableFacts | None,
    count: int,
    *,
    types: Sequence[tuple[str, str, str]] | None = (),
    hiding: Collection[str] = (),
    in_transaction: bool = False,
    shared_now: bool = False,
) -> Plan:
    """The lane of *count* statements of one text that follow each other.

    Args:
        facts: of the table that it writes; ``None``: there is none of that name.
        types: of its parameters, as (schema, name, kind); ``None`` if they cannot be had.
        hiding: of the tables that it reads, those that are views, foreign, or have row-level security.
        in_transaction: all of it is one transaction anyway.
        shared_now: the caller does not mind if ``now()`` is the same for all of a group.
    """
    if count < 2:
        return Plan("single", "it is alone")
    reason = _why_alone(shape, facts, hiding, in_transaction, shared_now)
    if reason or facts is None:
        return Plan("single", reason)
    reason = _why_not_unnest(shape, facts, count, types)
    if not reason:
        return Plan("unnest", "rows of VALUES for a plain table")
    if shape.command == "INSERT" and not shape.conflict and shape.values:
        return Plan("many", reason)
    return Plan("many", reason, MOST_CHANGES)


def _why_alone(
    shape: Shape, facts: TableFacts | None, hiding: Collection[str], in_transaction: bool, shared_now: bool
) -> str:
    """Why its statements may not share a transaction; empty if they may."""
    if shape.command == "SELECT":
        return "a read gains nothing by sharing a transaction"
    if shape.doubt or shape.command not in ("INSERT", "UPDATE", "DELETE"):
        return shape.doubt or "only INSERT, UPDATE and DELETE share a transaction"
    if facts is None:
        return f"there is no table {shape.target}"
    if not facts.is_table:
        return f"{shape.target} is not a plain table (a view, a foreign table)"
    for stands, why in (
        (facts.row_security, "it has row-level security"),
        (facts.triggers, "it has triggers"),
        (facts.rules, "it has rules"),
    ):
        if stands:
            return f"{shape.target}: {why}"
    if hiding:
        return f"it reads {', '.join(sorted(hiding))}, which hides what it does"
    if shape.command != "INSERT" and facts.actions:
        return f"{shape.target}: foreign keys that point to it change other tables"
    if shape.returning and shape.command == "INSERT" and not shape.values:
        return "RETURNING of an INSERT that is not of one row"
    return "" if in_transaction else _why_not_together(shape, facts, shared_now)


def _why_not_together(shape: Shape, facts: TableFacts, shared_now: bool) -> str:
    """What would differ only because there is one transaction instead of many."""
    if facts.deferrable:
        return f"{shape.target}: a deferrable constraint is checked at the end of the transaction"
    if facts.isolation not in ("read committed", "read uncommitted"):
        return f"the default isolation is {facts.isolation}"
    if shape.clock and not shared_now:
        return "it depends on the clock, and now() is the same for a whole transaction (shared_now=True allows it)"
    clocked = _left_to_default(shape, facts, facts.clocked)
    if clocked and not shared_now:
        return f"{shape.target}: the default of {clocked} depends on the clock (shared_now=True allows it)"
    computed = _left_to_default(shape, facts, facts.computed)
    if computed:
        return f"{shape.target}: the default of {computed} calls a function that is not known"
    return ""


def _left_to_default(shape: Shape, facts: TableFacts, columns: Sequence[str]) -> str:
    """The first of *columns* that a statement leaves to its default; empty if it gives all."""
    if not columns:
        return ""
    if shape.command == "INSERT" and shape.values:
        order = shape.columns or facts.columns
        given = {order[index] for index in shape.given if index < len(order)}
        if shape.conflict == "update" and shape.defaults:
            given = set()  # SET x = DEFAULT
    elif shape.command == "INSERT":
        given = set(shape.columns or ())
    else:
        given = set() if shape.defaults else set(columns)
    return next((column for column in columns if column not in given), "")


def _why_not_unnest(shape: Shape, facts: TableFacts, count: int, types: Sequence[tuple[str, str, str]] | None) -> str:
    """Why a group may not be one statement with arrays; empty if it may."""
    if shape.command != "INSERT" or not shape.values:
        return f"{shape.command} that is not of one row of VALUES"
    if shape.conflict:
        return f"ON CONFLICT DO {shape.conflict.upper()}: each row has an outcome of its own"
    if shape.returning:
        return "RETURNING: whose row is whose could not be told"
    if facts.self_reference:
        return f"{shape.target}: a foreign key points to the table itself"
    if facts.deferrable:
        return f"{shape.target}: it has a deferrable constraint"
    if shape.calls or shape.reads or shape.clock:
        return "its values are not parameters and constants alone"
    if ticking := _left_to_default(shape, facts, facts.ticking):
        return f"{shape.target}: the default of {ticking} is clock_timestamp()"
    if shape.defaults:
        return "DEFAULT is not allowed in a SELECT"
    if not shape.parameters:
        return "it has no parameters"
    if shape.target.endswith('"values"') or "values" in (shape.columns or ()):
        return "something in it is called values"
    if types is None:
        return "the types of its parameters are not known"
    if count < UNNEST_FROM:
        return f"fewer than {UNNEST_FROM} rows"
    return "" if unnest_types(types) is not None else f"a parameter of type {_odd(types)}"


_SCALARS: Final = frozenset(
    """bool bytea int2 int4 int8 float4 float8 numeric money text varchar bpchar name uuid json jsonb date time timetz
    timestamp timestamptz interval inet cidr macaddr macaddr8 oid""".split()  # noqa: SIM905
)
_ODD_KINDS: Final = frozenset(("array", "composite", "range", "multirange"))


def _is_odd(kind: tuple[str, str, str]) -> bool:
    """Whether values of a type may look like arrays: asyncpg would take those for further dimensions."""
    schema, name, what = kind
    return what in _ODD_KINDS or (schema == "pg_catalog" and name not in _SCALARS) or name.startswith("_")


def _odd(types: Sequence[tuple[str, str, str]]) -> str:
    return next((name for schema, name, what in types if _is_odd((schema, name, what))), "?")


def unnest_types(types: Sequence[tuple[str, str, str]]) -> list[str] | None:
    """The types of the arrays, as SQL; ``None`` if one of them cannot be an element."""
    if any(map(_is_odd, types)):
        return None
    return [".".join('"' + part.replace('"', '""') + '"' for part in kind[:2]) + "[]" for kind in types]
