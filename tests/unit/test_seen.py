"""What a session has seen: tokens, and reads and writes that overlap."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypg.core.seen import NOTHING, PRIMARY, WROTE, Session, Token, end_of_record, parse_lsn
from raypg.errors import ConfigError

servers = st.sets(st.sampled_from([PRIMARY, "0.5a.1", "1.5b.1", "1.5b.2"])).map(lambda names: tuple(sorted(names)))
places = st.tuples(st.integers(1, 2), st.integers(1, 9)) | st.just((0, 0))
tokens = st.builds(lambda place, seen: Token(*place, seen), places, servers)


@given(tokens)
def test_a_token_survives_as_text(token: Token) -> None:
    assert Token.parse(str(token)) == token


@pytest.mark.parametrize("text", ["", "1/2", "x/y/", "1/2/ü", "1/2/a,", " 1/2/", "1/2/\n", None, 7, b"1/2/"])
def test_what_is_no_token_is_refused(text: object) -> None:
    with pytest.raises(ConfigError, match="no token"):
        Token.parse(text)  # type: ignore[arg-type]


@given(tokens, tokens, tokens)
def test_who_has_seen_more_is_shown_no_less(one: Token, other: Token, third: Token) -> None:
    both = one.joined(other)
    for server in ("0.5a.1", "1.5b.1", "1.5b.2"):
        for timeline in (1, 2):
            for lsn in range(11):
                if both.shown_by(server, timeline, lsn):
                    assert one.shown_by(server, timeline, lsn)
                    assert other.shown_by(server, timeline, lsn)
    assert one.joined(other) == other.joined(one)
    assert one.joined(one) == one
    assert set(both.joined(third).seen) >= set(third.seen)


def test_a_replica_must_have_come_far_enough() -> None:
    token = Token(1, 100)
    assert token.shown_by("0.5a.1", 1, 100)
    assert token.shown_by("0.5a.1", 0, 100)  # its timeline is not known
    assert not token.shown_by("0.5a.1", 1, 99)
    assert not token.shown_by("0.5a.1", 2, 100)


def test_what_was_seen_since_is_shown_where_it_was_seen_alone() -> None:
    token = Token(1, 100).having_seen("0.5a.1")
    assert token.shown_by("0.5a.1", 1, 100)
    assert not token.shown_by("1.5b.1", 1, 10**9)
    assert not token.having_seen("1.5b.1").shown_by("0.5a.1", 1, 10**9)
    assert not WROTE.shown_by("0.5a.1", 1, 10**9)
    assert NOTHING.shown_by("0.5a.1", 1, 0)


def test_places_on_two_timelines_are_for_the_primary_to_compare() -> None:
    assert Token(1, 100).joined(Token(2, 90)) == Token(2, 90, (PRIMARY,))


def test_a_read_settles_what_the_session_had_written_before_it() -> None:
    session = Session()
    session.wrote()
    begun = session.reads()
    assert begun[0] == WROTE
    session.saw(begun, Token(1, 100, ("0.5a.1",)))
    assert session.token == Token(1, 100, ("0.5a.1",))


def test_a_read_does_not_settle_what_was_written_while_it_ran() -> None:
    session = Session()
    session.wrote()
    begun = session.reads()
    session.wrote()  # leaves the token as it is
    session.saw(begun, Token(1, 100, ("0.5a.1",)))
    assert session.token == Token(1, 100, ("0.5a.1", PRIMARY))


def test_a_read_does_not_settle_what_another_one_saw_on_the_primary_meanwhile() -> None:
    session = Session()
    session.wrote()
    one, other = session.reads(), session.reads()
    session.saw(other, WROTE)
    session.saw(one, Token(1, 100, ("0.5a.1",)))
    assert PRIMARY in session.token.seen


def test_reads_on_two_replicas_at_a_time_are_both_remembered() -> None:
    session = Session()
    one, other = session.reads(), session.reads()
    session.saw(one, Token(seen=("0.5a.1",)))
    session.saw(other, Token(seen=("1.5b.1",)))
    assert session.token == Token(seen=("0.5a.1", "1.5b.1"))


def test_the_end_of_the_last_record_is_before_the_header_of_the_next_page() -> None:
    page = 8192
    assert end_of_record(5 * page + 24) == 5 * page
    assert end_of_record(5 * page + 40) == 5 * page
    assert end_of_record(5 * page + 48) == 5 * page + 48
    assert end_of_record(5 * page - 8) == 5 * page - 8


def test_places_in_the_log_are_read() -> None:
    assert parse_lsn("0/0") == 0
    assert parse_lsn("16/B374D848") == 0x16B374D848
