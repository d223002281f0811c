"""Reads move ahead of writes where that makes no difference, and only there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypg.core.optimizer import BARRIER, Effect, effect, order
from raypg.core.planner import TableFacts
from raypg.core.shape import shape_of

USERS, ORDERS, PRODUCTS, AUDIT = (TableFacts(family=(n,), kinds="r", columns=("a",)) for n in range(1, 5))


def read(*tables: int) -> Effect:
    return Effect("read", frozenset(tables))


def write(*tables: int) -> Effect:
    return Effect("write", frozenset(tables))


def test_the_guides_example() -> None:
    effects = [
        effect(shape_of("INSERT INTO audit_log VALUES (...)"), AUDIT, []),
        effect(shape_of("SELECT * FROM users WHERE active = true"), None, [USERS]),
        effect(shape_of("UPDATE products SET stock = stock - 1"), PRODUCTS, []),
        effect(shape_of("SELECT COUNT(*) FROM orders"), None, [ORDERS]),
    ]
    assert order(effects) == [1, 3, 0, 2]


@pytest.mark.parametrize(
    ("effects", "expected"),
    [
        ([], []),
        ([write(1), read(1)], [0, 1]),
        ([write(1), read(2)], [1, 0]),
        ([write(1), write(2), read(1)], [0, 2, 1]),
        ([write(1), BARRIER, read(2)], [0, 1, 2]),
        ([BARRIER, write(1), read(2)], [0, 2, 1]),
        ([write(1), read(2), write(2), read(3), read(1)], [1, 3, 0, 4, 2]),
        ([write(1), read()], [1, 0]),
    ],
)
def test_order(effects: list[Effect], expected: list[int]) -> None:
    assert order(effects) == expected


_effects = st.one_of(
    st.just(BARRIER),
    st.builds(Effect, st.sampled_from(["read", "write"]), st.frozensets(st.integers(1, 3), max_size=2)),
)


@given(st.lists(_effects, max_size=12))
def test_what_may_make_a_difference_keeps_its_order(effects: list[Effect]) -> None:
    result = order(effects)
    assert sorted(result) == list(range(len(effects)))
    place = {index: position for position, index in enumerate(result)}
    for first in range(len(effects)):
        for second in range(first + 1, len(effects)):
            a, b = effects[first], effects[second]
            moved = place[second] < place[first]
            if moved:
                assert (a.kind, b.kind) == ("write", "read")
                assert a.tables.isdisjoint(b.tables)


@pytest.mark.parametrize(
    "changes",
    [{"kinds": "v"}, {"kinds": "f"}, {"kinds": ""}, {"triggers": True}, {"rules": True}, {"foreign_keys": True},
     {"row_security": True}],
)  # fmt: skip
def test_reads_of_anything_but_a_plain_table_stay(changes: dict[str, Any]) -> None:
    shape = shape_of("select * from users")
    assert effect(shape, None, [USERS]).kind == "read"
    assert effect(shape, None, [replace(USERS, **changes)]) == BARRIER
    assert effect(shape, None, [None]) == BARRIER


@pytest.mark.parametrize(
    "changes",
    [{"kinds": "v"}, {"triggers": True}, {"rules": True}, {"actions": True}, {"computed": ("a",)}, {"deferrable": True},
     {"row_security": True}],
)  # fmt: skip
def test_writes_that_may_do_more_are_not_passed(changes: dict[str, Any]) -> None:
    shape = shape_of("update products set a = 1")
    assert effect(shape, PRODUCTS, []).kind == "write"
    assert effect(shape, replace(PRODUCTS, **changes), []) == BARRIER
    assert effect(shape, None, []) == BARRIER


@pytest.mark.parametrize(
    "sql",
    [
        "select now()",
        "select random() from users",
        "select nextval('s')",
        "select f() from users",
        "select * from users for update",
        "with x as (delete from users returning *) select * from x",
        "update products set a = f()",
        "delete from products where a > now()",
        "lock table users",
        "selekt",
    ],
)
def test_what_is_volatile_stays(sql: str) -> None:
    assert effect(shape_of(sql), PRODUCTS, [USERS]) == BARRIER
