"""The cache alone: bounds, order, tables, age, and what it counts."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypg.core.result_cache import LARGEST_SHARE, OVERHEAD, Entry, How, ResultCache

A, B = frozenset({"a"}), frozenset({"b"})
AB = A | B


def cache(most: int = 3, most_bytes: int = 1_000_000, ttl: float = 5.0, **more: Any) -> ResultCache[str]:
    return ResultCache(most, most_bytes, ttl, **more)


def use(kept: ResultCache[str], key: object, now: float = 0.0) -> str | None:
    entry = kept.find(key, now)
    if entry is None:
        kept.missed()
        return None
    kept.used(entry)
    return entry.value


def test_what_was_used_longest_ago_goes_first() -> None:
    kept = cache()
    for key in "xyz":
        kept.keep(key, key, A, 10, 0.0)
    assert use(kept, "x") == "x"
    kept.keep("new", "new", A, 10, 0.0)
    assert [use(kept, key) for key in ("x", "y", "z", "new")] == ["x", None, "z", "new"]
    assert (len(kept), kept.counts["evicted"]) == (3, 1)


def test_bytes_are_bounded_and_no_result_takes_too_large_a_part() -> None:
    kept = cache(100, 10 * (OVERHEAD + 100))
    for key in range(20):
        assert kept.keep(key, "", A, 100, 0.0)
    assert len(kept) == 10
    assert kept.bytes == 10 * (OVERHEAD + 100)
    most = kept.most_bytes // LARGEST_SHARE - OVERHEAD
    assert kept.keep("large", "", A, most, 0.0)
    assert not kept.keep("too large", "", A, most + 1, 0.0)
    assert kept.find("too large", 0.0) is None
    assert kept.bytes <= kept.most_bytes


def test_a_table_takes_along_all_that_came_from_it_and_nothing_else() -> None:
    kept = cache(10)
    for key, tables in (("a", A), ("b", B), ("ab", AB)):
        kept.keep(key, key, tables, 10, 0.0)
    assert kept.drop(["a", "of nobody"]) == 2
    assert [use(kept, key) for key in ("a", "b", "ab")] == [None, "b", None]
    assert kept.drop(A) == 0
    assert kept.drop(None) == 1
    assert (len(kept), kept.bytes, kept.counts["invalidated"]) == (0, 0, 3)


def test_what_comes_from_no_table_is_not_kept() -> None:
    kept = cache()
    assert not kept.keep("k", "v", frozenset(), 10, 0.0)
    assert len(kept) == 0


def test_a_result_ages_from_when_it_was_asked_for() -> None:
    kept = cache(ttl=5.0)
    kept.keep("k", "v", A, 10, 100.0)
    assert use(kept, "k", 104.9) == "v"
    assert use(kept, "k", 105.0) is None
    assert (len(kept), kept.counts["expired"]) == (0, 1)


def test_the_result_of_who_asked_last_stays() -> None:
    kept = cache()
    kept.keep("k", "second", A, 10, 2.0)
    assert not kept.keep("k", "first", A, 10, 1.0)
    assert use(kept, "k") == "second"
    assert kept.keep("k", "third", B, 10, 3.0)
    assert kept.drop(A) == 0
    assert use(kept, "k", 3.0) == "third"


def test_how_each_ends_is_told_once() -> None:
    told: list[tuple[Any, How, int]] = []

    def on_end(entry: Entry[str], how: How) -> None:
        told.append((entry.key, how, entry.uses))

    kept = cache(1, on_end=on_end)
    kept.keep("k", "v", A, 10, 0.0)
    use(kept, "k")
    kept.keep("l", "v", A, 10, 0.0)
    kept.keep("l", "w", A, 10, 1.0)
    kept.drop(A)
    kept.keep("m", "v", A, 10, 0.0)
    use(kept, "m", 9.0)
    assert told == [
        ("k", "evicted", 1),
        ("l", "replaced", 0),
        ("l", "invalidated", 0),
        ("m", "expired", 0),
    ]


def test_figures_are_measured_or_none() -> None:
    kept = cache()
    assert kept.statistics().items() >= {"hit_rate": None, "avg_usage_per_entry": None, "total_entries": 0}.items()
    kept.keep("k", "v", A, 10, 0.0)
    for key in ("k", "k", "k", "other"):
        use(kept, key)
    kept.drop(None)
    assert kept.statistics() == {
        "total_entries": 0, "total_usage": 3, "hit_rate": 0.75, "avg_usage_per_entry": 3.0, "cache_size_bytes": 0,
        "hits": 3, "misses": 1, "stored": 1, "refused": 0, "invalidations": 1, "evictions": 0, "expired": 0,
    }  # fmt: skip


def test_one_of_size_0_keeps_nothing() -> None:
    kept = cache(0)
    assert not kept.keep("k", "v", A, 10, 0.0)


TABLES = st.frozensets(st.sampled_from("abc"), min_size=1)
STEPS = st.one_of(
    st.tuples(st.just("keep"), st.integers(0, 7), TABLES, st.integers(0, 300)),
    st.tuples(st.just("use"), st.integers(0, 7)),
    st.tuples(st.just("drop"), st.one_of(st.none(), TABLES)),
    st.tuples(st.just("wait"), st.floats(0.0, 3.0)),
)


@given(st.lists(STEPS, max_size=60), st.integers(1, 5), st.integers(4 * (OVERHEAD + 300), 20_000))
def test_it_does_what_a_list_would(steps: list[tuple[Any, ...]], most: int, most_bytes: int) -> None:
    """A model that is slow and simple: a dict in order of use."""
    kept = cache(most, most_bytes, ttl=5.0)
    model: OrderedDict[int, tuple[str, frozenset[str], int, float]] = OrderedDict()
    now = 0.0
    for number, (step, *given_) in enumerate(steps):
        if step == "keep":
            key, tables, size = given_
            value = str(number)
            if kept.keep(key, value, tables, size, now):
                model.pop(key, None)
                model[key] = value, tables, size + OVERHEAD, now
            while len(model) > most or sum(size for _, _, size, _ in model.values()) > most_bytes:
                model.popitem(last=False)
        elif step == "use":
            (key,) = given_
            expected = model.get(key)
            if expected is not None and now - expected[3] >= 5.0:
                del model[key]
                expected = None
            assert use(kept, key, now) == (None if expected is None else expected[0])
            if expected is not None:
                model.move_to_end(key)
        elif step == "drop":
            (tables,) = given_
            gone = [key for key, (_, of, _, _) in model.items() if tables is None or tables & of]
            assert kept.drop(tables) == len(gone)
            for key in gone:
                del model[key]
        else:
            now += given_[0]
        assert len(kept) == len(model) <= most
        assert kept.bytes == sum(size for _, _, size, _ in model.values()) <= most_bytes


@pytest.mark.parametrize("entries", [1_000, 100_000])
def test_a_step_touches_one_entry_however_many_there_are(entries: int) -> None:
    """Counted, not timed: an entry of another table is looked at by nobody."""

    class Watched(frozenset[str]):
        looked_at = 0

        def __iter__(self) -> Any:
            Watched.looked_at += 1
            return super().__iter__()

    kept = cache(entries, 10**12)
    for key in range(entries):
        kept.keep(key, "", Watched({f"t{key}"}), 1, 0.0)
    Watched.looked_at = 0
    use(kept, 0)
    kept.drop(["t5"])
    kept.keep("new", "", A, 1, 0.0)  # in the place of that
    kept.keep("newer", "", A, 1, 0.0)  # in the place of the oldest
    assert Watched.looked_at == 2
