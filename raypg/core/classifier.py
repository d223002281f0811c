"""Where a statement may run: a read that any server answers alike, or something for the primary.

A verdict rests on what PostgreSQL's parser says of the text (:mod:`raypg.core.mentions`) and on what the catalogue says
of all that it names (:mod:`raypg.core.facts`). What cannot be proven is no read.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

from raypg.core.facts import Facts, judge
from raypg.core.mentions import Kind, Mentions, mentions

__all__ = ["Classification", "Classifier"]

_ENTRIES = 4096
_CHARACTERS = 4 * 1024 * 1024
_QUERY_TYPES = {"DDL": "ddl", "TRANSACTION": "transaction", "SESSION": "session", "UNKNOWN": "unknown"}


@dataclass(frozen=True, slots=True)
class Classification:
    """The verdict on a text.

    Attributes:
        kind: ``READ`` (proven: a replica may run it), ``WRITE``, ``DDL``, ``TRANSACTION``, ``SESSION`` (about one
            session or server), ``UNKNOWN``.
        reason: why it is no read; empty if it is.
        command: its first statement, in capitals.
        query_type: ``read_simple``, ``read_complex``, ``write_simple``, ``write_bulk``, ``ddl``, ``transaction``,
            ``session``, ``unknown``.
        complexity: 0 to 1; see :class:`Mentions`.
        reads: the tables behind what it reads, those of views included, as ``"schema"."name"``.
        writes: the tables that it names as targets.
        deterministic: of a read: the same answer as long as its tables and the session's settings are the same.
        statements: how many there are.
    """

    kind: Kind
    reason: str
    command: str
    query_type: str
    complexity: float
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    deterministic: bool = False
    statements: int = 1


class Classifier:
    """Verdicts by text, remembered: those used last, at most 4,096 and 4 million characters.

    Args:
        facts: of the database. Without them nothing that names a table or a function is a read.

    Not for several threads at a time.
    """

    def __init__(self, facts: Facts | None = None) -> None:
        self.facts = facts or Facts()
        self.counts: Counter[str] = Counter()
        """How many texts were asked for, by kind of the answer."""
        self._known: OrderedDict[str, Classification] = OrderedDict()
        self._learnt: set[str] = set()
        self._characters = 0

    def classify(self, sql: str) -> Classification:
        """The verdict on *sql*. Never raises on bad SQL.

        Raises:
            TypeError: it is not a string.
        """
        known = self._known.get(sql)
        if known is None:
            if not isinstance(sql, str):
                raise TypeError(f"SQL must be a str, not {type(sql).__name__}")
            known = self._remember(sql, self._judge(sql))
        self.counts[known.kind] += 1
        return known

    def update(self, facts: Facts) -> None:
        """The catalogue has changed: all verdicts are new, what was learnt too."""
        self.facts = facts
        self._forget()
        self._learnt.clear()

    def learn(self, sql: str, reason: str) -> None:
        """A replica refused *sql*: it is no read, until the catalogue changes."""
        self._learnt.add(sql)
        if len(self._learnt) > _ENTRIES:
            self._learnt.clear()
            self._learnt.add(sql)
        known = self._known.pop(sql, None)
        if known is not None:
            self._characters -= len(sql)
        self._remember(sql, self._judge(sql, reason))

    def _judge(self, sql: str, refusal: str = "a replica has refused it") -> Classification:
        text = mentions(str(sql))
        found = judge(text, self.facts)
        kind, reason = found.kind, found.reason
        if kind == "READ" and sql in self._learnt:
            kind, reason = "UNKNOWN", refusal
        is_read = kind == "READ"
        return Classification(
            kind,
            reason,
            text.command,
            _query_type(kind, text),
            text.complexity,
            _shown(found.bases),
            _shown(text.written),
            is_read and found.steady,
            text.statements,
        )

    def _remember(self, sql: str, verdict: Classification) -> Classification:
        if len(sql) > _CHARACTERS // 64:
            return verdict  # never parsed, so quick to judge
        self._known[sql] = verdict
        self._characters += len(sql)
        while len(self._known) > _ENTRIES or self._characters > _CHARACTERS:
            oldest, _ = self._known.popitem(last=False)
            self._characters -= len(oldest)
        return verdict

    def _forget(self) -> None:
        self._known.clear()
        self._characters = 0


def _query_type(kind: Kind, text: Mentions) -> str:
    if kind == "READ":
        return "read_simple" if text.complexity < 0.2 else "read_complex"
    if kind == "WRITE":
        return "write_bulk" if text.bulk else "write_simple"
    return _QUERY_TYPES[kind]


def _shown(names: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    return tuple(".".join('"' + part.replace('"', '""') + '"' for part in name if part) for name in names)
