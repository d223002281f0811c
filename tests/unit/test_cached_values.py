"""Keys of cached results: what is not the same to PostgreSQL has another; and values that callers may change."""

from __future__ import annotations

import datetime as dt
import enum
import uuid
from collections.abc import Hashable
from decimal import Decimal
from typing import Any

import pytest

from raypg.cached_values import kept, key_of, names_the_clock, size_of

PARIS = dt.timezone(dt.timedelta(hours=1))
NOON = dt.datetime(2026, 1, 1, 12, tzinfo=dt.UTC)


class Colour(enum.IntEnum):
    RED = 1


def key(*arguments: Any, query: str = "select $1", settings: Hashable = None) -> Hashable:
    return key_of(query, arguments, settings)


@pytest.mark.parametrize(
    "equal",
    [
        [1, 1.0, True, Decimal(1), Decimal("1.0"), Decimal("1.00"), "1", b"1"],
        [0, False, 0.0, -0.0, Decimal(0), Decimal("-0")],
        [NOON, NOON.astimezone(PARIS), NOON.replace(tzinfo=None)],
        [dt.date(2026, 1, 1), "2026-01-01"],
        [dt.time(12), dt.time(12, tzinfo=dt.UTC)],
        [[1, 2], [1.0, 2], [True, 2], (1, 2), [[1], 2], [1, 2, None], [2, 1], [1, "2"]],
        ["a", "A", "a ", None],
        [uuid.UUID(int=1), str(uuid.UUID(int=1)), uuid.UUID(int=1).hex],
    ],
)
def test_values_of_different_types_have_different_keys(equal: list[Any]) -> None:
    keys = [key(value) for value in equal]
    assert None not in keys
    assert len(set(keys)) == len(equal)
    assert keys == [key(value) for value in equal]


def test_a_value_that_is_not_equal_to_itself_has_one_key_all_the_same() -> None:
    assert key(float("nan")) == key(float("nan"))
    assert key(Decimal("NaN")) == key(Decimal("NaN"))


@pytest.mark.parametrize(
    "value", [Colour.RED, object(), bytearray(b"x"), {"a": 1}, [object()], type("s", (str,), {})()]
)
def test_what_may_be_equal_in_ways_of_its_own_has_none(value: Any) -> None:
    assert key(value) is None


def test_a_list_without_end_has_none() -> None:
    endless: list[Any] = []
    endless.append(endless)
    assert key(endless) is None


def test_text_settings_and_order_count() -> None:
    keys = [
        key(1, 2),
        key(2, 1),
        key(1, 2, query="select $2"),
        key(1, 2, settings=(("role", "a"),)),
        key(1, 2, settings=(("role", "b"),)),
        key(1),
    ]
    assert len(set(keys)) == len(keys)


def test_a_list_that_is_changed_later_does_not_change_its_key() -> None:
    values = [1, 2]
    before = key(values)
    values.append(3)
    assert before == key([1, 2]) != key(values)


def test_words_for_the_time_are_seen() -> None:
    for arguments in (["now"], [" TODAY "], [["x", "tomorrow"]], ["yesterday 12:00"]):
        assert names_the_clock(arguments), arguments
    for arguments in ([1, "2026-01-01", None, b"now", ["nowhere"]], []):
        assert not names_the_clock(arguments), arguments


def test_what_is_kept_is_not_what_its_owner_may_change() -> None:
    rows = [(1, [1, {"a": [2]}])]
    ours, changeable = kept(rows) or ([], False)
    assert changeable
    rows[0][1].append("changed")
    rows[0][1][1]["a"].append(3)
    assert ours == [(1, [1, {"a": [2]}])]
    plain = [(1, "a", None, 1.5, Decimal(1), NOON, uuid.UUID(int=1))]
    assert kept(plain) == (plain, False)
    assert kept([]) == kept(None) == ([], False)


def test_what_cannot_be_copied_is_not_kept() -> None:
    class Alone:
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("there is only one")

    assert kept([(Alone(),)]) is None


def test_sizes_grow_with_what_is_in_it() -> None:
    assert size_of("x" * 10_000) > 10_000
    assert size_of([("x" * 1_000,) for _ in range(10)]) > 10_000
    assert size_of({"k": ["x" * 10_000]}) > 10_000
    assert size_of(1) < 100
