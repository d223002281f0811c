"""Reads that a replica may answer: what a caller may ask of them, and what it is told afterwards."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

from raypg.core.nearest import did_you_mean
from raypg.core.seen import PRIMARY, Session, Token
from raypg.errors import ConfigError
from raypg.messages import Note, Settings, Where

if TYPE_CHECKING:
    from raypg.dispatch import Dispatcher

__all__ = ["FROM_PRIMARY", "After", "Reading", "Served", "Session", "Token", "read", "served", "token_of", "where_of"]

After: TypeAlias = "str | Token | Session | None"
"""What a read must show: a token, as text or not, or all that a session has seen."""

_SOURCES = ("primary", "replica")


class Served(NamedTuple):
    """Who answered a read.

    Attributes:
        target: whether it was a replica; a router's cache asks nobody.
        replica: its address; ``None`` for the primary.
        refused: a replica would not run it, because it writes or needs the primary; it ran on the primary.
        token: what has been seen now, for the next read of the same session.
    """

    target: Literal["primary", "replica", "cache"]
    replica: str | None
    refused: bool
    token: Token


def served(note: Note | None, sent: Token) -> Served:
    """What *note* says of a read that was sent with the token *sent*; without one it ran on the primary."""
    if note is None:
        return Served("primary", None, False, sent.having_seen(PRIMARY))
    replica, refused, token = note
    return Served("replica" if replica else "primary", replica or None, refused, Token(*token))


Reading: TypeAlias = "tuple[str, float | None, After]"
"""(read_from, max_staleness, after), as a caller gave them."""

FROM_PRIMARY: Final[Reading] = ("primary", None, None)


async def read(
    dispatcher: Dispatcher,
    mode: int,
    query: str,
    arguments: Any,
    timeout: float | None,
    settings: Settings,
    reading: Reading,
) -> tuple[Any, tuple[str, ...] | None]:
    """Run a read that a replica may answer; a session given as *after* learns what it has seen then.

    Raises:
        ConfigError: one of *reading* is wrong.
    """
    read_from, max_staleness, after = reading
    where = where_of(read_from, max_staleness, token_of(after))
    if where is None:
        return await dispatcher.run(mode, query, arguments, timeout, settings)
    begun = after.reads() if isinstance(after, Session) else None
    payload, names, who = await dispatcher.read(mode, query, arguments, timeout, settings, where)
    if begun is not None:
        assert isinstance(after, Session)
        after.saw(begun, who.token)
    return payload, names


def token_of(after: After) -> Token | None:
    """The token that *after* means.

    Raises:
        ConfigError: it is none.
    """
    if after is None or isinstance(after, Token):
        return after
    return after.token if isinstance(after, Session) else Token.parse(after)


def where_of(read_from: str, max_staleness: float | None, after: Token | None) -> Where | None:
    """What travels with a read.

    Args:
        read_from: ``"primary"`` or ``"replica"``.
        max_staleness: seconds that a replica's data may be older than the primary's; ``None`` = any.

    Raises:
        ConfigError: one of them is wrong.
    """
    if read_from not in _SOURCES:
        raise ConfigError(f"read_from={read_from!r}: must be 'primary' or 'replica'{_nearest(read_from)}")
    if max_staleness is not None:
        number = isinstance(max_staleness, int | float) and not isinstance(max_staleness, bool)
        if not number or math.isnan(max_staleness) or max_staleness < 0:
            raise ConfigError(f"max_staleness={max_staleness!r}: must be a number of seconds, 0 or more, or None")
    if read_from == "primary":
        return None
    return max_staleness, None if after is None else after.plain


def _nearest(word: Any) -> str:
    return did_you_mean(word, _SOURCES) if isinstance(word, str) else ""
