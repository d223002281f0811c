"""States and the patches between them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypg.core.merge_patch import apply, difference

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
STATES = st.dictionaries(st.sampled_from("abcd"), VALUES, max_size=4)


def without_nulls(value: Any) -> Any:
    """In a state, a key with ``null`` and no key are the same; in a list they are not."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return value


@given(STATES, STATES)
def test_a_patch_leads_from_one_state_to_the_other(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert without_nulls(apply(old, difference(old, new))) == without_nulls(new)


@given(STATES)
def test_no_change_is_an_empty_patch(state: dict[str, Any]) -> None:
    assert difference(state, state) == {}


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [  # the examples of appendix A of RFC 7386 whose target and patch are objects
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_patches_are_those_of_the_standard(target: dict[str, Any], patch: dict[str, Any], result: Any) -> None:
    assert apply(target, patch) == result


def test_only_what_has_changed_is_in_a_patch() -> None:
    old = {"pools": {"a": {"active": 1, "rows": [1, 2], "p95": 2.5}, "b": {"active": 0}}}
    new = {"pools": {"a": {"active": 2, "rows": [1, 2], "p95": None}}}
    assert difference(old, new) == {"pools": {"a": {"active": 2, "p95": None}, "b": None}}
