"""A look at SQL text without a parser: for what the parser refuses, or must not be shown.

Good enough to count statements and to find the first word; it knows strings, quoted names, dollar quotes and
comments, and nothing of grammar. (So the semicolons inside a ``BEGIN ATOMIC … END`` body count.)
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["blank", "first_word", "highest_parameter", "statement_count"]

# What starts a region whose content is not code. Prefixes of strings other than E'' (B, X, N, U&) change
# nothing here.
_OPENER: Final = re.compile(
    r"""
      (?P<line>    --[^\r\n]* )
    | (?P<comment> /\* )
    | (?P<escape>  (?<![\w$])[eE]'(?:[^'\\]|\\.|'')*+(?:'|\Z|\\\Z) )
    | (?P<string>  '[^']*(?:'|\Z) )
    | (?P<name>    "[^"]*(?:"|\Z) )
    | (?P<dollar>  (?<![\w$])\$(?P<tag>(?:[^\W\d]\w*)?)\$ )
    """,
    re.VERBOSE | re.DOTALL,
)
_COMMENT_EDGE: Final = re.compile(r"/\*|\*/")
_QUOTED_NAME: Final = re.compile(r'"[^"]*(?:"|\Z)')
_WORD: Final = re.compile(r"[\s;(]*([A-Za-z]+)")
_PARAMETER: Final = re.compile(r"(?<![\w$])\$(\d{1,5})(?!\d)")


def blank(sql: str, literal: str = "''") -> str:
    """The text with each comment replaced by a space, and each string by ``literal``."""
    pieces: list[str] = []
    position = 0
    while opener := _OPENER.search(sql, position):
        pieces.append(sql[position : opener.start()])
        position = opener.end()
        if opener["comment"]:
            position = _end_of_comment(sql, position)
            pieces.append(" ")
        elif opener["line"]:
            pieces.append(" ")
        elif opener["name"]:
            pieces.append(opener[0])
        else:
            if opener["dollar"]:
                end = sql.find(opener["dollar"], position)
                position = len(sql) if end < 0 else end + len(opener["dollar"])
            pieces.append(literal)
    pieces.append(sql[position:])
    return "".join(pieces)


def _end_of_comment(sql: str, position: int) -> int:
    depth = 1
    for edge in _COMMENT_EDGE.finditer(sql, position):
        depth += 1 if edge[0] == "/*" else -1
        if not depth:
            return edge.end()
    return len(sql)


def _code(sql: str) -> str:
    """The text without comments, and without what is in strings and quoted names."""
    return _QUOTED_NAME.sub("x", blank(sql))


def first_word(sql: str) -> str:
    """The first keyword, in capitals; empty if there is none."""
    # A keyword follows soon, unless long comments come first: do not blank a megabyte to find it.
    found = _WORD.match(sql) or _WORD.match(blank(sql))
    return found[1].upper() if found else ""


def statement_count(sql: str) -> int:
    """Number of statements, by semicolons outside strings, names and comments."""
    return sum(1 for part in _code(sql).split(";") if part.strip())


def highest_parameter(sql: str) -> int:
    """The highest ``$n``; 0 without any."""
    return max((int(found[1]) for found in _PARAMETER.finditer(_code(sql))), default=0)
