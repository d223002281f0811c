"""Who may use the dashboard: decided from what a request says, before anything else looks at it.

- From this machine no token is needed, but the request must be addressed to this machine: a page of another site whose
  name is made to point here (DNS rebinding) sends its own name.
- From anywhere else, and by way of a proxy, the cluster's token is needed: in the header ``Authorization: Bearer``, or
  once in the address of the page, which leaves a cookie that scripts cannot read and other sites cannot use.
- A page of another site may do nothing, with or without a token: browsers say where a request comes from.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from raypg.access_token import bearer_of, is_token, session_of

__all__ = ["COOKIE", "FORWARDED", "HEADERS", "OPEN", "Asked", "Refused", "is_addressed_here", "judge", "token_of_page"]

COOKIE = "raypg_session"

OPEN = frozenset({"/healthz"})
"""Paths that tell nothing, and need no token."""

FORWARDED = frozenset({"forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip"})
"""Headers by which proxies are known: who asks them is not on this machine."""

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; style-src-attr 'unsafe-inline'; "  # plotly's own
        "img-src 'self' data:; font-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Of every answer."""


@dataclass(frozen=True)
class Asked:
    """What a request says.

    Attributes:
        client: address that it comes from.
        port: that it came to.
        method: of HTTP; ``GET`` for a WebSocket.
        path, query: of the address.
        headers: by lower-case name, each with all its values.
    """

    client: str
    port: int
    method: str
    path: str
    query: str
    headers: Mapping[str, Sequence[str]]

    def header(self, name: str) -> str | None:
        """The only value of that header."""
        values = self.headers.get(name, ())
        return values[0] if len(values) == 1 else None


@dataclass(frozen=True)
class Refused:
    """A request that may not pass: with this status of HTTP, for this reason."""

    status: int
    reason: str


def judge(asked: Asked, token: str) -> Refused | None:
    """Why *asked* may not pass, or ``None``."""
    host = asked.header("host")
    if host is None:
        return Refused(400, "a request must have one Host header")
    if any(origin not in (f"http://{host}", f"https://{host}") for origin in asked.headers.get("origin", ())):
        return Refused(403, f"it comes from another site ({_short(', '.join(asked.headers['origin']))})")
    if asked.path in OPEN or _has_token(asked, token):
        return None
    if not is_loopback(asked.client) or FORWARDED & asked.headers.keys():
        return Refused(
            401,
            "this needs the cluster's token: open the page once as /?token=…, or send it as 'Authorization: Bearer …'; "
            "`raypg token` prints it",
        )
    if not is_addressed_here(host, asked.port):
        return Refused(
            421,
            f"it is addressed to {_short(host)}, not to this machine: use http://localhost:{asked.port} (a tunnel must "
            "have the same port at its other end), or send the cluster's token",
        )
    return None


def token_of_page(asked: Asked) -> str | None:
    """The token in the address of the page, if that is what is asked for."""
    if asked.path != "/" or asked.method not in ("GET", "HEAD"):
        return None
    found = parse_qs(asked.query).get("token")
    return found[0] if found else None


def is_loopback(address: str) -> bool:
    """Whether *address* is one of this machine that no other can reach."""
    try:
        known = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(known, "ipv4_mapped", None)
    return bool((mapped or known).is_loopback)


def is_addressed_here(host: str, port: int | None = None) -> bool:
    """Whether the header ``Host`` of a request names this machine.

    Args:
        port: that it must name too, 80 if it names none; ``None`` = any.
    """
    name, colon, number = (host, "", "") if host.endswith("]") else host.rpartition(":")
    if not colon:
        name, number = host, "80"
    if not number.isdigit() or (port is not None and number != str(port)):
        return False
    name = name.lower()
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]
    return name == "localhost" or is_loopback(name)


def _has_token(asked: Asked, token: str) -> bool:
    given = bearer_of(asked.header("authorization"))
    if given is not None:
        return is_token(given, token)
    session = _cookie(asked)
    return session is not None and is_token(session, session_of(token))


def _cookie(asked: Asked) -> str | None:
    for value in asked.headers.get("cookie", ()):
        try:
            found = SimpleCookie(value).get(COOKIE)
        except CookieError:
            continue
        if found is not None:
            return found.value
    return None


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}…"
