"""The SQLSTATE table: complete, and the decisions that are taken from it."""

from __future__ import annotations

import asyncpg
import pytest

from raypg.core.sqlstate import (
    CLASSES,
    CODES,
    bisection_kind,
    breaker_verdict,
    error_category,
    is_rerun_whole_group,
    is_row_error,
    is_transient,
    meaning,
    outcome,
    read_may_be_retried,
    stops_bisection,
)

ASYNCPG_CODES = sorted(
    {
        code
        for thing in vars(asyncpg.exceptions).values()
        if isinstance(thing, type) and isinstance(code := getattr(thing, "sqlstate", None), str)
    }
)


def test_every_code_that_asyncpg_knows_is_of_a_known_class() -> None:
    assert len(ASYNCPG_CODES) > 200
    assert [code for code in ASYNCPG_CODES if code[:2] not in CLASSES] == []


def test_the_table_is_of_classes() -> None:
    assert all(len(code) == 2 and code == code.upper() and entry.name for code, entry in CLASSES.items())
    assert all(len(code) == 5 and code[:2] in CLASSES for code in CODES)
    # Where an entry would say the same as its class there is none.
    assert [code for code, entry in CODES.items() if entry[1:] == CLASSES[code[:2]][1:]] == []


@pytest.mark.parametrize("code", ASYNCPG_CODES)
def test_each_code_has_one_meaning_for_a_group(code: str) -> None:
    """Row error, again, or stop: exactly one of them."""
    meanings = [is_row_error(code), is_rerun_whole_group(code), stops_bisection(code)]
    assert meanings.count(True) == 1
    kind = {0: "row", 1: "again", 2: "stop"}[meanings.index(True)]
    assert bisection_kind(code) == kind
    assert bisection_kind(code, severity="FATAL") == "stop"


@pytest.mark.parametrize(
    "code", ["22000", "22001", "22P02", "22012", "23502", "23503", "23505", "23514", "23P01", "21000", "P0001"]
)
def test_errors_of_a_row(code: str) -> None:
    assert bisection_kind(code) == "row"


@pytest.mark.parametrize("code", ["44000", "54000", "P0002", "P0004", "MY001", "ZZ999"])
def test_further_errors_of_a_row(code: str) -> None:
    """A view's check option, a value too long for its index, and whatever a trigger raises."""
    assert bisection_kind(code) == "row"


def test_row_level_security_is_told_from_a_missing_privilege_by_the_function_that_raised_it() -> None:
    assert bisection_kind("42501", server_function="ExecWithCheckOptions") == "row"
    assert bisection_kind("42501", server_function="aclcheck_error") == "stop"
    assert bisection_kind("42501") == "stop"


@pytest.mark.parametrize("code", ["40001", "40P01"])
def test_errors_that_ask_for_the_whole_group_again(code: str) -> None:
    assert bisection_kind(code) == "again"


@pytest.mark.parametrize(
    "code",
    [
        *("57014", "55P03", "53100", "53200", "53300", "08000", "08006", "08P01", "57P01", "25006", "42601"),
        *("42P01", "0A000", "XX000", "58030", "26000", "25P03", "40002", None, ""),
    ],
)
def test_errors_that_stop_a_search(code: str | None) -> None:
    assert bisection_kind(code) == "stop"
    assert not is_row_error(code)


def test_a_value_that_asyncpg_cannot_encode_is_of_its_row() -> None:
    error = asyncpg.DataError("invalid input for query argument $1")
    assert bisection_kind(error.sqlstate, severity=None) == "row"


@pytest.mark.parametrize(
    ("code", "category"),
    [
        ("28P01", "authentication_failed"),
        ("28000", "authentication_failed"),
        ("42501", "authentication_failed"),
        ("53300", "pool_exhausted"),
        ("53200", "connection_refused"),
        ("57P03", "connection_refused"),
        ("57P01", "connection_refused"),
        ("08001", "connection_refused"),
        ("55000", "connection_refused"),
        ("XX000", "connection_refused"),
        (None, "connection_refused"),
        ("3D000", "query_error"),
        ("22023", "query_error"),
        ("42704", "query_error"),
    ],
)
def test_categories_of_a_failed_connect(code: str | None, category: str) -> None:
    assert error_category(code, connecting=True, timed_out=False) == category
    assert error_category(code, connecting=True, timed_out=True) == "connection_timeout"


@pytest.mark.parametrize(
    ("code", "category"),
    [
        ("57014", "query_timeout"),
        ("25P03", "query_timeout"),
        ("25P04", "query_timeout"),
        ("57P05", "query_timeout"),
        ("55P03", "query_error"),
        ("23505", "query_error"),
        ("42601", "query_error"),
        ("28000", "query_error"),
        ("53300", "query_error"),
        ("08006", "query_error"),
        (None, "query_error"),
    ],
)
def test_categories_of_a_failed_statement(code: str | None, category: str) -> None:
    assert error_category(code, connecting=False, timed_out=False) == category
    assert error_category(code, connecting=False, timed_out=True) == "query_timeout"


@pytest.mark.parametrize("code", ["57P01", "57P02", "08006", None])
def test_a_lost_connection_is_told_from_the_same_code_raised_by_user_sql(code: str | None) -> None:
    assert error_category(code, connecting=False, timed_out=False, connection_lost=True) == "connection_refused"


def test_a_cancelled_statement_is_no_timeout() -> None:
    assert error_category("57014", connecting=False, timed_out=False, cancelled=True) == "query_error"


def test_only_an_error_followed_by_readiness_is_known_to_have_done_nothing() -> None:
    known = {
        (severity, alive, ready, crash)
        for severity in ("ERROR", "FATAL", "PANIC", None)
        for alive in (True, False)
        for ready in (True, False)
        for crash in (True, False)
        if outcome(severity, connection_alive=alive, ready_for_query=ready, crash=crash) == "not_applied"
    }
    assert known == {("ERROR", True, True, False)}


def test_what_was_never_sent_did_nothing() -> None:
    assert outcome(None, sent=False, connection_alive=False, ready_for_query=False) == "not_applied"


@pytest.mark.parametrize(
    ("code", "severity", "lost", "retry"),
    [
        ("57P01", "FATAL", True, True),  # an administrator ended the backend
        ("57P05", "FATAL", True, True),
        ("25P03", "FATAL", True, True),
        ("57P02", "FATAL", True, False),  # a backend crashed: perhaps of this very read
        ("57P02", "WARNING", True, False),
        (None, None, True, False),  # EOF without a word: the same
        ("08006", None, True, False),
        ("40001", "ERROR", False, True),  # a standby's recovery conflict
        ("40P01", "ERROR", False, True),
        ("57014", "ERROR", False, False),
        ("42P01", "ERROR", False, False),
        ("22012", "ERROR", False, False),
    ],
)
def test_which_reads_may_be_sent_again(code: str | None, severity: str | None, lost: bool, retry: bool) -> None:
    assert read_may_be_retried(code, severity=severity, connection_lost=lost) is retry
    assert read_may_be_retried(code, severity=severity, connection_lost=lost, sent=False) is True


# --- the breaker -----------------------------------------------------------------------------------------------------

TROUBLE = {"53100", "53200", "58030", "XX001", "XX002"}
ON_PURPOSE = {"25P03", "25P04", "57P05", "57014", "57P01"}


@pytest.mark.parametrize("code", ASYNCPG_CODES)
def test_what_each_code_is_to_the_breaker(code: str) -> None:
    alive = breaker_verdict(code, severity="ERROR", connection_alive=True)
    assert alive == ("trip" if code in TROUBLE else "ignore")
    assert breaker_verdict(code, severity="FATAL", connection_alive=False, connecting=True) == "trip"
    for severity in ("FATAL", "PANIC"):
        ended = breaker_verdict(code, severity=severity, connection_alive=False)
        assert ended == ("ignore" if code in ON_PURPOSE else "trip")
    assert meaning(code).name


def test_a_connection_that_ended_without_a_word_is_a_failure() -> None:
    assert breaker_verdict(None, severity=None, connection_alive=False) == "trip"
    assert breaker_verdict(None, severity=None, connection_alive=True) == "ignore"


@pytest.mark.parametrize("code", ["08000", "08006", "08P01", "26000", "53400", "57P02", "P0001", "ZZ999"])
def test_what_anybody_may_raise_says_nothing_of_the_server(code: str) -> None:
    """RAISE, dblink and foreign data wrappers bring codes of connections that are not ours."""
    assert breaker_verdict(code, severity="ERROR", connection_alive=True) == "ignore"


def test_what_may_succeed_by_itself_a_little_later() -> None:
    assert all(map(is_transient, ["40001", "40P01", "53100", "53300", "55P03", "57P01", "57P03", "08006", None]))
    assert not any(map(is_transient, ["22012", "23505", "25006", "28P01", "3D000", "42601", "57014", "57P02", "XX001"]))
