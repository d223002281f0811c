"""The names under which raypg's actors are found, and the protocol they speak."""

from __future__ import annotations

import re

from raypg.errors import ConfigError

NAMESPACE = "raypg"
"""Ray namespace of every raypg actor: fixed, because the default one is anonymous per job."""

PROTOCOL = 2
"""Version of the messages between handles and actors; a handle of another version is refused."""

_APPLICATION_NAME_BYTES = 63  # NAMEDATALEN − 1

POOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,32}")


def check_pool_name(name: object) -> str:
    """Return *name* if it may name a pool.

    Raises:
        ConfigError: it is not a string of 1–32 characters out of ``A-Z a-z 0-9 _ . -``.
    """
    if not isinstance(name, str) or not POOL_NAME.fullmatch(name):
        raise ConfigError(f"pool name {name!r}: 1 to 32 characters out of A-Z a-z 0-9 _ . - are allowed")
    return name


def pool_actor(pool: str) -> str:
    """Ray name of the Pool actor of *pool*."""
    return f"raypg:{pool}:pool"


BREAKER_ACTOR = f"raypg:breaker:{PROTOCOL}"
"""Ray name of the Breaker actor; it serves all pools that speak this version of the protocol."""


PIPELINE_ACTOR = f"raypg:pipeline:{PROTOCOL}"
"""Ray name of the Pipeline actor; it serves all pools that speak this version of the protocol."""

METRICS_ACTOR = f"raypg:metrics:{PROTOCOL}"
"""Ray name of the Metrics actor; it serves all pools that speak this version of the protocol."""


def metrics_key(pool: str) -> str:
    """Key under which the figures of *pool* are kept in Ray's key-value store."""
    return f"metrics/{PROTOCOL}/{pool}"


ALERT_RULES_KEY = f"alerts/{PROTOCOL}/rules"
"""Key under which the rules of alerts are kept in Ray's key-value store."""

ALERT_STATE_KEY = f"alerts/{PROTOCOL}/state"
"""Key under which is kept what fires, what has fired, and what webhooks were not told yet."""


def worker_actor(pool: str, index: int) -> str:
    """Ray name of worker *index* of *pool*: bounded in number, so that metrics labelled with it stay bounded."""
    return f"raypg:{pool}:worker:{index}"


def application_name(ours: str, own: str | None) -> str:
    """What PostgreSQL shows of a connection: raypg's part, by which it counts and reaps, then the user's *own*.

    At most 63 bytes of printable ASCII: the server would cut and mangle the rest in ways of its version, and this way
    we know what ``pg_stat_activity`` shows.
    """
    full = f"{ours}:{own}" if own else ours
    return "".join(character if " " <= character <= "~" else "?" for character in full)[:_APPLICATION_NAME_BYTES]


def worker_index(pool: str, actor_name: str) -> int | None:
    """The number of the worker of *pool* that is called *actor_name*; ``None`` for any other actor."""
    prefix, _, number = actor_name.rpartition(":")
    return int(number) if prefix == f"raypg:{pool}:worker" and number.isdigit() else None


def pool_of(actor_name: str) -> str | None:
    """Name of the pool whose Pool actor is called *actor_name*; ``None`` for any other actor."""
    prefix, _, rest = actor_name.partition(":")
    name, _, role = rest.rpartition(":")
    return name if prefix == "raypg" and role == "pool" and POOL_NAME.fullmatch(name) else None
