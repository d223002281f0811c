"""The cluster's bearer token: what opens its HTTP doors to others than those on the same machine.

It is made once, at random, and kept in Ray's key-value store: whoever can read that can run code in the cluster anyway.
``RAYPG_TOKEN``, in the environment of whoever starts a dashboard, decides it instead. It is in no log, no status, no
argument of an actor or deployment.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets

from raypg import _compat
from raypg.errors import ConfigError

__all__ = ["VARIABLE", "bearer_of", "decide", "is_token", "session_of", "token"]

VARIABLE = "RAYPG_TOKEN"
"""Environment variable that holds the token."""

SHORTEST = 16
"""Characters that a token of one's own must have at least."""

_KEY = "access_token"


def token() -> str:
    """The cluster's token, made if there is none."""
    stored = _compat.kv_get(_KEY)
    if stored is None:
        _compat.kv_put_new(_KEY, secrets.token_urlsafe(32).encode())
        stored = _compat.kv_get(_KEY) or b""
    return stored.decode()


def decide() -> str:
    """The same; but what ``RAYPG_TOKEN`` says in this process becomes the cluster's token.

    Raises:
        ConfigError: that is too short, or holds what cannot travel in a header.
    """
    own = os.environ.get(VARIABLE)
    if own is None:
        return token()
    if len(own) < SHORTEST or not own.isascii() or not own.isprintable() or " " in own:
        raise ConfigError(
            f"{VARIABLE}: must be {SHORTEST} or more printable ASCII characters without blanks; leave it out, and one "
            "is made"
        )
    _compat.kv_put(_KEY, own.encode())
    return own


def bearer_of(authorization: str | None) -> str | None:
    """The token in a header ``Authorization: Bearer …``; ``None`` without one."""
    if authorization is None or authorization[:7].lower() != "bearer ":
        return None
    return authorization[7:].strip()


def is_token(given: str, expected: str) -> bool:
    """Whether they are the same, in a time that does not tell how much of it is."""
    return hmac.compare_digest(given.encode(), expected.encode())


def session_of(expected: str) -> str:
    """What a browser keeps in the place of the token: made from it, and no way back."""
    return hmac.new(expected.encode(), b"raypg dashboard session", hashlib.sha256).hexdigest()
