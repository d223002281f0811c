"""How statements are grouped: by the fingerprint of PostgreSQL's own parser, never by their text.

A text may hold secrets in its literals. None is kept here: what is shown is the text without literals and comments, and
of a text that the parser does not take, the kind of statement alone.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

import pgparse

from raypg.core.sql import LONGEST, classify, shorten, words
from raypg.core.sql_text import first_word

__all__ = ["Statement", "identify", "shown"]

_LONGEST_SHOWN: Final = 4 * 1024  # of longer ones shorten() gives the first word, which need not be a keyword
_NUMBER: Final = re.compile(r"(?<![\w$.\"])\d[\w.]*")
_LITERALS_GONE: Final = words("SELECT INSERT UPDATE DELETE MERGE")
_WORDS: Final = words("""
    ABORT ALTER ANALYZE BEGIN CALL CHECKPOINT CLOSE CLUSTER COMMENT COMMIT COPY CREATE DEALLOCATE DECLARE DELETE
    DISCARD DO DROP END EXECUTE EXPLAIN FETCH GRANT IMPORT INSERT LISTEN LOAD LOCK MERGE MOVE NOTIFY PREPARE REFRESH
    REINDEX RELEASE RESET REVOKE ROLLBACK SAVEPOINT SELECT SET SHOW START TABLE TRUNCATE UNLISTEN UPDATE VACUUM
    VALUES WITH
""")


class Statement(NamedTuple):
    """What a text is, for statistics.

    Attributes:
        fingerprint: the same for texts that differ in literals only, 16 hexadecimal digits; ``unparsed:`` and the
            command for all texts that cannot be parsed.
        command: SELECT, INSERT, CREATE TABLE …; OTHER for what begins with no word of SQL.
    """

    fingerprint: str
    command: str


def identify(sql: str) -> Statement:
    """Say what *sql* is: some 5 µs for one that was classified already."""
    if len(sql) <= LONGEST and (verdict := classify(sql)).kind != "invalid":
        try:
            return Statement(str(pgparse.fingerprint(str(sql))), verdict.command or "OTHER")
        except (pgparse.PGQueryError, UnicodeEncodeError):
            pass
    word = first_word(sql[:LONGEST])
    command = word if word in _WORDS else "OTHER"
    return Statement(f"unparsed:{command}", command)


def shown(sql: str, statement: Statement) -> str:
    """At most 200 characters of *sql*, without literals."""
    if statement.fingerprint.startswith("unparsed:") or len(sql) > _LONGEST_SHOWN:
        return f"{statement.command} …"
    text = shorten(sql)
    return text if statement.command in _LITERALS_GONE else _NUMBER.sub("…", text)
