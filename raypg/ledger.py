"""What there is to do with the ledger of written batches but writing it: to forget old batches."""

from __future__ import annotations

import datetime
import re
from typing import TYPE_CHECKING, Any

from raypg.errors import ConfigError

if TYPE_CHECKING:
    from raypg.pool import WorkflowConnectionPool

__all__ = ["parse_age", "prune"]

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def parse_age(text: str) -> datetime.timedelta:
    """A time such as ``36h``, ``30d`` or ``2w``.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"(\d+)([smhdw])", text.strip())
    if found is None:
        raise ConfigError(f"{text!r} is no age: give a number and one of s, m, h, d, w, for instance 30d")
    return datetime.timedelta(**{_UNITS[found[2]]: int(found[1])})


async def prune(
    pool: WorkflowConnectionPool,
    *,
    pipeline: str | None = None,
    older_than: datetime.timedelta | None = None,
    before: str | None = None,
) -> int:
    """Forget batches. Who writes one of them once more under its old id writes it twice.

    Args:
        pipeline: of this pipeline; of all, if not given.
        older_than: those that were committed so long ago.
        before: those that were committed before this batch id of *pipeline* (a watermark), or before its first part.

    Returns:
        How many were forgotten.

    Raises:
        ConfigError: neither or both of *older_than* and *before* are given, or *before* is not in the ledger.
        asyncpg.PostgresError: as of any statement; without a ledger nothing is forgotten.
    """
    if (older_than is None) == (before is None):
        raise ConfigError("say which batches to forget: either by age (older_than) or by watermark (before)")
    if not await pool.fetchval("SELECT to_regclass('raypg.batches') IS NOT NULL"):
        return 0
    mark: Any
    if older_than is not None:
        mark = await pool.fetchval("SELECT pg_catalog.clock_timestamp() - $1::interval", older_than)
    else:
        if pipeline is None:
            raise ConfigError("before=… is a batch of one pipeline: say which (pipeline)")
        mark = await pool.fetchval(
            "SELECT min(committed_at) FROM raypg.batches WHERE pipeline = $1 AND (batch_id = $2 OR "
            "starts_with(batch_id, $2 || '/'))",
            pipeline,
            before,
        )
        if mark is None:
            raise ConfigError(f"the ledger has no batch {before!r} of pipeline {pipeline!r}")
    tag = await pool.execute(
        "DELETE FROM raypg.batches WHERE committed_at < $1 AND ($2::text IS NULL OR pipeline = $2)", mark, pipeline
    )
    return int(tag.rpartition(" ")[2])
