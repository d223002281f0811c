"""The text form of arrays: what the server writes is read, and what is written the server reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from values import arrays, text

from raypg.core.array_text import parse, render


@pytest.mark.parametrize(
    ("literal", "items"),
    [
        ("{}", []),
        ('{""}', [""]),
        ('{a,"",b}', ["a", "", "b"]),
        ('{"",a}', ["", "a"]),
        ('{a,""}', ["a", ""]),
        ('{NULL,null,"NULL","null",Nulls}', [None, None, "NULL", "null", "Nulls"]),
        ('{{"",x},{y,NULL}}', [["", "x"], ["y", None]]),
        ('{{{a}},{{""}}}', [[["a"]], [[""]]]),
        ('{"a,b","{c}"," d ","\\"e\\"","\\\\f","g\n"}', ["a,b", "{c}", " d ", '"e"', "\\f", "g\n"]),
        ("[2:3]={a,b}", ["a", "b"]),
        ('[0:0][-1:0]={{a,""}}', [["a", ""]]),
        ("{ü\u2003\x85,\xa0}", ["ü\u2003\x85", "\xa0"]),
    ],
)
def test_what_the_server_writes(literal: str, items: list[Any]) -> None:
    assert parse(literal) == items


@pytest.mark.parametrize("literal", ["", "a", "{", "}", "{a", '{"a}', "{a}}", "{a}{b}", "{a}b", "[1:2]", "\0\0\0\1{a}"])
def test_what_is_no_array(literal: str) -> None:
    with pytest.raises(ValueError, match="malformed"):
        parse(literal)


@given(arrays(text))
def test_what_is_written_is_read(items: list[Any]) -> None:
    assert parse(render(items)) == items
    assert parse(render(items, delimiter=";"), delimiter=";") == items


def test_elements_pass_through_their_own_codec() -> None:
    items = [{"a": [1, None]}, None, "x", [1]]
    assert parse(render([items[:3]], json.dumps), json.loads) == [items[:3]]
    assert render([(1, 2)], str) == '{"(1, 2)"}'


@pytest.mark.parametrize(
    ("items", "error", "words"),
    [
        ("text", TypeError, "got type 'str'"),
        (5, TypeError, "got type 'int'"),
        ({"a": 1}, TypeError, "got type 'dict'"),
        (iter("a"), TypeError, "sized"),
        ([1], ValueError, "expected str, got int"),
        ([["a"], "b"], ValueError, "non-homogeneous"),
        (["a", ["b"]], ValueError, "non-homogeneous"),
        ([["a"], ["b", "c"]], ValueError, "non-homogeneous"),
        ([[[[[[["a"]]]]]]], ValueError, "dimensions"),
    ],
)
def test_what_cannot_be_written(items: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        render(items)
