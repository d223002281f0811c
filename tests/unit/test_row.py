"""Rows: as asyncpg's Record, and picklable."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypg import Row
from raypg import row as row_module
from raypg.row import row_type

ITEM = row_type(("id", "label", "amount"))


def item() -> Row:
    return ITEM((1, "x", None))


def test_by_position_and_by_name() -> None:
    row = item()
    assert (row[0], row[-2], row[1:], row[::-1]) == (1, "x", ("x", None), (None, "x", 1))
    assert (row["id"], row["label"], row["amount"]) == (1, "x", None)
    assert row.get("label") == "x"
    assert row.get("nowhere") is None
    assert row.get("nowhere", 5) == 5
    with pytest.raises(KeyError, match="nowhere"):
        row["nowhere"]
    with pytest.raises(IndexError):
        row[3]


def test_as_a_mapping_and_as_a_sequence() -> None:
    row = item()
    assert list(row) == list(row.values()) == [1, "x", None]
    assert list(row.keys()) == ["id", "label", "amount"]
    assert list(row.items()) == [("id", 1), ("label", "x"), ("amount", None)]
    assert dict(row) == {"id": 1, "label": "x", "amount": None}
    assert {**row} == dict(row)
    number, label, _ = row
    assert (number, label, len(row)) == (1, "x", 3)
    assert "id" in row
    assert 1 not in row


def test_equal_to_a_tuple_and_hashable() -> None:
    assert item() == (1, "x", None) == item()
    assert hash(item()) == hash((1, "x", None))
    assert {item(): 5}[item()] == 5
    assert isinstance(item(), Row)


def test_of_equal_names_the_last_is_found() -> None:
    row = row_type(("a", "b", "a"))((1, 2, 3))
    assert row["a"] == 3
    assert list(row.items()) == [("a", 1), ("b", 2), ("a", 3)]


def test_repr() -> None:
    assert repr(item()) == "<Row id=1 label='x' amount=None>"
    assert repr(row_type(())(())) == "<Row>"


def test_it_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        item()["id"] = 5  # type: ignore[index]
    with pytest.raises(AttributeError):
        item().extra = 5  # type: ignore[attr-defined]


def test_many_rows_cost_little_more_than_their_values() -> None:
    rows = [ITEM((number, "x", None)) for number in range(1000)]
    plain = [(number, "x", None) for number in range(1000)]
    assert len(pickle.dumps(rows, 5)) < len(pickle.dumps(plain, 5)) + 20 * 1000
    assert rows[0].__sizeof__() == plain[0].__sizeof__()


def test_one_class_for_a_shape_and_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert row_type(("id", "label", "amount")) is row_type(("id", "label", "amount"))
    monkeypatch.setattr(row_module, "_types", {})
    kept = row_type(("kept",))((1,))
    for number in range(3 * row_module._MOST_TYPES):
        row_type((f"column_{number}",))
    assert len(row_module._types) <= row_module._MOST_TYPES
    assert kept["kept"] == 1
    assert pickle.loads(pickle.dumps(kept)) == kept


@given(
    st.lists(st.tuples(st.text(), st.one_of(st.none(), st.integers(), st.text(), st.binary(), st.lists(st.integers()))))
)
def test_it_survives_pickle_and_copy(pairs: list[tuple[str, object]]) -> None:
    names = tuple(name for name, _ in pairs)
    row = row_type(names)(tuple(value for _, value in pairs))
    for protocol in (2, 5):
        back = pickle.loads(pickle.dumps(row, protocol))
        assert back == row
        assert list(back.items()) == list(row.items())
        assert type(back) is type(row)
    assert copy.deepcopy(row) == row
    assert dict(copy.copy(row)) == dict(row)
