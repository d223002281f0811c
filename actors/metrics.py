"""Metrics: the actor that adds up the figures of all workers. One serves all pools.

Its messages:

- ``join``, ``report``, ``leave``: a worker says that it is there, what has happened since it last said so, that it
  ends. ``cache_told``: so does the cache of a router, whose end is silence.
- ``snapshot``, ``history``, ``histories``, ``newest``: what is known. Workers are asked for what happened since their
  last report.
- ``alerts``, ``add_alert``, ``delete_alert``: the rules that are watched each second, and what has become of them.
- ``forget``, ``rest``: a pool has ended.

What it knows is written to Ray's key-value store every few seconds. Its next life reads it there, and workers repeat
what was told since: nothing is lost or counted twice, and the time without it is a gap in the history.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import time
import zlib
from collections import ChainMap
from collections.abc import Mapping
from typing import Any

from ray.actor import ActorHandle

from raypg import _compat, cluster, naming
from raypg.actors.alerting import AlertKeeper
from raypg.actors.ray_metrics import RayMetrics
from raypg.actors.serving_all import ServingAll
from raypg.actors.worker import Answer
from raypg.core.alerts import MOST_REMEMBERED
from raypg.core.history import SERIES
from raypg.core.nearest import did_you_mean
from raypg.core.pool_metrics import Delta, PoolMetrics
from raypg.errors import ConfigError, RaypgError, UnavailableError
from raypg.portable import pack_error

logger = logging.getLogger(__name__)

FRESH_WITHIN = 0.5
"""Seconds in which a worker must answer for its figures; else they are as old as its last report."""

LOOK_EVERY = 1.0
"""Seconds between two looks at the breakers' states, and at what the rules of alerts say."""

DURABLE_EVERY = 5.0
"""Seconds between two copies to the key-value store."""

EXPORT_EVERY = 2.0
"""Seconds between two exports to Ray's own metrics, which sends them on every ten seconds unless told otherwise."""

SETTLED_WITHIN = 6.0
"""Seconds in which a new life hears again what was told to the last one, before it says anything."""

DEFAULT_MINUTES = 60.0
"""For how long history is kept until a worker says how long it is to be."""

DEAD_AFTER = 600.0
"""Seconds without a word after which a worker is missed no more, and a pool of such workers is forgotten."""


class _Pool:
    """One pool's figures, and how to reach its workers."""

    def __init__(self, metrics: PoolMetrics, restored: set[int]) -> None:
        self.metrics = metrics
        self.workers: dict[int, tuple[str, ActorHandle[Any]]] = {}
        self.durable: dict[tuple[int, str], int] = {}
        self.missing = restored  # workers that have not repeated yet what was not durable
        self.settled = asyncio.Event()
        if not self.missing:
            self.settled.set()

    def heard(self, worker: int) -> None:
        self.missing.discard(worker)
        if not self.missing:
            self.settled.set()


class MetricsActor(ServingAll):
    """The figures of all pools of this cluster."""

    pools: dict[str, _Pool]

    def __init__(self) -> None:
        super().__init__()
        self._states: dict[str, dict[str, Any]] = {}
        self._breaker: ActorHandle[Any] | None = None
        self._epoch = time.time() - time.monotonic()
        self._born = self._now()
        self._ray_metrics = RayMetrics()
        self._alerts = AlertKeeper()
        for key in _compat.kv_keys(naming.metrics_key("")):  # who looks now shall find what was known
            name = key.removeprefix(naming.metrics_key(""))
            self.pools[name] = _restored(name, DEFAULT_MINUTES, self._now())
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    def __repr__(self) -> str:
        return "Metrics"

    # --- from workers ---

    async def join(
        self, pool: str, worker: int, incarnation: str, handle: list[ActorHandle[Any]], minutes: float
    ) -> int:
        """A worker is there; the answer is the number of its last delta that is known."""
        known = self.pools.get(pool)
        if known is None:
            known = self.pools[pool] = _restored(pool, minutes, self._now())
        known.metrics.history.resize(minutes)
        number = known.metrics.join(worker, incarnation, self._now())
        if worker not in known.workers:
            self._make_durable(self._now())  # the next life shall know for whom to wait
        known.workers[worker] = (incarnation, handle[0])
        self.joined()
        return number

    async def report(self, pool: str, worker: int, incarnation: str, deltas: list[Delta]) -> tuple[int, int] | None:
        """What a worker has seen; the answer is (last delta that is known, last that outlives this actor), or ``None``:
        join first."""
        known = self.pools.get(pool)
        number = None if known is None else known.metrics.apply(worker, incarnation, deltas, self._now())
        if known is None or number is None:
            return None
        known.heard(worker)
        return number, known.durable.get((worker, incarnation), 0)

    async def cache_told(self, pool: str, who: str, totals: dict[str, int]) -> None:
        """The cache of a router tells its totals; see :meth:`PoolMetrics.told_by_cache`."""
        known = self.pools.get(pool)
        if known is not None:
            known.metrics.told_by_cache(who, totals, self._now())

    async def leave(self, pool: str, worker: int, incarnation: str, deltas: list[Delta]) -> None:
        """A worker ends, and will not come back: these are its last figures."""
        known = self.pools.get(pool)
        if known is not None:
            known.metrics.apply(worker, incarnation, deltas, self._now())
            known.metrics.leave(worker)
            known.workers.pop(worker, None)
            known.heard(worker)

    # --- from those who look ---

    async def snapshot(
        self,
        pools: list[str] | None = None,
        statements: int = 20,
        in_detail: bool = True,
        fresh: bool = True,
        notable: bool = False,
    ) -> Answer:
        """Of each of *pools* (all if ``None``) what :meth:`PoolMetrics.snapshot` says, and under ``circuit_breaker``
        the breaker's ``state``, and whether it was ``forced``, a second ago.

        Args:
            statements, in_detail, notable: see there.
            fresh: ask the workers for what happened until now; else it is what they told in the last second.
        """
        names = sorted(self.pools) if pools is None else pools
        found: dict[str, _Pool | None] = {name: await self.find(name) for name in names}
        for name, known in found.items():
            if known is None and pools is not None:
                return "error", pack_error(_unknown(name))
        here = {name: known for name, known in found.items() if known is not None}
        await asyncio.gather(*(self._refresh(known, fresh) for known in here.values()))
        now = self._now()
        return "ok", {
            name: self._describe(name, known, now, statements, in_detail, notable) for name, known in here.items()
        }

    async def history(self, pool: str, series: str, seconds: float) -> Answer:
        """(Seconds from one point to the next, [(seconds since the epoch, value)] of the last *seconds*). NaN
        where nobody has looked. *series* is one of :data:`raypg.core.history.SERIES`."""
        if series not in SERIES:
            return "error", pack_error(ConfigError(f"unknown series {series!r}{did_you_mean(series, SERIES)}"))
        known: _Pool | None = await self.find(pool)
        if known is None:
            return "error", pack_error(_unknown(pool))
        return "ok", known.metrics.history.values(series, seconds, self._now())

    async def histories(self, pool: str, seconds: float) -> Answer:
        """(Seconds from one point to the next, when the first begins, series → values) of all series."""
        known: _Pool | None = await self.find(pool)
        if known is None:
            return "error", pack_error(_unknown(pool))
        return "ok", known.metrics.history.all_values(seconds, self._now())

    async def newest(self) -> Answer:
        """Of each pool the last second that is over: (when it began, series → value)."""
        now = self._now()
        return "ok", {name: known.metrics.history.newest(now) for name, known in self.pools.items()}

    async def alerts(self, pool: str | None = None, history: int = MOST_REMEMBERED, names: bool = True) -> Answer:
        """What :meth:`AlertKeeper.describe` says."""
        return "ok", self._alerts.describe(pool, history, names)

    # --- from those who change ---

    async def add_alert(self, rule: dict[str, Any]) -> Answer:
        """Watch *rule* (see :func:`raypg.core.alert_rule.make_rule`) from now on; the answer is its ``id``."""
        try:
            pool = rule.get("pool") if isinstance(rule, dict) else None
            if isinstance(pool, str) and await self.find(pool) is None:
                raise ConfigError(f"alert rule: no pool {pool!r} runs{did_you_mean(pool, self.pools)}")
            return "ok", {"id": self._alerts.add(rule)}
        except RaypgError as error:
            return "error", pack_error(error)

    async def delete_alert(self, id: str) -> Answer:
        """Watch the rule of this id no more; what it fired is resolved."""
        try:
            self._alerts.delete(id, self._now())
        except RaypgError as error:
            return "error", pack_error(error)
        return "ok", {"deleted": id}

    async def forget(self, pool: str) -> None:
        """*pool* has ended."""
        await super().forget(pool)
        self._states.pop(pool, None)
        _compat.kv_delete(naming.metrics_key(pool))

    # --- inside ---

    def _now(self) -> float:
        """Seconds since the epoch, by a clock that nobody sets: set was it when this actor began."""
        return self._epoch + time.monotonic()

    def _describe(
        self, name: str, known: _Pool, now: float, statements: int, in_detail: bool, notable: bool = False
    ) -> dict[str, Any]:
        return {
            **known.metrics.snapshot(now, statements, in_detail, notable),
            "circuit_breaker": self._breaker_of(name),
            "alerts": self._alerts.states(name),
        }

    def _glance(self, name: str, known: _Pool, now: float) -> Mapping[str, Any] | None:
        """What rules of alerts are about; ``None`` while this life does not know yet what the last one knew: what fires
        must not be taken for over."""
        if now - self._born < SETTLED_WITHIN and (known.missing or name not in self._states):
            return None
        ours: dict[str, Any] = {
            "circuit_breaker": self._breaker_of(name),
            "heard_at": max(known.metrics.heard_at, self._born),  # before that nobody listened
        }
        return ChainMap(ours, known.metrics.parts(now))  # type: ignore[arg-type]

    def _breaker_of(self, pool: str) -> dict[str, Any]:
        return self._states.get(pool, {"state": None, "forced": False})

    async def _refresh(self, known: _Pool, fresh: bool) -> None:
        """Hear again what the last life of this actor was told, and, if *fresh*, of every worker what happened until
        now."""
        if known.missing:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(known.settled.wait(), SETTLED_WITHIN)
            known.missing = set()
        if fresh:
            await asyncio.gather(*(self._pull(known, worker) for worker in tuple(known.workers)))

    async def _pull(self, known: _Pool, worker: int) -> None:
        incarnation, handle = known.workers[worker]
        number = known.metrics.known().get((worker, incarnation), 0)
        with contextlib.suppress(Exception):  # it is busy, dead or cut off: what it told last is what there is
            deltas = await asyncio.wait_for(handle.metrics.remote(incarnation, number), FRESH_WITHIN)
            known.metrics.apply(worker, incarnation, deltas, self._now())

    async def _ask_breaker(self) -> None:
        try:
            self._breaker = self._breaker or cluster.find_breaker()
            if self._breaker is not None:
                # Of a pool that a new life of it does not know yet, what the last one said is what there is.
                self._states.update(await asyncio.wait_for(self._breaker.states.remote(), FRESH_WITHIN))
        except Exception:
            self._breaker = None  # it is being restarted: what it said last is what there is

    async def _keep(self) -> None:
        durable_at = export_at = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_EVERY)
            try:
                await self._ask_breaker()
                now, wall = time.monotonic(), self._now()
                self._alerts.evaluate({name: self._glance(name, pool, wall) for name, pool in self.pools.items()}, wall)
                if now >= export_at:
                    export_at = now + EXPORT_EVERY
                    known = {name: self._describe(name, pool, wall, 20, False) for name, pool in self.pools.items()}
                    self._ray_metrics.export(known)
                if now >= durable_at:
                    durable_at = now + DURABLE_EVERY
                    self._make_durable(self._now())
            except Exception:
                logger.exception("metrics: internal error")

    def _make_durable(self, wall: float) -> None:
        for name, pool in tuple(self.pools.items()):
            if wall - pool.metrics.heard_at > DEAD_AFTER:
                del self.pools[name]  # its workers were ended without a word, or will join again
                _compat.kv_delete(naming.metrics_key(name))
                continue
            pool.metrics.leave_silent(wall, DEAD_AFTER)
            known = pool.metrics.known()
            _compat.kv_put(naming.metrics_key(name), zlib.compress(pickle.dumps(pool.metrics), 1))
            pool.durable = known


def _restored(pool: str, minutes: float, now: float) -> _Pool:
    """What the last life of this actor knew of *pool*, or an empty page."""
    stored = _compat.kv_get(naming.metrics_key(pool))
    if stored is not None:
        try:
            metrics: PoolMetrics = pickle.loads(zlib.decompress(stored))
        except Exception:
            logger.warning("pool %s: its metrics were kept by another version of raypg; they begin anew", pool)
        else:
            return _Pool(metrics, metrics.present(now))
    return _Pool(PoolMetrics(minutes, now), set())


def _unknown(pool: str) -> UnavailableError:
    return UnavailableError(f"no worker of pool {pool!r} has reported its metrics; see `raypg status`")
