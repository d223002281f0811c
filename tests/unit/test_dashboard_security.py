"""Who may use the dashboard, by what a request says of itself."""

from __future__ import annotations

import pytest

from raypg.access_token import is_token, session_of
from raypg.deployments.security import COOKIE, HEADERS, Asked, is_addressed_here, judge, token_of_page

TOKEN = "correct-horse-battery"
PORT = 8080


def ask(
    client: str = "127.0.0.1", host: str | None = "localhost:8080", path: str = "/api/pools", **headers: str
) -> int | None:
    """The status of the refusal; ``None`` if it may pass."""
    given = {name.replace("_", "-"): [value] for name, value in headers.items()}
    if host is not None:
        given["host"] = [host]
    refused = judge(Asked(client, PORT, "GET", path, "", given), TOKEN)
    return None if refused is None else refused.status


@pytest.mark.parametrize("host", ["localhost:8080", "LOCALHOST:8080", "127.0.0.1:8080", "127.9.9.9:8080", "[::1]:8080"])
@pytest.mark.parametrize("client", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_this_machine_needs_no_token(client: str, host: str) -> None:
    assert ask(client, host) is None


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:8080",
        "localhost.evil.example:8080",
        "localhost",
        "localhost:80800",
        "localhost:8081",
        "localhost:8080:8080",
        "localhost@evil.example:8080",
        "192.0.2.1:8080",
        "0.0.0.0:8080",
        "2130706433:8080",
        "",
    ],
)
def test_a_name_of_another_machine_that_leads_here_is_refused(host: str) -> None:
    """DNS rebinding: the browser takes it for the other site, and says so."""
    assert ask(host=host) == 421


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True), ("localhost:8000", True), ("127.0.0.1:1", True), ("[::1]:8000", True), ("[::1]", True),
        ("evil.example", False), ("localhost.evil.example:80", False), ("10.0.0.1", False), ("", False), (":80", False),
        ("127.0.0.1.nip.io", False), ("localhost:x", False), ("localhost:", False), ("[::1", False),
    ],
)  # fmt: skip
def test_names_of_this_machine_whatever_the_port(host: str, expected: bool) -> None:
    """What Serve's proxy hands on: the port is its own."""
    assert is_addressed_here(host) == expected


def test_a_request_has_one_host() -> None:
    assert ask(host=None) == 400
    twice = Asked("127.0.0.1", PORT, "GET", "/", "", {"host": ["localhost:8080", "localhost:8080"]})
    refused = judge(twice, TOKEN)
    assert refused is not None
    assert refused.status == 400


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "http://localhost:3000",
        "http://127.0.0.1:8080",
        "http://localhost",
        "file://",
        "",
        "HTTP://localhost:8080",
    ],
)
def test_another_site_may_do_nothing(origin: str) -> None:
    assert ask(origin=origin) == 403
    assert ask(origin=origin, authorization=f"Bearer {TOKEN}") == 403


def test_our_own_page_may() -> None:
    assert ask(origin="http://localhost:8080") is None
    # Behind a proxy that does the TLS.
    told = {"authorization": f"Bearer {TOKEN}", "x_forwarded_proto": "https"}
    assert ask(host="pools.example", origin="https://pools.example", **told) is None


@pytest.mark.parametrize("client", ["192.0.2.7", "10.0.0.1", "fe80::1%eth0", "2001:db8::1", "", "somewhere"])
def test_others_need_the_token(client: str) -> None:
    assert ask(client) == 401
    assert ask(client, path="/") == 401
    assert ask(client, authorization="Bearer wrong") == 401
    assert ask(client, authorization=f"Basic {TOKEN}") == 401
    assert ask(client, cookie=f"{COOKIE}={TOKEN}") == 401
    assert ask(client, host="10.0.0.5:8080", authorization=f"Bearer {TOKEN}") is None
    assert ask(client, host="10.0.0.5:8080", authorization=f"bearer {TOKEN}") is None
    assert ask(client, host="10.0.0.5:8080", cookie=f"other=1; {COOKIE}={session_of(TOKEN)}") is None
    assert ask(client, path="/healthz") is None


@pytest.mark.parametrize("name", ["x_forwarded_for", "forwarded", "via", "x_real_ip"])
def test_a_proxy_on_this_machine_speaks_for_others(name: str) -> None:
    assert ask(**{name: "192.0.2.7"}) == 401
    assert ask(**{name: "192.0.2.7"}, authorization=f"Bearer {TOKEN}") is None


def test_the_session_of_another_token_is_none() -> None:
    assert ask("10.0.0.1", cookie=f"{COOKIE}={session_of('another-token-of-old')}") == 401
    assert TOKEN not in session_of(TOKEN)
    assert is_token(TOKEN, TOKEN)
    assert not is_token("ä", TOKEN)


@pytest.mark.parametrize(
    ("path", "method", "query", "token"),
    [
        ("/", "GET", "token=abc", "abc"),
        ("/", "GET", "x=1&token=a%2Fb", "a/b"),
        ("/", "GET", "", None),
        ("/", "GET", "token=", None),
        ("/", "POST", "token=abc", None),
        ("/api/pools", "GET", "token=abc", None),
        ("/ws", "GET", "token=abc", None),
    ],
)
def test_the_token_is_taken_from_the_address_of_the_page_alone(
    path: str, method: str, query: str, token: str | None
) -> None:
    assert token_of_page(Asked("10.0.0.1", PORT, method, path, query, {})) == token


def test_no_page_of_ours_may_run_what_is_written_into_it() -> None:
    policy = dict(part.split(" ", 1) for part in HEADERS["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["base-uri"] == "'none'"
