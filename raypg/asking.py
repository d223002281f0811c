"""Asking one of the actors that serve all pools, which may just be restarted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from ray.actor import ActorHandle

from raypg import _compat
from raypg.calling import send
from raypg.errors import UnavailableError

AGAIN_AFTER = 0.1
"""Seconds until it is looked for again."""

_found: dict[tuple[Callable[[], ActorHandle[Any] | None], str], ActorHandle[Any]] = {}


async def ask(
    find: Callable[[], ActorHandle[Any] | None], method: str, *arguments: Any, within: float, otherwise: str
) -> Any:
    """What *method* of the actor answers.

    Args:
        find: finds the actor, as it lives now; ``None`` if there is none.
        within: seconds in which it must answer.
        otherwise: what to say if it does not.

    Raises:
        UnavailableError: it does not answer in time.
    """
    until = time.monotonic() + within
    key = find, _compat.cluster_id()
    while (left := until - time.monotonic()) > 0:
        actor = _found.get(key) or find()  # to look for it takes as long as to ask it
        if actor is not None:
            _found[key] = actor
            try:
                return await asyncio.wait_for(send(getattr(actor, method), *arguments), left)
            except TimeoutError:
                break
            except _compat.ActorGone:
                _found.pop(key, None)  # the next life of it, which workers start, has to be found anew
        await asyncio.sleep(AGAIN_AFTER)
    raise UnavailableError(otherwise)
