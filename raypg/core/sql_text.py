"""A look at SQL text without a parser: for what the parser refuses, or must not be shown.

Good enough to count statements and to find the first word; it knows strings, quoted names, dollar quotes and
comments, and nothing of grammar. (So the semicolons inside a ``BEGIN ATOMIC … END`` body count.) Linear in the
length of the text, whatever it holds: about 0.1 s per megabyte of ordinary SQL.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

__all__ = ["PARAMETER", "blank", "first_word", "highest_parameter", "mask", "quoted", "quoted_name", "statement_count"]

_STOP: Final = re.compile(r"""[-/'"$]""")
_LINE: Final = re.compile(r"--[^\r\n]*")
_COMMENT_EDGE: Final = re.compile(r"/\*|\*/")
_STRING: Final = re.compile(r"'[^']*(?:'|\Z)")  # '' inside is the next string, which does no harm
_ESCAPE_STRING: Final = re.compile(r"'(?:[^'\\]|\\.|'')*+(?:'|\Z|\\\Z)", re.DOTALL)
_DOLLAR: Final = re.compile(r"\$(?:[^\W\d]\w*)?\$")
_QUOTED_NAME: Final = re.compile(r'"[^"]*(?:"|\Z)')
_WORD: Final = re.compile(r"[\s;(]*([A-Za-z]+)")
PARAMETER: Final = re.compile(r"(?<![\w$])\$(\d{1,5})(?!\d)")


def blank(sql: str, literal: str = "''") -> str:
    """The text with each comment replaced by a space, and each string by ``literal``."""
    pieces: list[str] = []
    kept = 0  # up to here the text is in pieces
    for start, end, mark in _hidden(sql):
        if mark != '"':
            pieces += (sql[kept:start], " " if mark in "-/" else literal)
            kept = end
    pieces.append(sql[kept:])
    return "".join(pieces)


def mask(sql: str) -> str:
    """The text with each comment made of spaces, and what is in strings and quoted names of ``x``: what is found in it
    stands at the same place in the text itself."""
    pieces: list[str] = []
    kept = 0
    for start, end, mark in _hidden(sql):
        pieces += (sql[kept:start], (" " if mark in "-/" else "x") * (end - start))
        kept = end
    pieces.append(sql[kept:])
    return "".join(pieces)


def _hidden(sql: str) -> Iterator[tuple[int, int, str]]:
    """What is no code: (start, end, mark) of each comment (``-``, ``/``), string (``'``, ``$``) and quoted name."""
    position = 0
    while stop := _STOP.search(sql, position):
        start, mark = stop.start(), stop[0]
        position = start + 1
        if mark == "'":
            escaped = sql[start - 1 : start] in ("e", "E") and not _is_word(sql[start - 2 : start - 1])
            found = (_ESCAPE_STRING if escaped else _STRING).match(sql, start)
            start -= escaped
        elif mark == '"':
            found = _QUOTED_NAME.match(sql, start)
        elif mark == "$":
            found = None if _is_word(sql[start - 1 : start]) else _DOLLAR.match(sql, start)
        elif mark == "-":
            found = _LINE.match(sql, start)
        else:
            found = _COMMENT_EDGE.match(sql, start)
        if not found:
            continue
        position = found.end()
        if mark == "$":
            end = sql.find(found[0], position)
            position = len(sql) if end < 0 else end + len(found[0])
        elif mark == "/":
            position = _end_of_comment(sql, position)
        yield start, position, mark


def _is_word(character: str) -> bool:
    return character.isalnum() or character in ("_", "$")


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
    # A keyword follows soon, unless comments come first: do not blank a megabyte to find it.
    found = _WORD.match(sql) or _WORD.match(blank(sql))
    return found[1].upper() if found else ""


def statement_count(sql: str) -> int:
    """Number of statements, by semicolons outside strings, names and comments."""
    return sum(1 for part in _code(sql).split(";") if part.strip())


def highest_parameter(sql: str) -> int:
    """The highest ``$n``; 0 without any."""
    if "$" not in sql:
        return 0
    return max((int(found[1]) for found in PARAMETER.finditer(_code(sql))), default=0)


def quoted(text: str) -> str:
    """*text* as a literal, whatever ``standard_conforming_strings`` says."""
    return "E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


def quoted_name(*parts: str) -> str:
    """A name as PostgreSQL writes it, whatever is in it."""
    return ".".join('"' + part.replace('"', '""') + '"' for part in parts)
