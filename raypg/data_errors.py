"""The errors of data that is written or read in bulk.

Import them from :mod:`raypg.errors`, which says what holds for all.
"""

from __future__ import annotations

from raypg.base_error import RaypgError

__all__ = [
    "ArrowValueError",
    "BatchConflictError",
    "DataLostError",
    "IncompatibleDataError",
    "LedgerError",
    "SnapshotLostError",
]


class ArrowValueError(RaypgError, ValueError):
    """A value of PostgreSQL has no equal in the Arrow type of its column: ``infinity`` in a timestamp, say.

    Args:
        column: its column.
        type_name: the column's type in PostgreSQL.
        arrow: its type in Arrow.
        value: what was found.
    """

    def __init__(self, column: str, type_name: str, arrow: str, value: str) -> None:
        super().__init__(column, type_name, arrow, value)
        self.column = column
        self.type_name = type_name
        self.arrow = arrow
        self.value = value

    def __str__(self) -> str:
        return (
            f"column {self.column!r} ({self.type_name}, in Arrow {self.arrow}) holds {self.value}, which Arrow cannot "
            f'express; change it in the query, e.g. by nullif(…), or read the column as text: "{self.column}"::text'
        )


class SnapshotLostError(RaypgError):
    """A part of a read came too late: the snapshot that all its parts share has ended (read again; give more time, or
    ``consistent=False``, if that is not enough), or a table that it shows was emptied, written anew or exchanged since
    (read again). ``args``: (message,).
    """


class IncompatibleDataError(RaypgError, TypeError):
    """Data that does not fit the table it is written to. Nothing of its batch was sent.

    Args:
        message: what does not fit, and what would.
        column: name of the column; empty if it is about the table.
        arrow_type: of the data.
        postgres_type: of the column.
    """

    def __init__(self, message: str, column: str = "", arrow_type: str = "", postgres_type: str = "") -> None:
        super().__init__(message, column, arrow_type, postgres_type)
        self.message = message
        self.column = column
        self.arrow_type = arrow_type
        self.postgres_type = postgres_type

    def __str__(self) -> str:
        return self.message


class BatchConflictError(RaypgError):
    """A batch of this id was written before, with other content. Nothing of it was written.

    The content is the values, the table, the mode and the key. The same write divided otherwise (another
    ``batch_rows``) is other content too.

    Args:
        pipeline: under whose name.
        batch_id: its id.
        into: the table.
    """

    def __init__(self, pipeline: str, batch_id: str, into: str = "") -> None:
        super().__init__(pipeline, batch_id, into)
        self.pipeline = pipeline
        self.batch_id = batch_id
        self.into = into

    def __str__(self) -> str:
        return (
            f"batch {self.batch_id!r} of pipeline {self.pipeline!r} was written before with other content (into "
            f"{self.into}): other rows, another table, mode or key, or the same rows divided or ordered otherwise (see "
            "preserve_order of Ray Data); give new data a new batch_id, or write_id"
        )


class LedgerError(RaypgError):
    """The ledger of written batches cannot be used, or another transaction that writes the batch does not end: the
    message says what to grant, or who it is. Nothing of the batch was written. ``args``: (message,)."""


class DataLostError(RaypgError):
    """Data that was to be written is gone: the process that owned the object, or its node, has died. Nothing of its
    batch was written. ``args``: (message,)."""
