"""What can be said against a call before anything is sent. A bad call must not travel: others share its message."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import asyncpg

from raypg.errors import ConfigError, StatementNotAllowedError

_SETTING = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)*")


def check_statement(sql: object) -> None:
    """Refuse what the protocol cannot carry: the server or asyncpg would end the session over it.

    Raises:
        TypeError: it is no string.
        StatementNotAllowedError: it holds a NUL character or half a surrogate pair.
    """
    if not isinstance(sql, str):
        raise TypeError(f"the statement must be a str, not {type(sql).__name__}")
    if "\0" in sql:
        raise StatementNotAllowedError("the statement contains a NUL character, which PostgreSQL does not take")
    if not sql.isascii():
        try:
            sql.encode()
        except UnicodeEncodeError as error:
            raise StatementNotAllowedError(
                f"the statement is not valid Unicode: {error.reason} at character {error.start}"
            ) from None


def check_timeout(timeout: object) -> None:
    """As asyncpg's own check.

    Raises:
        ValueError: it is neither None nor a number of seconds.
    """
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout != timeout:
        raise ValueError(f"invalid timeout value: expected non-negative float (got {timeout!r})")


def rows_of(args: Iterable[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """The parameters of an ``executemany`` as tuples.

    Raises:
        asyncpg.DataError: one is no sequence; a dict would silently become its keys.
    """
    rows = []
    for number, row in enumerate(args):
        if not isinstance(row, Sequence):
            raise asyncpg.DataError(
                f"invalid input in executemany() argument sequence element #{number}: "
                f"expected a sequence, got {type(row).__name__}"
            )
        rows.append(tuple(row))
    return rows


def checked_settings(settings: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The settings of one call in a form that can be compared and sent.

    Raises:
        ConfigError: no mapping of names of PostgreSQL settings to strings.
    """
    if not isinstance(settings, Mapping):
        raise ConfigError(f"settings must be a dict of name to value, not {type(settings).__name__}")
    for name, value in settings.items():
        if not isinstance(name, str) or not _SETTING.fullmatch(name):
            raise ConfigError(f"settings: {name!r} is no name of a PostgreSQL setting")
        if not isinstance(value, str) or "\0" in value:
            raise ConfigError(f"settings: the value of {name!r} must be a string, as for SET")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ConfigError(f"settings: the value of {name!r} is not valid Unicode")
    return tuple(sorted((name.lower(), value) for name, value in settings.items()))
