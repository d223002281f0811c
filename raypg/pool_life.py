"""What is done to a whole pool, for everybody: ending it, and putting new processes in the place of its actors."""

from __future__ import annotations

import asyncio
import contextlib
import time

import ray

from raypg import _compat, joining
from raypg.cluster import find
from raypg.errors import PoolClosedError, UnavailableError
from raypg.portable import unpack_error

__all__ = ["end", "restart"]

RESTARTED_WITHIN = 60.0
"""Seconds in which the Pool actor must be back."""

RETRY_EVERY = 0.1
"""Seconds between two looks for it."""


async def end(name: str, reason: str) -> None:
    """End pool *name* for everybody: its actors close their connections and stop.

    Raises:
        PoolNotFoundError: it does not run.
    """
    actor = find(name)
    try:
        await asyncio.wait_for(actor.close.remote(reason), 30.0)
    except (*_compat.ActorGone, TimeoutError):
        pass
    ray.kill(actor)
    joining.forget(name, PoolClosedError(reason))


async def restart(name: str) -> int:
    """Put new processes in the place of all actors of pool *name*, one after the other: for another version of raypg on
    its nodes, say. No call fails for it.

    Returns:
        How many workers were replaced.

    Raises:
        PoolNotFoundError: it does not run.
        UnavailableError: it is being restarted already, or did not come back.
    """
    actor = find(name)
    try:
        kind, value = await actor.replace_workers.remote()
    except _compat.ActorGone as error:
        raise UnavailableError(f"the actor of pool {name!r} died while its workers were replaced: {error}") from None
    if kind == "error":
        raise unpack_error(value)
    before = (await actor.membership.remote())["epoch"]
    ray.kill(actor, no_restart=False)
    until = time.monotonic() + RESTARTED_WITHIN
    while time.monotonic() < until:
        await asyncio.sleep(RETRY_EVERY)
        with contextlib.suppress(*_compat.ActorGone, TimeoutError):
            membership = await asyncio.wait_for(find(name).membership.remote(), 1.0)
            if membership["epoch"] > before and len(membership["workers"]) >= value:
                return int(value)
    raise UnavailableError(f"the actor of pool {name!r} did not come back within {RESTARTED_WITHIN:g} s")
