"""What the planner must know of a statement's text: what it writes, and whether others may share its transaction.

Like the verdicts of :mod:`raypg.core.sql` it is conservative: what is not proven is a doubt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import pgparse

from raypg.core import functions, sql
from raypg.core.sql import classify
from raypg.core.sql_text import quoted_name

__all__ = ["Shape", "default_is_clock", "quoted", "shape_of"]

_COMMANDS: Final = {"InsertStmt": "INSERT", "UpdateStmt": "UPDATE", "DeleteStmt": "DELETE"}
_TAGS: Final = sql.READ_TAGS | frozenset(
    ("InsertStmt", "UpdateStmt", "DeleteStmt", "OnConflictClause", "InferClause", "IndexElem", "MultiAssignRef")
)
# A table that an unreadable INSERT names: a text may be newer than the parser, but an INSERT writes one table.
_INSERT_INTO: Final = re.compile(r"\s*insert\s+into\s+((?:[a-z_][\w$]*\s*\.\s*)?[a-z_][\w$]*)(?=[\s(])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a text says of one statement.

    Attributes:
        command: ``INSERT``, ``UPDATE``, ``DELETE``, ``SELECT``; empty for anything else.
        target: the table it writes, as text for ``to_regclass``; empty if it writes none.
        columns: of an INSERT, the columns it names; ``None`` if it names none.
        given: of an INSERT, which of its values are not ``DEFAULT``: their positions.
        values: an INSERT of one row of VALUES.
        conflict: ``nothing``, ``update`` or empty: what it does ON CONFLICT.
        returning: it has RETURNING.
        reads: other tables that it reads.
        doubt: why it may not share a transaction with others of its text; empty if it may.
        clock: it depends on when the transaction began.
        calls: it calls functions.
        defaults: it has ``DEFAULT`` for a value.
        pure: nothing in it is volatile, and nothing depends on the clock.
        parameters: the highest ``$n``.
    """

    command: str = ""
    target: str = ""
    columns: tuple[str, ...] | None = None
    given: tuple[int, ...] = ()
    values: bool = False
    conflict: str = ""
    returning: bool = False
    reads: tuple[str, ...] = ()
    doubt: str = ""
    clock: bool = False
    calls: bool = False
    defaults: bool = False
    pure: bool = False
    parameters: int = 0


@lru_cache(maxsize=1024)
def shape_of(text: str) -> Shape:
    """The shape of a text; of one that cannot be parsed, what an INSERT names as its table. Never raises on bad SQL."""
    verdict = classify(text)
    if verdict.kind == "invalid":
        named = _INSERT_INTO.match(text) if verdict.statements <= 1 else None
        target = "" if named is None else ".".join(part.strip().lower() for part in named[1].split("."))
        return Shape("INSERT" if target else "", target, doubt="it cannot be read by raypg's parser", pure=bool(target))
    if verdict.statements != 1 or not sql.may_be_parsed(text) or verdict.kind not in ("read", "write"):
        return Shape(doubt=f"{verdict.command or 'it'} stands alone", parameters=verdict.parameters)
    ((tag, body),) = pgparse.parse(text)[0]["stmt"].items()
    if tag == "SelectStmt":
        return _of_select(body, verdict)
    if tag not in _COMMANDS:
        return Shape(doubt=f"{verdict.command} stands alone", parameters=verdict.parameters)
    return _of_write(tag, body, verdict.parameters)


def quoted(relation: dict[str, Any]) -> str:
    """A RangeVar as text for ``to_regclass``."""
    parts = [relation[key] for key in ("schemaname", "relname") if relation.get(key)]
    return quoted_name(*parts)


def default_is_clock(expression: str) -> bool:
    """Whether the default of a column merely depends on the clock; a function of the user may do anything."""
    try:
        tree = pgparse.parse(f"SELECT {expression}")
    except pgparse.PGQueryError:
        return False
    return not sql.inspect_tree(tree, _TAGS | {"RawStmt"}, functions.PURE)[0]


def _of_select(body: dict[str, Any], verdict: sql.Verdict) -> Shape:
    if not verdict.retryable:
        return Shape("SELECT", doubt=verdict.reason, parameters=verdict.parameters)
    doubt, _ = sql.inspect_tree(body, _TAGS, sql.GROUPABLE_FUNCTIONS, clock=False)
    return Shape("SELECT", reads=verdict.relations, pure=not doubt, parameters=verdict.parameters)


def _of_write(tag: str, body: dict[str, Any], parameters: int) -> Shape:
    doubt, _ = sql.inspect_tree(body, _TAGS, sql.GROUPABLE_FUNCTIONS, clock=False)
    clock = False
    if doubt and not sql.inspect_tree(body, _TAGS, functions.PURE)[0]:
        doubt, clock = "", True
    if "withClause" in body:
        doubt = doubt or "it has a WITH clause"
    select: dict[str, Any] = body.get("selectStmt", {}).get("SelectStmt", {})
    rows = select.get("valuesLists", ())
    values = len(rows) == 1 and select.keys() <= {"valuesLists", "limitOption", "op"}
    items = rows[0]["List"]["items"] if values else ()
    conflict = body.get("onConflictClause", {}).get("action", "")
    columns = tuple(column["ResTarget"]["name"] for column in body.get("cols", ())) if tag == "InsertStmt" else ()
    text = repr(body)
    return Shape(
        _COMMANDS[tag],
        quoted(body["relation"]),
        columns=columns or None,
        given=tuple(index for index, item in enumerate(items) if "SetToDefault" not in item),
        values=values,
        conflict={"ONCONFLICT_NOTHING": "nothing", "ONCONFLICT_UPDATE": "update"}.get(conflict, ""),
        returning="returningList" in body or "returningClause" in body,
        reads=sql.relations_in(body),
        doubt=doubt,
        clock=clock,
        calls="'FuncCall'" in text or "'SQLValueFunction'" in text,
        defaults="'SetToDefault'" in text,
        pure=not doubt and not clock,
        parameters=parameters,
    )
