"""Filters of Ray Data as conditions of PostgreSQL, where both mean exactly the same.

What is left over is done on the record batches, by pyarrow, as Ray Data itself would do it.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from typing import Any

from ray.data.expressions import BinaryExpr, ColumnExpr, Expr, LiteralExpr, Operation, UnaryExpr

from raypg.core.sql_text import quoted, quoted_name

_COMPARE = {
    Operation.GT: ">",
    Operation.LT: "<",
    Operation.GE: ">=",
    Operation.LE: "<=",
    Operation.EQ: "=",
    Operation.NE: "<>",
}
_TURNED = {
    Operation.GT: Operation.LT,
    Operation.LT: Operation.GT,
    Operation.GE: Operation.LE,
    Operation.LE: Operation.GE,
    Operation.EQ: Operation.EQ,
    Operation.NE: Operation.NE,
}
_INTEGERS = {20, 21, 23}
_FLOATS = {700, 701}
_TEXTS = {25, 1043}
_BOOLEAN, _DATE, _TIMESTAMP, _TIMESTAMPTZ = 16, 1082, 1114, 1184


class _NotTheSame(Exception):
    """PostgreSQL cannot do it, or would mean something else."""


def split(predicate: Expr | None, oids: Mapping[str, int]) -> tuple[list[str], list[Expr]]:
    """The parts of *predicate*, of which all must hold: as SQL, and those that cannot be.

    Args:
        oids: column → OID of its type.
    """
    conditions, rest = [], []
    parts = [] if predicate is None else [predicate]
    while parts:
        part = parts.pop()
        if isinstance(part, BinaryExpr) and part.op == Operation.AND:
            parts += [part.right, part.left]
            continue
        try:
            conditions.append(_condition(part, oids))
        except _NotTheSame:
            rest.append(part)
    return conditions, rest


def _condition(expression: Expr, oids: Mapping[str, int]) -> str:
    if isinstance(expression, UnaryExpr):
        if expression.op == Operation.NOT:
            return f"(NOT {_condition(expression.operand, oids)})"
        if isinstance(expression.operand, ColumnExpr) and expression.operand.name in oids:
            test = {Operation.IS_NULL: "IS NULL", Operation.IS_NOT_NULL: "IS NOT NULL"}.get(expression.op)
            if test is not None:
                return f"({quoted_name(expression.operand.name)} {test})"
    if isinstance(expression, ColumnExpr) and oids.get(expression.name) == _BOOLEAN:
        return quoted_name(expression.name)
    if isinstance(expression, BinaryExpr):
        if expression.op in (Operation.AND, Operation.OR):
            word = "AND" if expression.op == Operation.AND else "OR"
            return f"({_condition(expression.left, oids)} {word} {_condition(expression.right, oids)})"
        operation, left, right = expression.op, expression.left, expression.right
        if isinstance(left, LiteralExpr) and operation in _TURNED:
            operation, left, right = _TURNED[operation], right, left
        if isinstance(left, ColumnExpr) and isinstance(right, LiteralExpr):
            return _comparison(operation, left.name, right.value, oids)
    raise _NotTheSame


def _comparison(operation: Operation, name: str, value: Any, oids: Mapping[str, int]) -> str:
    oid, column = oids.get(name, 0), quoted_name(name)
    if operation == Operation.IN and isinstance(value, list | tuple) and value:
        return f"({column} IN ({', '.join(_literal(item, oid) for item in value)}))"
    if operation not in _COMPARE:
        raise _NotTheSame
    compared = f"{column} {_COMPARE[operation]} {_literal(value, oid)}"
    if oid in _FLOATS and operation in (Operation.GT, Operation.GE):
        # To PostgreSQL NaN is the greatest number, elsewhere it is above none.
        return f"({compared} AND {column} <> 'NaN')"
    if oid in _TEXTS and operation not in (Operation.EQ, Operation.NE):
        return f'({compared} COLLATE "C")'  # by their bytes, as Arrow does
    return f"({compared})"


def _literal(value: Any, oid: int) -> str:
    """*value* as SQL, for a column of type *oid*."""
    if isinstance(value, bool):
        if oid == _BOOLEAN:
            return "true" if value else "false"
    elif isinstance(value, int):
        if oid in _INTEGERS and abs(value) < 2**63:
            return f"({value})"
    elif isinstance(value, float):
        if oid in _FLOATS and not math.isnan(value):
            return f"'{value!r}'::pg_catalog.float8"
    elif isinstance(value, str):
        if oid in _TEXTS and "\0" not in value:
            return quoted(value)
    elif isinstance(value, datetime.datetime):
        if type(value) is datetime.datetime and oid == (_TIMESTAMP if value.tzinfo is None else _TIMESTAMPTZ):
            kind = "timestamp" if value.tzinfo is None else "timestamptz"
            return f"'{value.isoformat(' ')}'::pg_catalog.{kind}"
    elif type(value) is datetime.date and oid == _DATE:
        return f"'{value.isoformat()}'::pg_catalog.date"
    raise _NotTheSame
