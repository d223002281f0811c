"""Pool: the actor that a pool *is* for the cluster. It knows the workers, divides the budget, and carries no statement.

Its messages:

- ``hello``: a handle says who it is and what it wants; the answer is the pool's membership, or why not.
- ``membership``: where the workers are now; ``verify``: whether one of them lives.
- ``status``, ``activity``, ``reconfigure``, ``replace_workers``, ``close``.

Once a second it pings its workers, see :mod:`raypg.actors.membership`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from typing import Any

import ray

from raypg import _compat, cluster, monitoring, naming
from raypg.actors.inherited import warn_of_runtime_env
from raypg.actors.looking import Looking
from raypg.actors.member import PING_EVERY, Member
from raypg.actors.membership import START_TIMEOUT, Membership, check_workers
from raypg.actors.reaper import Reaper
from raypg.actors.worker import Answer, application_name, application_prefix
from raypg.config import PoolConfig
from raypg.core import limits, sizing
from raypg.errors import ConfigError, PoolClosedError, PoolConflictError, PoolVersionError, RaypgError, UnavailableError
from raypg.messages import hello
from raypg.portable import pack_error
from raypg.server.connect import Connector
from raypg.server.control import Control

logger = logging.getLogger(__name__)

LEAST_PAUSE = 0.05
"""Seconds between two rounds of pings, at least."""

ARRANGE_EVERY = 2.0
"""Seconds between two looks at the nodes of the cluster."""

LIMITS_EVERY = 30.0
"""Seconds between two questions for the limits of a server that has less room than the pool was to have, or that could
not be asked."""

BEGIN_AGAIN = 1.0
"""Seconds until a Pool actor that was started anew tries again to find its workers, after a fault."""

BREAKER_WITHIN = 5.0
"""Seconds that a start waits for the Breaker to have heard of the workers."""

CONFIGURED_WITHIN = 4.0
"""Seconds in which a worker must have taken a new configuration."""

STARTED_WITHIN = 20.0
"""Seconds that a change waits for workers that it brings."""

STATUS_WITHIN = 2.0
"""Seconds in which a worker must have told its figures."""

CLOSED_WITHIN = 10.0
"""Seconds that a closing pool gives to its workers."""

FIXED = frozenset({"pooler", "codecs", "statement_cache_size", "server_settings", "application_name"})
"""Settings that connections are opened with."""


class PoolActor:
    """One pool.

    Args:
        name: the pool's name.
        config: its configuration, as :meth:`PoolConfig.to_dict` gave it.
    """

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        self._name = name
        self._config = PoolConfig.from_dict(config)
        self._cluster = _compat.cluster_id()
        self._opening: asyncio.Task[Answer] | None = None
        self._closed: PoolClosedError | None = None
        self._keepers: list[asyncio.Task[None]] = []
        self._nodes = _compat.Nodes(frozenset(), ())
        self._arranged_at = self._asked_at = 0.0
        self._limits_known = self._swept = False
        changed = _compat.kv_get(self._key)
        if changed is not None and _compat.was_restarted():
            self._config = self._config.changed(**json.loads(changed))
        control = application_name(self._cluster, name, "control", secrets.token_hex(4))
        servers = (None, *range(len(self._config.replicas)))
        self._connectors = [Connector(self._config, control, server) for server in servers]
        self._prefix = application_prefix(self._cluster, name)
        self._reaper = Reaper(name, list(map(Control, self._connectors)), self._prefix, lambda: self._workers.cap)
        self._workers = Membership(name, lambda: self._config, self._reaper, self._next_life())
        self._looking = Looking(self._reaper.activity)
        warn_of_runtime_env(name)
        if _compat.was_restarted():
            self._begin()  # the workers have outlived us: find them again, without being asked

    def __repr__(self) -> str:
        return f"Pool({getattr(self, '_name', '?')})"

    @property
    def _key(self) -> str:
        return f"pool/{self._name}"

    def _next_life(self) -> int:
        """Number of this life of the pool's actor: what an earlier life still has under way is out of date."""
        life = int(_compat.kv_get(f"{self._key}/life") or 0) + 1
        _compat.kv_put(f"{self._key}/life", str(life).encode())
        return life

    # --- messages ---

    async def hello(self, who: dict[str, Any], config: dict[str, Any] | None) -> Answer:
        """Check a handle's versions and, if it was constructed with a configuration, that too; start on first use."""
        here = hello()
        versions = {key: (here[key], who.get(key)) for key in here if here[key] != who.get(key)}
        if versions:
            return "error", pack_error(PoolVersionError(self._name, versions))
        if self._closed is not None:
            return "error", pack_error(self._closed)
        if config is not None:
            asked = PoolConfig.from_dict(config)
            identity, tunables = self._config.differences(asked)
            if identity or tunables:
                return "error", pack_error(PoolConflictError(self._name, identity or tunables, identity=bool(identity)))
            await self._take_password(asked)
        first = self._opening is None
        kind, value = await asyncio.shield(self._begin())
        if kind == "error":
            await self.close("it could not start")
            return "failed", value
        return "ok", {"first": first, "config": self._public_config(), **self._membership()}

    async def membership(self) -> dict[str, Any]:
        """The workers that can be used, and the epoch of this list."""
        return self._membership()

    async def verify(self, index: int, incarnation: str) -> bool:
        """Whether that life of worker *index* goes on; answers when it is known, within some seconds."""
        return await self._workers.verify(index, incarnation)

    async def status(self) -> Answer:
        """Figures of all workers."""
        if self._closed is not None:
            return "error", pack_error(self._closed)
        members = list(self._workers.members.values())
        answers = await self._workers.tell(lambda handle: handle.status.remote(), STATUS_WITHIN)
        return "ok", {
            "pool_name": self._name,
            "max_connections": self._workers.cap,
            "configured_max_connections": self._config.max_connections,
            "min_connections": self._config.min_connections,
            "workers": [
                {
                    "index": member.index,
                    "node": member.node,
                    "budget": self._workers.share(member),
                    "state": member.state,
                    "silent": time.monotonic() - member.answered_at,
                    "reachable": not isinstance(answer, BaseException),
                    "figures": None if isinstance(answer, BaseException) else answer,
                }
                for member, answer in zip(members, answers, strict=True)
            ],
        }

    async def attend(self, who: str, done: int, wants: list[str], report: tuple[Any, ...] | None = None) -> Any:
        """A cache, or a worker, is there; see :mod:`raypg.actors.authority`, also for the next three."""
        return await self._workers.authority.attend(who, done, wants, report)

    async def want(self, who: str, tables: list[str] | None) -> None:
        """A cache wants to keep results of *tables*; ``None``: it keeps nothing any more."""
        self._workers.authority.want(who, tables)

    async def changed(self, tables: list[str] | None) -> None:
        """Somebody has written past the pool: to *tables*, or to any."""
        self._workers.authority.changed(tables)

    async def intend(self, life: str, intents: dict[int, str]) -> bool:
        """A worker is to write; answers when it may."""
        return await self._workers.authority.intend(life, intents)

    async def activity(self) -> dict[str, Any]:
        """Who waits for whom on the server, or that it does not answer; see :meth:`Looking.activity`."""
        return await self._looking.activity()

    async def reconfigure(self, changes: dict[str, Any]) -> Answer:
        """Change settings of the running pool: a smaller cap as connections come back, a larger one at once; more
        workers as they start, fewer as they have nothing left to do."""
        if self._closed is not None:
            return "error", pack_error(self._closed)
        previous = self._workers.cap
        try:
            for key in changes:
                if key in FIXED:
                    raise ConfigError(f"{key} cannot be changed in a running pool: end it and start it anew")
            config = self._config.changed(**changes)
            check_workers(config)
        except RaypgError as error:
            return "error", pack_error(error)
        self._use(config)
        stored = json.loads(_compat.kv_get(self._key) or b"{}")
        _compat.kv_put(self._key, json.dumps({**stored, **changes}).encode())  # tunables only: no secret among them
        if "max_connections" in changes:
            await self._ask_limits()
        await self._push_config()
        started = await self._arrange()
        await self._workers.round()
        if started:
            await self._workers.appear(started, STARTED_WITHIN)
            await self._workers.round()
        return "ok", {
            "previous_size": previous,
            "new_size": self._workers.cap,
            "workers": sum(not member.draining for member in self._workers.members.values()),
            "draining": [member.index for member in self._workers.members.values() if member.draining],
        }

    async def replace_workers(self) -> Answer:
        """Put a new process in the place of each worker, one after the other; no call fails for it. Answers when the
        last one has ended."""
        if self._closed is not None:
            return "error", pack_error(self._closed)
        if self._workers.replacing:
            return "error", pack_error(
                UnavailableError(f"the workers of pool {self._name!r} are being replaced already")
            )
        members = [member for member in self._workers.members.values() if not member.draining]
        self._workers.replacing = True
        try:
            for member in members:
                if self._workers.members.get(member.index) is member:  # it may have died meanwhile
                    await self._workers.replace(member)
        except UnavailableError as error:
            return "error", pack_error(error)
        finally:
            self._workers.replacing = False
        return "ok", len(members)

    async def _push_config(self) -> None:
        config = self._config.to_dict()
        await self._workers.tell(lambda handle: handle.use.remote(config), CONFIGURED_WITHIN)

    async def close(self, reason: str) -> None:
        """End the pool: callers get :class:`PoolClosedError` with *reason*; connections are closed, actors end."""
        if self._closed is None:
            self._closed = PoolClosedError(reason)
            for keeper in self._keepers:
                keeper.cancel()
            self._workers.close()
            await self._workers.tell(lambda handle: handle.close.remote(reason), CLOSED_WITHIN)
            await self._reaper.close()
            for handle in self._workers.handles():
                ray.kill(handle)
            for serving_all in (cluster.find_breaker(), cluster.find_metrics()):
                if serving_all is not None:
                    with contextlib.suppress(*_compat.ActorGone, TimeoutError):
                        await asyncio.wait_for(serving_all.forget.remote(self._name), PING_EVERY)
                    serving_all.rest.remote()
            monitoring.withdraw(self._name)
            _compat.kv_delete(naming.metrics_key(self._name))
            _compat.kv_delete(self._key)

    # --- starting ---

    def _begin(self) -> asyncio.Task[Answer]:
        if self._opening is None:
            work = self._open_again() if _compat.was_restarted() else self._open()
            self._opening = asyncio.get_running_loop().create_task(work)
        return self._opening

    async def _open_again(self) -> Answer:
        """The same for a pool that is there: without shares its workers open no connections, so it is tried until it
        succeeds."""
        while True:
            try:
                return await self._open()
            except Exception:
                logger.exception("pool %s: its workers cannot be taken over yet", self._name)
                await asyncio.sleep(BEGIN_AGAIN)

    async def _open(self) -> Answer:
        try:
            check_workers(self._config)
        except RaypgError as error:
            return "error", pack_error(error)
        workers = self._workers
        workers.find()
        breaker = cluster.find_or_start_breaker()  # its process starts beside those of the workers
        cluster.find_or_start_metrics()
        if _compat.was_restarted():
            await self._arrange()
            await workers.appear(tuple(workers.members.values()), PING_EVERY)
            await workers.round()  # the rest is done beside the pings: it takes what may have to be lent by a worker
        elif (failure := await self._start()) is not None:
            return failure
        workers.keeps = True
        loop = asyncio.get_running_loop()
        self._keepers = [loop.create_task(self._keep()), loop.create_task(self._look_after_connections())]
        with contextlib.suppress(Exception):  # the pool works without it, but nobody could look at it
            await asyncio.wait_for(breaker.status.remote(self._name), BREAKER_WITHIN)
        return "ok", None

    async def _start(self) -> Answer | None:
        """Start workers and first connections; the error if there are none."""
        workers = self._workers
        asking = asyncio.ensure_future(self._ask_limits())
        await self._arrange()
        if not await workers.appear(tuple(workers.members.values()), START_TIMEOUT):
            asking.cancel()
            return "error", pack_error(
                UnavailableError(
                    f"no worker of pool {self._name!r} started within {START_TIMEOUT:g} s; see `ray list actors`"
                )
            )
        await self._unfreeze(final=not await asking)
        await workers.round()
        return await self._warm_up()

    async def _warm_up(self) -> Answer | None:
        """Open the first connections; the error if no worker can open any."""
        least = self._config.min_connections if self._config.pre_warm else 1
        shares = [self._workers.share(member) for member in self._workers.members.values()]
        part = {
            member.handle: max(1, sizing.share(least, self._workers.share(member), sum(shares)))
            for member in self._workers.members.values()
        }
        warm = await self._workers.tell(lambda handle: handle.warm_up.remote(part[handle]), START_TIMEOUT)
        failures = [("error", pack_error(a)) if isinstance(a, BaseException) else a for a in warm]
        return failures[0] if all(kind == "error" for kind, _ in failures) else None

    async def _ask_limits(self) -> bool:
        """Ask the server what it has room for, and lower the cap to it; whether it could be asked."""
        self._asked_at = time.monotonic()
        self._limits_known = False
        try:
            found = await self._reaper.limits()
            self._limits_known = True
        except Exception as error:
            logger.warning("pool %s: the server cannot be asked for its limits: %s", self._name, error)
            return False
        if found is None:
            return True  # a pooler has limits of its own
        wanted, before = self._config.max_connections, self._workers.limit
        room = limits.room(found)
        self._workers.limit = room.connections if room.connections < wanted else None
        if self._workers.limit is not None and self._workers.limit != before:
            logger.warning(
                "pool %s: max_connections=%d is more than the server has room for: %s = %d. The pool goes on with %d",
                self._name, wanted, room.why, room.connections, self._workers.cap,
            )  # fmt: skip
        return True

    async def _unfreeze(self, final: bool = False) -> None:
        """Grant shares from now on, if it is known what connections there are: every worker of before has answered, and
        those of workers that nobody knows of have ended.

        Args:
            final: do so although the server cannot be asked; those of before are looked for when it can.
        """
        workers = self._workers
        if self._swept or any(not member.node for member in workers.members.values()):
            return
        if not final:
            try:
                await self._reaper.sweep(workers.living)
            except Exception as error:
                logger.warning("pool %s: cannot look for connections of workers of before: %s", self._name, error)
                return
            self._swept = True
        if workers.frozen:
            workers.frozen = False
            workers.changed()

    async def _arrange(self) -> list[Member]:
        """Bring workers and nodes together; those that were started."""
        self._arranged_at = time.monotonic()
        here = ray.get_runtime_context().get_node_id()
        self._nodes = await asyncio.to_thread(_compat.nodes, here, self._config.node_labels)
        return self._workers.arrange(self._nodes)

    # --- keeping ---

    async def _keep(self) -> None:
        while True:
            started = time.monotonic()
            self._workers.news.clear()
            try:
                if started - self._arranged_at >= ARRANGE_EVERY:
                    await self._arrange()
                await self._workers.round()
            except Exception:
                logger.exception("pool %s: internal error", self._name)
            await asyncio.sleep(LEAST_PAUSE)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._workers.news.wait(), max(0.0, started + PING_EVERY - time.monotonic()))

    async def _look_after_connections(self) -> None:
        """What takes the server's answer, which may take long: never in the way of the pings."""
        while True:
            try:
                frozen = self._workers.frozen
                wanted = self._workers.limit is not None or not self._limits_known
                if wanted and (frozen or time.monotonic() - self._asked_at > LIMITS_EVERY):
                    await self._ask_limits()
                if frozen or self._limits_known:
                    await self._unfreeze()
                await self._confirm_gone()
                await self._reaper.rest()
            except Exception:
                logger.exception("pool %s: internal error", self._name)
            await asyncio.sleep(PING_EVERY)

    async def _confirm_gone(self) -> None:
        members = tuple(self._workers.members.values())
        if doubtful := [backend for member in members for backend in member.unconfirmed]:
            gone = await self._reaper.gone(doubtful)
            for member in members:
                member.gone = [backend for backend in member.unconfirmed if backend in gone]

    # --- small things ---

    async def _take_password(self, asked: PoolConfig) -> None:
        source = asked.password_source
        if source == self._config.password_source or source.kind == "none":
            return
        self._use(self._config.with_password_source(source))
        await self._push_config()

    def _use(self, config: PoolConfig) -> None:
        self._config = config
        for connector in self._connectors:
            connector.config = config

    def _public_config(self) -> dict[str, Any]:
        return {key: value for key, value in self._config.to_dict().items() if key != "password"}

    def _membership(self) -> dict[str, Any]:
        return {
            "epoch": self._workers.epoch,
            "closed": self._closed.args[0] if self._closed else None,
            "workers": self._workers.places(),
        }
