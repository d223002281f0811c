"""The texts that the lanes send in place of the user's: the same statement for many rows at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from raypg.core.sql_text import mask

__all__ = ["ORDINAL", "counting_form", "returning_form", "unnest_form"]

ORDINAL: Final = "raypg_ordinal"
"""The first column of what :func:`returning_form` returns."""

_VALUES: Final = re.compile(r"\bvalues\s*\(", re.IGNORECASE)
_PARAMETER: Final = re.compile(r"\$(\d+)")


def _body(text: str) -> str:
    """The statement without what follows it: semicolons and comments."""
    return text[: len(mask(text).rstrip(" \t\r\n\f\v;"))]


def counting_form(text: str) -> str:
    """A statement that answers with how many rows *text*, which returns none, has changed."""
    return f"WITH raypg_done AS ({_body(text)}\nRETURNING 1) SELECT pg_catalog.count(*) FROM raypg_done"


def returning_form(text: str, parameters: int) -> str:
    """A statement that returns the rows of *text*, which has RETURNING, each behind parameter ``$parameters + 1``."""
    return (
        f"WITH raypg_done AS ({_body(text)}\n) "
        f"SELECT ${parameters + 1}::pg_catalog.int8 AS {ORDINAL}, raypg_done.* FROM raypg_done"
    )


def unnest_form(text: str, types: Sequence[str]) -> str | None:
    """*text*, an INSERT of one row of VALUES, with arrays of *types* for its parameters; ``None`` if it is not
    understood."""
    code = mask(text)
    start = _VALUES.search(code)
    if start is None:
        return None
    depth = 1
    for position in range(start.end(), len(code)):
        depth += (code[position] == "(") - (code[position] == ")")
        if not depth:
            break
    else:
        return None
    if code[position + 1 :].strip(" \t\r\n\f\v;"):
        return None
    pieces: list[str] = []
    kept = start.end()
    for found in _PARAMETER.finditer(code, kept, position):
        pieces += (text[kept : found.start()], f"raypg_row.p{found[1]}")
        kept = found.end()
    pieces.append(text[kept:position])
    arrays = ", ".join(f"pg_catalog.unnest(${number}::{kind})" for number, kind in enumerate(types, 1))
    names = ", ".join(f"p{number}" for number in range(1, len(types) + 1))
    return f"{text[: start.start()]}SELECT {''.join(pieces)} FROM ROWS FROM ({arrays}) AS raypg_row({names})"
