"""How a read is divided into shards: conditions that each row meets exactly one of."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from raypg.core.sql_text import quoted

__all__ = ["integer_bounds", "key_ranges", "page_ranges", "sensible"]

FEW = 8
"""As many shards are made as are wanted, however small they are: so that all processors of a node may take part."""

LEAST_BYTES = 32 * 1024 * 1024
"""Bytes of a table for which one more shard is worth while: each costs a task, a lease and a transaction, which take as
long as some megabytes."""


def sensible(wanted: int, size: int | None) -> int:
    """How many shards to make where *wanted* would do, of *size* bytes (``None``: nobody knows)."""
    return max(1, min(wanted, max(FEW, (size or 0) // LEAST_BYTES)))


def page_ranges(pages: int, shards: int) -> list[str]:
    """Conditions on ``ctid`` that divide a table of *pages* pages; the last has no upper end, since it may grow.

    PostgreSQL reads just those pages (since version 14).
    """
    count = max(1, min(shards, pages))
    edges = [pages * number // count for number in range(1, count)]
    bounds = [f"'({edge},0)'::pg_catalog.tid" for edge in edges]
    return _between("ctid", bounds, "")


def key_ranges(key: str, bounds: Sequence[str], kind: str) -> list[str]:
    """Conditions on the column *key*, as SQL names it: one below the first of *bounds*, one between each two, one from
    the last on. Rows without a key are in the first.

    Args:
        bounds: values as text, in ascending order; repeated ones count once.
        kind: their type, as SQL names it.
    """
    literals = [f"{quoted(bound)}::{kind}" for bound in dict.fromkeys(bounds)]
    return _between(key, literals, f" OR {key} IS NULL")


def integer_bounds(lowest: int, highest: int, shards: int) -> list[str]:
    """Where whole numbers from *lowest* to *highest* are to be divided for *shards* ranges of about the same width."""
    width = highest - lowest + 1
    bounds = (lowest + width * number // shards for number in range(1, shards))
    return list(dict.fromkeys(str(bound) for bound in bounds if bound > lowest))


def _between(column: str, bounds: Sequence[str], first: str) -> list[str]:
    if not bounds:
        return ["true"]
    inner = [f"{column} >= {low} AND {column} < {high}" for low, high in itertools.pairwise(bounds)]
    return [f"{column} < {bounds[0]}{first}", *inner, f"{column} >= {bounds[-1]}"]
