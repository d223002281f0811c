"""What is added comes out again: all of it, once, in order, in messages of bounded size."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from raypg.buffer import TAKEN, Buffer, Message, size_of_row

INSERT = "insert into t values ($1, $2)"


def add(buffer: Buffer, sql: str, row: tuple[Any, ...]) -> None:
    run = buffer.last
    if run is None or run.sql != sql:
        run = buffer.begin_run(sql)
    run.rows.append(row)
    buffer.rows += 1
    buffer.bytes += size_of_row(row)


def flat(messages: list[Message]) -> list[tuple[int, str, tuple[Any, ...]]]:
    found = []
    for message in messages:
        rows = [(sql, row) for sql, part in message.runs for row in part]
        assert len(rows) == len(message.numbers)
        found += [(number, *row) for number, row in zip(message.numbers, rows, strict=True)]
    return found


@given(
    st.lists(st.tuples(st.sampled_from(["a $1", "b $1", INSERT]), st.integers(0, 3000)), max_size=60),
    st.integers(1, 20),
    st.integers(200, 20_000),
    st.booleans(),
)
@example([(INSERT, 0), (INSERT, 0), ("a $1", 0), ("a $1", 0)], 2, 257, False)
def test_messages(added: list[tuple[str, int]], most: int, most_bytes: int, alone: bool) -> None:
    buffer = Buffer()
    messages = []
    expected = []
    for number, (sql, size) in enumerate(added):
        row = (number, "x" * size)
        add(buffer, sql, row)
        expected.append((number, sql, row))
        if number % 17 == 16:
            messages.append(buffer.take(most, most_bytes, alone))  # while others are still added
    while buffer.rows:
        messages.append(buffer.take(most, most_bytes, alone))
    assert flat(messages) == expected
    for message in messages:
        assert 0 < len(message.numbers) <= most
        assert len(message.runs) == 1 or not alone
        sizes = [size_of_row(row) for _, rows in message.runs for row in rows]
        assert len(sizes) == 1 or sum(sizes) <= most_bytes + sum(len(sql) for sql, _ in message.runs)
    assert (buffer.rows, buffer.bytes, buffer.first) == (0, 0, len(added))


def test_a_run_that_was_taken_is_joined_by_none() -> None:
    buffer = Buffer()
    add(buffer, INSERT, (1, 2))
    run = buffer.last
    assert run is not None
    message = buffer.take(10, 10_000, False)
    assert run.width == TAKEN
    assert buffer.last is None
    add(buffer, INSERT, (3, 4))
    assert buffer.last is not run
    assert flat([message]) == [(0, INSERT, (1, 2))]


def test_what_was_refused_leaves_nothing() -> None:
    buffer = Buffer()
    buffer.begin_run("select $1")
    buffer.begin_run(INSERT)
    assert not buffer.next_is_free(None, 1)
    assert buffer.texts() == []
    add(buffer, INSERT, (1, 2))
    assert buffer.next_is_free(None, 1)
    assert not buffer.next_is_free(None, 2)
    assert buffer.next_is_free(INSERT, 2)
    assert not buffer.next_is_free("insert into u values ($1)", 1)
    assert buffer.texts() == [(INSERT, 1)]


def test_columns() -> None:
    assert Message(range(2), [(INSERT, [(1, "a"), (2, "b")])], 0, False).packed() == [(INSERT, 2, [[1, 2], ["a", "b"]])]
    assert Message(range(2), [("select 1", [(), ()])], 0, False).packed() == [("select 1", 2, [])]
    odd = Message(range(4), [("?", [(1,), (2, 3), (4, 5), ()])], 0, False)
    assert odd.packed() == [("?", 1, [[1]]), ("?", 2, [[2, 4], [3, 5]]), ("?", 1, [])]


def test_what_is_left_of_a_message() -> None:
    message = Message(range(10, 15), [("a", [(0,), (1,)]), ("b", [(2,), (3,), (4,)])], 0, False)
    rest = message.without({0, 1, 3})
    assert (list(rest.numbers), rest.runs) == ([12, 14], [("b", [(2,), (4,)])])
