"""The query of a ``COPY (query) TO STDOUT``, from one with parameters, which COPY itself does not take."""

from __future__ import annotations

from collections.abc import Sequence

from raypg.core.sql import classify, shorten
from raypg.core.sql_text import PARAMETER, mask, quoted
from raypg.errors import StatementNotAllowedError

__all__ = ["check_query", "copy_query", "literal", "with_literals"]


def check_query(sql: str) -> None:
    """Refuse what COPY cannot run.

    Raises:
        StatementNotAllowedError: it is not one SELECT, VALUES, TABLE or WITH.
    """
    verdict = classify(sql)
    if verdict.kind == "invalid":
        return  # the server shall word the error, or know the newer syntax
    if verdict.statements != 1 or verdict.command not in ("SELECT", "VALUES", "TABLE", "WITH"):
        raise StatementNotAllowedError(
            f"only one SELECT, VALUES or TABLE can be read as Arrow, not [{shorten(sql)}]; for rows that another "
            "statement returns use fetch()"
        )


def copy_query(sql: str, casts: Sequence[str], key: int | None = None) -> str:
    """*sql* with its columns cast to *casts* (empty: as they are), and *key*, if given, in front of each row."""
    if key is None and not any(casts):
        return f"{without_semicolon(sql)}\n"  # as it is: the server copies whole rows as they lie on their pages
    names = [f"c{number}" for number in range(len(casts))]
    wanted = [f"q.{name}::pg_catalog.{cast}" if cast else f"q.{name}" for name, cast in zip(names, casts, strict=True)]
    if key is not None:
        wanted.insert(0, f"({key})::pg_catalog.int4")
    # The text ends with its line, or a comment at its end would hide what follows.
    return f"SELECT {', '.join(wanted)} FROM (\n{without_semicolon(sql)}\n) AS q({', '.join(names)})"


def without_semicolon(sql: str) -> str:
    """The text up to the semicolons at its end, if there are any."""
    code = mask(sql).rstrip()
    while code.endswith(";"):
        code = code[:-1].rstrip()
    return sql[: len(code)]


def with_literals(sql: str, literals: Sequence[str]) -> str:
    """The text with each ``$n`` replaced by its literal; not those in strings, names and comments."""
    pieces: list[str] = []
    kept = 0
    for found in PARAMETER.finditer(mask(sql)):
        pieces += (sql[kept : found.start()], literals[int(found[1]) - 1])
        kept = found.end()
    pieces.append(sql[kept:])
    return "".join(pieces)


def literal(text: str | None, kind: str) -> str:
    """*text*, or NULL, as a value of type *kind*."""
    return f"({'NULL' if text is None else quoted(text)}::{kind})"
