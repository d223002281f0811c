"""Decisions of a write: how it is divided, what its batches are called, and which of its rows are bad."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

BATCH_ROWS = 65_536
"""Rows in a batch, if nobody says otherwise."""

TOO_MANY = 8
"""Bad rows after which it is no use to send all others once more for each."""

_LINE = re.compile(r"^COPY .*, line (\d+)", re.MULTILINE)


class BatchCounts(NamedTuple):
    """What became of the rows of one batch.

    Attributes:
        rows: written: inserted, or updated.
        duplicates: left out, because another row of the batch or of the table has their key.
        quarantined: bad, and stored in ``raypg.quarantine``.
        known: the ledger has this batch already, and nothing was written now; the others tell what was then.
    """

    rows: int
    duplicates: int = 0
    quarantined: int = 0
    known: bool = False


def part_id(batch_id: str, number: int) -> str:
    """The ledger's name of part *number* of the write *batch_id*."""
    return f"{batch_id}/{number}"


def is_conflict(stored: bytes | None, digest: bytes) -> bool:
    """Whether the ledger's row for a batch of this *digest* is of another one. A row without a hash is a marker of a
    transaction that was no write."""
    return stored != digest


def line_of(context: str | None) -> int | None:
    """Number of the row, from 0, that an error of COPY names in its context; ``None`` if it names none.

    PostgreSQL names it for what is wrong with a row itself (unique, check, not null, length), not for foreign keys.
    The table's own name may hold anything, so the last line that looks so counts.
    """
    found = _LINE.findall(context or "")
    return int(found[-1]) - 1 if found and int(found[-1]) > 0 else None


class BadRows:
    """The rows of a batch that turned out bad: number within the batch → (SQLSTATE, message)."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.found: dict[int, tuple[str, str]] = {}

    def add(self, row: int, sqlstate: str, message: str) -> None:
        """Row *row* is bad."""
        self.found.setdefault(row, (sqlstate, message))

    @property
    def good(self) -> int:
        """How many are left."""
        return self.rows - len(self.found)

    @property
    def are_many(self) -> bool:
        """Whether to look for the others in another way than one by one."""
        return len(self.found) >= TOO_MANY

    def original(self, position: int) -> int:
        """Number of the row that is at *position* when the bad ones are left out."""
        for row in sorted(self.found):
            if row > position:
                break
            position += 1
        return position


def at_most_rows(given: Any) -> int:
    """A checked ``batch_rows``; raises ``ValueError``."""
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError(f"batch_rows={given!r}: must be a whole number of rows, at least 1")
    return given
