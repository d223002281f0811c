"""What a session has seen of the database, so that its next read shows no less: its own writes, and what it has read.

A token is a place in the write-ahead log, and beside it the servers that the session has seen something of *since*.
What that was is only found out if it matters: a next read on the same replica shows no less by itself, since the state
of one server only goes forward; for one elsewhere the server is asked how far it has come. So a chain of writes costs
one question in all, and a chain of reads on one replica none.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from raypg.errors import ConfigError

__all__ = ["NOTHING", "PRIMARY", "WROTE", "Session", "Token", "end_of_record", "parse_lsn"]

PRIMARY: Final = "primary"
"""The name of the primary among the servers seen; a replica is named by the life of its process."""

_TOKEN: Final = re.compile(r"([0-9A-F]{1,8})/([0-9A-F]{1,16})/((?:[0-9a-z:.-]+(?:,[0-9a-z:.-]+)*)?)")
_PAGE: Final = 8192
_PAGE_HEADERS: Final = (24, 40)  # xlog_internal.h: SizeOfXLogShortPHD, SizeOfXLogLongPHD


class Token(NamedTuple):
    """What a session has seen.

    Attributes:
        timeline: that ``lsn`` is of; 0 = none.
        lsn: end of what it has seen, as a number of bytes; 0 = nothing.
        seen: servers of which it has seen something after that, sorted.
    """

    timeline: int = 0
    lsn: int = 0
    seen: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.timeline:X}/{self.lsn:X}/{','.join(self.seen)}"

    @classmethod
    def parse(cls, text: str) -> Token:
        """The token that ``str`` made *text* of.

        Raises:
            ConfigError: it is none.
        """
        found = _TOKEN.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ConfigError(f"after={text!r}: no token; give what token() returned")
        timeline, lsn, seen = found.groups()
        return cls(int(timeline, 16), int(lsn, 16), tuple(sorted(seen.split(","))) if seen else ())

    @property
    def plain(self) -> tuple[int, int, tuple[str, ...]]:
        """The same for messages."""
        return self.timeline, self.lsn, self.seen

    def having_seen(self, *servers: str) -> Token:
        """The same after something was seen of *servers*."""
        if all(server in self.seen for server in servers):
            return self
        return self._replace(seen=tuple(sorted({*self.seen, *servers})))

    def joined(self, other: Token) -> Token:
        """What a session has seen that has seen both."""
        if other == self:
            return self
        seen = tuple(sorted({*self.seen, *other.seen}))
        if not self.lsn or not other.lsn or self.timeline == other.timeline:
            newer = max(self, other, key=lambda token: token.lsn)
            return Token(newer.timeline, newer.lsn, seen)
        # Places on two timelines cannot be compared: only the primary knows.
        newer = max(self, other, key=lambda token: token.timeline)
        return Token(newer.timeline, newer.lsn, seen).having_seen(PRIMARY)

    def shown_by(self, server: str, timeline: int, lsn: int) -> bool:
        """Whether a server that has come to *lsn* is known to show all of it.

        Args:
            server: the name of the server.
            timeline: that it follows; 0 if that is not known.
        """
        if self.lsn and (lsn < self.lsn or (timeline and timeline != self.timeline)):
            return False
        return not self.seen or self.seen == (server,)


NOTHING: Final = Token()
WROTE: Final = Token(seen=(PRIMARY,))
"""The token of a session that has just written, or read on the primary, and has not asked how far that is."""


def parse_lsn(text: str) -> int:
    """``16/B374D848`` as a number of bytes; the type ``pg_lsn`` of PostgreSQL as text."""
    high, _, low = text.partition("/")
    return (int(high, 16) << 32) + int(low, 16)


def end_of_record(position: int) -> int:
    """The end of the last record before *position*, where the next one is to begin.

    At the beginning of a page the next record begins after the page's header, but the last one ends before it: a
    standby that has replayed everything would seem to lack the header for as long as nothing more is written.
    """
    return position - position % _PAGE if position % _PAGE in _PAGE_HEADERS else position


class Session:
    """What one session has seen, while its reads and writes may overlap.

    Attributes:
        token: for its next read.
    """

    __slots__ = ("_marks", "token")

    def __init__(self, token: Token = NOTHING) -> None:
        self.token = token
        self._marks = 0

    def reads(self) -> tuple[Token, int]:
        """A read begins: the token to send with it, and what to hand to :meth:`saw` when it is answered."""
        return self.token, self._marks

    def saw(self, begun: tuple[Token, int], token: Token) -> None:
        """A read was answered with that token, which holds what it was sent with."""
        if begun == (self.token, self._marks):
            self.token = token
        else:
            self.token = self.token.joined(token)
        if PRIMARY in token.seen:
            self._marks += 1  # what others find out about the time before does not hold for this

    def wrote(self) -> None:
        """A write is over, with success or not, or its outcome is unknown."""
        self._marks += 1
        self.token = self.token.having_seen(PRIMARY)
