"""Breaker: the actor that decides for all workers of a pool whether its database is well. One serves all pools.

Its messages:

- ``join``, ``report``: a worker says that it is there, and what it has seen; the answer is what it must do.
- ``command``: somebody forces the breaker open or closed, disables or enables it.
- ``status``, ``transitions``: how things stand, and what has changed.
- ``forget``, ``rest``: a pool has ended.

Its decisions are made in :mod:`raypg.core.quorum`. Orders are pushed to the workers the moment they change. It keeps
nothing that it cannot learn again from the workers, but for what was forced by hand, which is in Ray's key-value store.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import time
from collections.abc import Callable
from typing import Any

from ray.actor import ActorHandle

from raypg import _compat
from raypg.actors.serving_all import ServingAll
from raypg.actors.worker import Answer
from raypg.breaker_status import SHOWN, describe, describe_transitions
from raypg.core.breaker import DISABLED, BreakerConfig, Transition
from raypg.core.quorum import Order, Quorum, Report
from raypg.errors import UnavailableError
from raypg.portable import pack_error

logger = logging.getLogger(__name__)

DEAD_AFTER = 60.0
"""Seconds without a word from any worker after which a pool is forgotten."""

TICK = 0.05
"""Seconds between two looks at the clock while a pool is not closed."""

ACKNOWLEDGED_WITHIN = 2.0
"""Seconds in which a worker must acknowledge an order."""

POLL = 10.0
"""Longest time that ``transitions`` waits for one, in seconds."""


class _Pool:
    """One pool's quorum, and how to reach its workers."""

    def __init__(self, name: str, config: BreakerConfig, expected: int) -> None:
        self.name = name
        self.quorum = Quorum(config, time.monotonic(), random.random, expected)
        self.expected = expected
        self.lives: dict[int, tuple[str, ActorHandle[Any]]] = {}
        self.told: dict[int, Order] = {}
        self.changed = asyncio.Event()
        self.seen = 0  # transitions that waiters were woken for

    @property
    def key(self) -> str:
        return f"breaker/{self.name}"

    def restore(self) -> None:
        """What was forced by hand holds, whoever dies."""
        stored = _compat.kv_get(self.key)
        if stored is None:
            return
        kept = json.loads(stored)
        machine, now = self.quorum.machine, time.monotonic()
        if kept["what"] == "disable":
            machine.disable(kept["reason"], now)
        else:
            left = None if kept["until"] is None else kept["until"] - time.time()
            if left is None or left > 0:
                machine.force_open(kept["reason"], now, left)

    def store(self) -> None:
        machine = self.quorum.machine
        if machine.forced or machine.state == DISABLED:
            what = "open" if machine.forced else "disable"
            left = machine.time_until_recovery(time.monotonic())
            until = None if left is None else time.time() + left
            kept = {"what": what, "reason": machine.reason, "until": until}
            _compat.kv_put(self.key, json.dumps(kept).encode())
        else:
            _compat.kv_delete(self.key)

    @property
    def count(self) -> int:
        """Transitions so far."""
        return self.quorum.machine.epoch - 1  # each begins an epoch

    def since(self, after: int) -> list[Transition]:
        """The transitions after the first *after* of them, as far as they are remembered."""
        known = tuple(self.quorum.machine.transitions)
        return list(known[max(0, len(known) - (self.count - after)) :]) if after < self.count else []

    def push(self) -> list[tuple[int, asyncio.Task[bool]]]:
        """Send every worker the order that is new to it."""
        now = time.monotonic()
        sent = []
        for worker, (_, handle) in self.lives.items():
            order = self.quorum.order(worker, now)
            known = self.told.get(worker)
            if known is not None and known[:2] == order[:2]:
                continue
            self.told[worker] = order
            sent.append((worker, asyncio.get_running_loop().create_task(_acknowledged(handle, order))))
        if self.count != self.seen:
            self.seen = self.count
            self.changed.set()
            self.changed = asyncio.Event()
        return sent


async def _acknowledged(handle: ActorHandle[Any], order: Order) -> bool:
    with contextlib.suppress(Exception):  # it is dead or cut off: it will ask again itself
        await asyncio.wait_for(handle.follow.remote(tuple(order)), ACKNOWLEDGED_WITHIN)
        return True
    return False


class BreakerActor(ServingAll):
    """The breakers of all pools of this cluster."""

    pools: dict[str, _Pool]

    def __init__(self) -> None:
        super().__init__()
        self._ticker = asyncio.get_running_loop().create_task(self._tick())

    def __repr__(self) -> str:
        return "Breaker"

    # --- from workers ---

    async def join(
        self,
        pool: str,
        worker: int,
        incarnation: str,
        handle: list[ActorHandle[Any]],
        config: dict[str, Any],
        expected: int,
    ) -> tuple[Any, ...]:
        """A worker is there, or has other settings; the answer is its order."""
        settings = BreakerConfig(**config)
        known = self.pools.get(pool)
        if known is None:
            known = self.pools[pool] = _Pool(pool, settings, expected)
            known.restore()
        now = time.monotonic()
        if known.quorum.machine.config != settings:
            known.quorum.configure(settings, now)
        known.expected = expected
        if known.lives.get(worker, ("",))[0] != incarnation:
            known.quorum.join(worker, now)
        known.lives[worker] = (incarnation, handle[0])
        order = known.told[worker] = known.quorum.order(worker, now)
        self.joined()
        return tuple(order)

    async def report(self, pool: str, worker: int, incarnation: str, report: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """What a worker has seen since its last report; ``None`` says: join first."""
        known = self.pools.get(pool)
        if known is None or known.lives.get(worker, ("",))[0] != incarnation:
            return None
        now = time.monotonic()
        known.quorum.report(worker, Report(*report), now)
        known.quorum.tick(now)
        order = known.told[worker] = known.quorum.order(worker, now)
        known.push()
        return tuple(order)

    # --- from handles ---

    async def command(self, pool: str, what: str, reason: str, ttl: float | None) -> Answer:
        """Force a state. Answers when every worker has acknowledged or failed to."""
        known: _Pool | None = await self.find(pool)
        if known is None:
            return "error", pack_error(_unknown(pool))
        missing = await self._missing(known)
        now = time.monotonic()
        machine = known.quorum.machine
        if what == "force_open":
            machine.force_open(reason, now, ttl)
        elif what == "reset":
            machine.reset(now)
        else:
            commands: dict[str, Callable[[str, float], None]] = {
                "force_close": machine.force_close,
                "disable": machine.disable,
                "enable": machine.enable,
            }
            commands[what](reason, now)
        known.store()
        sent = known.push()
        done = await asyncio.gather(*(acknowledged for _, acknowledged in sent))
        unreached = [worker for (worker, _), reached in zip(sent, done, strict=True) if not reached]
        return "ok", {
            "state": machine.state,
            "acknowledged": len(sent) - len(unreached),
            "unreached": sorted({*unreached, *missing}),
        }

    async def status(self, pool: str, shown: int = SHOWN) -> Answer:
        """How the breaker of *pool* stands, with the last *shown* transitions."""
        known: _Pool | None = await self.find(pool)
        if known is None:
            return "error", pack_error(_unknown(pool))
        now = time.monotonic()
        known.quorum.tick(now)
        known.push()
        return "ok", describe(known.quorum, now, time.time(), shown)

    async def states(self) -> dict[str, dict[str, Any]]:
        """How the breakers of all pools stand, in short."""
        machines = {name: known.quorum.machine for name, known in self.pools.items()}
        return {name: {"state": machine.state, "forced": machine.forced} for name, machine in machines.items()}

    async def transitions(self, pool: str, after: tuple[str, int] | None) -> tuple[tuple[str, int], Any] | None:
        """The transitions since *after*; waits for one. ``None``: there is no such pool.

        Args:
            after: the first part of the last answer; ``None`` asks only for it, and does not wait.
        """
        known: _Pool | None = await self.find(pool)
        if known is None:
            return None
        if after is None:
            return (self.incarnation, known.count), []
        seen = after[1] if after[0] == self.incarnation else 0
        if known.count <= seen:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(known.changed.wait(), POLL)
        return (self.incarnation, known.count), describe_transitions(known.since(seen), time.monotonic(), time.time())

    # --- inside ---

    async def forget(self, pool: str) -> None:
        """*pool* has ended, and what was forced on it with it."""
        known = self.pools.get(pool)
        if known is not None:
            known.changed.set()
            _compat.kv_delete(known.key)
        await super().forget(pool)

    async def _missing(self, pool: _Pool) -> set[int]:
        """The workers of *pool* that have not joined. Of a new Breaker, or a new pool, they may just be about to."""
        until = time.monotonic() + ACKNOWLEDGED_WITHIN
        while (missing := set(range(pool.expected)) - pool.lives.keys()) and (left := until - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._joined.wait(), left)
        return missing

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            now = time.monotonic()
            for pool in tuple(self.pools.values()):
                try:
                    forced = pool.quorum.machine.forced
                    pool.quorum.tick(now)
                    if forced and not pool.quorum.machine.forced:
                        pool.store()  # its time was over
                    pool.push()
                    if pool.quorum.silence(now) > DEAD_AFTER:
                        del self.pools[pool.name]  # its workers were ended without a word, or will join again
                except Exception:
                    logger.exception("breaker of pool %s: internal error", pool.name)


def _unknown(pool: str) -> UnavailableError:
    return UnavailableError(f"no worker of pool {pool!r} has reported to the breaker; see `raypg status`")
