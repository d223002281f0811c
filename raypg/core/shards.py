"""How a read is divided into shards: conditions that each row meets exactly one of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from raypg.core.sql_text import quoted

__all__ = ["blocks", "integer_bounds", "key_ranges", "page_shards", "parts", "sensible"]

FEW = 8
"""As many shards are made as are wanted where nobody knows how much there is: so that all processors of a node may take
part."""

LEAST_BYTES = 96 * 1024 * 1024
"""Bytes of a table for which one more shard is worth while. Each costs a task and a lease, and Ray Data (2.60) runs one
task at a time in the first second of a read."""

SMALL_BYTES = 16 * 1024 * 1024
"""Bytes of a shard that one connection reads as fast as two."""

RANGE_BYTES = 64 * 1024 * 1024
"""Bytes of the ranges of a larger one, at most: what a second connection may read ahead."""


LEAST_BLOCK = 1024 * 1024
"""Bytes of a block that is worth its while, as Ray Data has it (``DataContext.target_min_block_size``)."""


def blocks(processors: int, size: int | None, stored: int | None) -> int:
    """How many blocks to make of what is read: two for each of the cluster's processors, as is Ray Data's own rule, but
    no small ones; and one for each shard of a large table.

    Args:
        processors: of the cluster.
        size: bytes as Arrow (``None``: nobody knows).
        stored: bytes of the table.
    """
    enough = 2 * max(1, processors)
    if size is None:
        return enough
    return max(1, min(enough, size // LEAST_BLOCK), (stored or 0) // LEAST_BYTES)


def sensible(wanted: int, size: int | None) -> int:
    """How many shards to make where *wanted* would do, of *size* bytes (``None``: nobody knows)."""
    return max(1, min(wanted, FEW if size is None else size // LEAST_BYTES))


def parts(size: int, shards: int) -> int:
    """Into how many ranges to divide each of *shards* shards of a table of *size* bytes."""
    each = size / shards
    return 1 if each < SMALL_BYTES else max(2, math.ceil(each / RANGE_BYTES))


def page_shards(pages: int, shards: int, ranges: int) -> list[list[str]]:
    """Conditions on ``ctid`` that divide a table of *pages* pages into *shards*, and each of them into *ranges*; the
    last has no upper end, since it may grow.

    PostgreSQL reads just those pages (since version 14).
    """
    count = max(1, min(shards, pages))
    ranges = max(1, min(ranges, pages // count))
    edges = [pages * number // (count * ranges) for number in range(1, count * ranges)]
    bounds = [f"'({edge},0)'::pg_catalog.tid" for edge in edges]
    conditions = _between("ctid", bounds, "")
    return [conditions[begin : begin + ranges] for begin in range(0, len(conditions), ranges)]


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
