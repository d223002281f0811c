"""Pool: the actor that a pool *is* for the cluster. It knows the workers, divides the budget, and carries no statement.

Its messages:

- ``hello``: a handle says who it is and what it wants; the answer is the pool's membership, or why not.
- ``membership``: where the workers are now.
- ``status``, ``reconfigure``, ``close``.

Once a second it pings its workers. A ping grants the worker its budget and brings back how it stands; a worker whose
process is new is granted nothing until the backends of its predecessor are gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from raypg import _compat, cluster, naming
from raypg.actors.worker import Answer, PoolWorker, application_name
from raypg.config import PoolConfig
from raypg.core import sizing
from raypg.errors import ConfigError, PoolClosedError, PoolConflictError, PoolVersionError, RaypgError, UnavailableError
from raypg.messages import hello
from raypg.portable import pack_error
from raypg.server.connect import Connector
from raypg.server.control import Control

logger = logging.getLogger(__name__)

START_TIMEOUT = 60.0
"""Seconds in which a worker's process must have started."""

PING_EVERY = 1.0
"""Seconds between pings; also the longest a ping may take."""

BREAKER_WITHIN = 5.0
"""Seconds that a start waits for the Breaker to have heard of the workers."""

LOST_AFTER = 4
"""Pings in a row that a worker may miss before it counts as lost."""

FIXED = frozenset({"workers", "pooler", "codecs", "statement_cache_size", "server_settings", "application_name"})
"""Settings that connections are opened with, or that decide how many workers there are."""

CONTROL_NEEDS = 4
"""From this cap on, one connection of it is kept for control; below, control borrows one when it needs it."""

REAP_TIMEOUT = 10.0
"""Seconds to wait for the backends of a dead worker to disappear before trying again."""

SELF_REAPING = 2.0
"""Seconds after which the backends of a dead process have noticed its death by themselves, where control has no
connection of its own to look: four times ``client_connection_check_interval``."""


@dataclass
class Member:
    """A worker, as the Pool actor knows it."""

    index: int
    name: str
    node: str
    handle: ActorHandle[Any]
    budget: int = 0
    incarnation: str | None = None
    missed: int = 0
    reaping: asyncio.Task[None] | None = None
    unconfirmed: list[int] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)

    @property
    def granted(self) -> int:
        """The budget this worker may use now."""
        return 0 if self.incarnation is None or self.reaping is not None else self.budget


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
        self._epoch = 1
        self._members: list[Member] = []
        self._opening: asyncio.Task[Answer] | None = None
        self._closed: PoolClosedError | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._doubtful_since = math.inf
        changed = _compat.kv_get(self._key)
        if changed is not None and _compat.was_restarted():
            self._config = self._config.changed(**json.loads(changed))
        control = application_name(self._cluster, name, "control", secrets.token_hex(4))
        self._connector = Connector(self._config, control)
        self._control = Control(self._connector)
        self._warn_of_runtime_env()
        if _compat.was_restarted():
            self._begin()  # the workers have outlived us: find them again, without being asked

    def __repr__(self) -> str:
        return f"Pool({getattr(self, '_name', '?')})"

    @property
    def _key(self) -> str:
        return f"pool/{self._name}"

    def _warn_of_runtime_env(self) -> None:
        environment = dict(ray.get_runtime_context().runtime_env)
        inherited = [
            key for key in ("working_dir", "py_modules", "env_vars", "pip", "conda", "uv") if environment.get(key)
        ]
        if inherited:
            logger.warning(
                "pool %s inherits %s of the job that made it, and outlives that job: make pools that are shared "
                "between jobs with `raypg up`, or from a job without a runtime_env",
                self._name,
                ", ".join(inherited),
            )

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

    async def status(self) -> Answer:
        """Figures of all workers."""
        if self._closed is not None:
            return "error", pack_error(self._closed)
        answers = await asyncio.gather(
            *(asyncio.wait_for(member.handle.status.remote(), 2.0) for member in self._members),
            return_exceptions=True,
        )
        return "ok", {
            "pool_name": self._name,
            "max_connections": self._config.max_connections,
            "min_connections": self._config.min_connections,
            "workers": [
                {
                    "index": member.index,
                    "node": member.node,
                    "budget": member.granted,
                    "reachable": not isinstance(answer, BaseException),
                    "figures": None if isinstance(answer, BaseException) else answer,
                }
                for member, answer in zip(self._members, answers, strict=True)
            ],
        }

    async def reconfigure(self, changes: dict[str, Any]) -> Answer:
        """Change settings of the running pool: a smaller cap as connections come back, a larger one at once."""
        if self._closed is not None:
            return "error", pack_error(self._closed)
        previous = self._config.max_connections
        try:
            for key in changes:
                if key in FIXED:
                    raise ConfigError(f"{key} cannot be changed in a running pool: end it and start it anew")
            config = self._config.changed(**changes)
            shares = self._divide(config.max_connections, len(self._members))
        except RaypgError as error:
            return "error", pack_error(error)
        self._config = self._connector.config = config
        stored = json.loads(_compat.kv_get(self._key) or b"{}")
        _compat.kv_put(self._key, json.dumps({**stored, **changes}).encode())  # tunables only: no secret among them
        await self._push_config()
        await self._assign(shares)
        return "ok", {"previous_size": previous, "new_size": config.max_connections}

    async def _push_config(self) -> None:
        config = self._config.to_dict()
        await asyncio.gather(
            *(asyncio.wait_for(m.handle.use.remote(config), PING_EVERY * LOST_AFTER) for m in self._members),
            return_exceptions=True,
        )

    async def close(self, reason: str) -> None:
        """End the pool: callers get :class:`PoolClosedError` with *reason*; connections are closed, actors end."""
        if self._closed is None:
            self._closed = PoolClosedError(reason)
            if self._keeper is not None:
                self._keeper.cancel()
            handles = [member.handle for member in self._members]
            await asyncio.gather(
                *(asyncio.wait_for(handle.close.remote(reason), 10.0) for handle in handles), return_exceptions=True
            )
            await self._control.close()
            for handle in handles:
                ray.kill(handle)
            for serving_all in (cluster.find_breaker(), cluster.find_metrics()):
                if serving_all is not None:
                    with contextlib.suppress(RayActorError, TimeoutError):
                        await asyncio.wait_for(serving_all.forget.remote(self._name), PING_EVERY)
                    serving_all.rest.remote()
            _compat.kv_delete(naming.metrics_key(self._name))
            _compat.kv_delete(self._key)

    # --- starting ---

    def _begin(self) -> asyncio.Task[Answer]:
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_task(self._open())
        return self._opening

    async def _open(self) -> Answer:
        try:
            nodes = _compat.worker_nodes()
            count = len(nodes) if self._config.workers == "per_node" else int(self._config.workers)
            count = min(count, self._usable(self._config.max_connections))
            shares = self._divide(self._config.max_connections, count)
        except RaypgError as error:
            return "error", pack_error(error)
        breaker = cluster.find_or_start_breaker()  # its process starts beside those of the workers
        cluster.find_or_start_metrics()
        for index in range(count):
            self._members.append(self._start_worker(index, nodes[index % len(nodes)], shares[index]))
        here = await asyncio.gather(*(self._ping(member, timeout=START_TIMEOUT) for member in self._members))
        if not any(here):
            return "error", pack_error(
                UnavailableError(
                    f"no worker of pool {self._name!r} started within {START_TIMEOUT:g} s; see `ray list actors`"
                )
            )
        await asyncio.gather(*(self._ping(member) for member in self._members))  # grants the budgets
        least = self._config.min_connections if self._config.pre_warm else 1
        warm = await asyncio.gather(
            *(m.handle.warm_up.remote(max(1, sizing.share(least, m.budget, sum(shares)))) for m in self._members),
            return_exceptions=True,
        )
        failures = [("error", pack_error(a)) if isinstance(a, BaseException) else a for a in warm]
        if all(kind == "error" for kind, _ in failures):
            return failures[0]
        self._keeper = asyncio.get_running_loop().create_task(self._keep())
        with contextlib.suppress(RayActorError, TimeoutError):  # the pool works without it, but nobody could look at it
            await asyncio.wait_for(breaker.status.remote(self._name), BREAKER_WITHIN)
        return "ok", None

    def _start_worker(self, index: int, node: str, budget: int) -> Member:
        name = naming.worker_actor(self._name, index)
        handle = (
            ray.remote(PoolWorker)
            .options(
                name=name,
                namespace=naming.NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,  # a pool must start even while tasks hold every CPU and wait for it
                label_selector={"ray.io/node-id": node},
                max_restarts=-1,
                max_task_retries=0,  # a statement must not run twice
                max_concurrency=10_000,  # a caller waits for its answer in a call
            )
            .remote(self._name, index, self._cluster, self._config.to_dict())
        )
        return Member(index, name, node, handle, budget)

    def _usable(self, cap: int) -> int:
        return cap - 1 if cap >= CONTROL_NEEDS else cap

    def _divide(self, cap: int, workers: int) -> list[int]:
        try:
            return sizing.divide(cap, workers, CONTROL_NEEDS)
        except ValueError as error:
            raise ConfigError(f"max_connections={cap}: {error}") from error

    # --- keeping ---

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(PING_EVERY)
            await asyncio.gather(*(self._ping(member) for member in self._members))
            await self._confirm_gone()
            await self._control.rest(time.monotonic())

    async def _ping(self, member: Member, timeout: float = PING_EVERY) -> bool:
        gone, member.gone = member.gone, []
        try:
            # None before the first are opened: whether that works, `warm_up` is to find out.
            kept = self._config.min_connections if self._keeper is not None else 0
            least = sizing.share(kept, member.granted, sum(m.budget for m in self._members))
            ping = member.handle.ping.remote(self._epoch, member.granted, least, gone, len(self._members))
            state = await asyncio.wait_for(ping, timeout)
        except (RayActorError, TimeoutError):
            member.gone += gone
            member.missed += 1
            if member.missed == LOST_AFTER:
                logger.warning("pool %s: worker %d does not answer", self._name, member.index)
                self._epoch += 1
            return False
        if member.missed >= LOST_AFTER:
            self._epoch += 1
        member.missed = 0
        member.unconfirmed = state["unconfirmed"]
        if state["incarnation"] != member.incarnation:
            self._replaced(member, state["incarnation"])
        return True

    def _replaced(self, member: Member, incarnation: str) -> None:
        """The worker's process is a new one. Its share is free only when its predecessor's backends are gone."""
        predecessor, member.incarnation = member.incarnation, incarnation
        self._epoch += 1
        if predecessor is not None:
            name = application_name(self._cluster, self._name, str(member.index), predecessor)
            member.reaping = asyncio.get_running_loop().create_task(self._reap(member, name))

    async def _reap(self, member: Member, name: str) -> None:
        loop = asyncio.get_running_loop()
        if self._config.max_connections < CONTROL_NEEDS:
            # No slot is kept for us: let the backends notice by themselves before one more connection is opened.
            await asyncio.sleep(SELF_REAPING)
        failed_at: float | None = None
        while True:
            try:
                left = await self._control.end_backends(name, REAP_TIMEOUT)
            except Exception as error:
                # The database cannot be asked. If it is down, the backends are gone with it; look again soon.
                if failed_at is None:
                    failed_at = loop.time()
                    logger.warning("pool %s: cannot look for backends of a dead worker: %s", self._name, error)
                await asyncio.sleep(0.5)
                continue
            if left == 0:
                break
        if self._config.max_connections < CONTROL_NEEDS:
            await self._control.close()
        member.reaping = None
        await self._ping(member)

    async def _confirm_gone(self) -> None:
        doubtful = [pid for member in self._members for pid in member.unconfirmed]
        now = time.monotonic()
        self._doubtful_since = min(self._doubtful_since, now) if doubtful else math.inf
        # Below CONTROL_NEEDS a look takes one connection more: only when those given up have had time to go.
        borrowed = self._config.max_connections < CONTROL_NEEDS
        if not doubtful or (borrowed and now - self._doubtful_since < SELF_REAPING):
            return
        try:
            gone = set(await self._control.gone(doubtful))
        except Exception as error:
            logger.debug("pool %s: control connection failed: %s", self._name, error)
            return
        if borrowed:
            await self._control.close()
        for member in self._members:
            member.gone = [pid for pid in member.unconfirmed if pid in gone]

    async def _assign(self, shares: list[int]) -> None:
        """Give the workers their new shares: first to those who shrink, then to those who grow."""
        self._epoch += 1
        growing = [(m, share) for m, share in zip(self._members, shares, strict=True) if share > m.budget]
        for member, share in zip(self._members, shares, strict=True):
            member.budget = min(member.budget, share)
        await asyncio.gather(*(self._ping(member) for member in self._members))
        for member, share in growing:
            member.budget = share
        await asyncio.gather(*(self._ping(member) for member, _ in growing))

    # --- small things ---

    async def _take_password(self, asked: PoolConfig) -> None:
        source = asked.password_source
        if source == self._config.password_source or source.kind == "none":
            return
        self._config = self._connector.config = self._config.with_password_source(source)
        await self._push_config()

    def _public_config(self) -> dict[str, Any]:
        config = self._config.to_dict()
        config.pop("password", None)
        return config

    def _membership(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "closed": self._closed.args[0] if self._closed else None,
            "workers": [
                (member.index, member.name, member.node, member.budget, member.incarnation)
                for member in self._members
                if member.missed < LOST_AFTER
            ],
        }
