"""Each row is in exactly one shard."""

from __future__ import annotations

import itertools
import re

from hypothesis import given
from hypothesis import strategies as st

from raypg.core.shards import (
    LEAST_BLOCK,
    LEAST_BYTES,
    RANGE_BYTES,
    SMALL_BYTES,
    blocks,
    integer_bounds,
    key_ranges,
    page_shards,
    parts,
    sensible,
)


def meets(value: int | None, condition: str) -> bool | None:
    """Whether *value* meets a condition of ours on whole numbers, as SQL would say."""
    if condition == "true":
        return True
    code = re.sub(r"'\((-?\d+),0\)'::pg_catalog\.tid|E'(-?\d+)'::int8", lambda found: found[1] or found[2], condition)
    if " OR k IS NULL" in code:
        code = code.removesuffix(" OR k IS NULL")
        if value is None:
            return True
    if value is None:
        return None
    name = "ctid" if "ctid" in code else "k"
    return bool(eval(code.replace(" AND ", " and "), {name: value}))


@given(st.integers(0, 5000), st.integers(1, 40), st.integers(1, 5))
def test_pages(pages: int, shards: int, ranges: int) -> None:
    divided = page_shards(pages, shards, ranges)
    assert len(divided) == max(1, min(pages, shards))
    conditions = [condition for shard in divided for condition in shard]
    assert len(conditions) <= max(1, pages)
    assert {len(shard) for shard in divided} == {max(1, min(ranges, pages // len(divided)))}
    for page in {0, 1, pages // 2, max(pages - 1, 0), pages, pages + 100}:  # it may have grown
        assert [meets(page, condition) for condition in conditions].count(True) == 1


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**20), st.integers(1, 30), st.data())
def test_whole_numbers(lowest: int, width: int, shards: int, data: st.DataObject) -> None:
    bounds = integer_bounds(lowest, lowest + width, shards)
    conditions = key_ranges("k", bounds, "int8")
    assert len(conditions) == min(shards, width + 1)
    for value in (None, lowest, lowest - 1, lowest + width + 1, lowest + data.draw(st.integers(0, width))):
        assert [meets(value, condition) for condition in conditions].count(True) == 1
    sizes = [abs(int(a) - int(b)) for a, b in itertools.pairwise(bounds)]
    assert not sizes or max(sizes) - min(sizes) <= 1


def test_repeated_bounds_and_none() -> None:
    assert key_ranges("k", [], "text") == ["true"]
    assert key_ranges("k", ["a", "a", "b'"], "text") == [
        "k < E'a'::text OR k IS NULL",
        "k >= E'a'::text AND k < E'b'''::text",
        "k >= E'b'''::text",
    ]


def test_shards_are_not_small() -> None:
    assert [sensible(wanted, None) for wanted in (0, 1, 8, 200)] == [1, 1, 8, 8]
    assert [sensible(200, size) for size in (0, LEAST_BYTES, 2 * LEAST_BYTES - 1, 20 * LEAST_BYTES)] == [1, 1, 1, 20]
    assert sensible(5, 20 * LEAST_BYTES) == 5


def test_ranges_are_neither_small_nor_large() -> None:
    assert [parts(size, 1) for size in (0, SMALL_BYTES - 1, SMALL_BYTES, 2 * RANGE_BYTES)] == [1, 1, 2, 2]
    assert parts(10 * RANGE_BYTES, 2) == 5
    assert parts(10 * SMALL_BYTES, 11) == 1


def test_blocks_are_as_many_as_processors_have_use_for() -> None:
    large = 1000 * LEAST_BYTES
    assert blocks(2, None, None) == 4, "nobody knows how much it is"
    assert blocks(0, None, None) == 2, "nodes may come"
    assert blocks(2, 0, 0) == blocks(2, LEAST_BLOCK - 1, LEAST_BLOCK) == 1
    assert blocks(2, 3 * LEAST_BLOCK, 4 * LEAST_BLOCK) == 3, "none is small"
    assert blocks(2, LEAST_BYTES, LEAST_BYTES) == 4
    assert blocks(2, large, large) == 1000, "one for each shard"
    assert blocks(2000, large, large) == 4000
    assert blocks(2, large, None) == 4, "a view"
