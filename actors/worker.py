"""PoolWorker: the actor that owns connections and runs statements on them.

It uses no Ray concurrency groups: each has an event loop of its own, and a connection belongs to one loop.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import secrets
from collections.abc import Awaitable
from typing import Any

import ray
from ray.exceptions import OwnerDiedError, TaskCancelledError

from raypg import messages
from raypg.actors.authority_line import AuthorityLine
from raypg.actors.breaker_line import BreakerLine
from raypg.actors.metrics_line import MetricsLine
from raypg.config import PoolConfig
from raypg.core.pool_metrics import Delta
from raypg.core.quorum import Order
from raypg.packing import packed
from raypg.portable import pack_error
from raypg.server import (
    commits,
    copying,
    cursors,
    ending,
    errand,
    freed_memory,
    planning,
    tokens,
    worker_status,
)
from raypg.server.chunk import ChunkRequest, ChunkRun
from raypg.server.connect import Connector
from raypg.server.connection import STEP
from raypg.server.connection_set import VALID
from raypg.server.describe import describe
from raypg.server.engine import Engine
from raypg.server.replicas import Replicas
from raypg.server.work import Refused

Answer = tuple[str, Any]
"""("ok", value) or ("error", packed error): outcomes are values, so that the caller's process raises them."""


def application_name(cluster: str, pool: str, worker: str, incarnation: str) -> str:
    """The ``application_name`` under which PostgreSQL shows the connections of one incarnation of one worker.

    It is what raypg counts and reaps by, so it is unique to the Ray cluster (two may use one database and one pool
    name) and to the life of the process; and it fits the 63 bytes that PostgreSQL keeps.
    """
    return f"{application_prefix(cluster, pool)}{worker}:{incarnation}"


def application_prefix(cluster: str, pool: str) -> str:
    """What the ``application_name`` of every connection of a pool begins with."""
    return f"raypg:{hashlib.sha256(f'{cluster}/{pool}'.encode()).hexdigest()[:8]}:"


class PoolWorker:
    """One worker of one pool.

    Args:
        pool: name of the pool.
        index: number of this worker within it.
        cluster: id of the Ray cluster.
        config: the pool's configuration, as :meth:`PoolConfig.to_dict` gave it. Ray hands the same again to a
            restarted worker.
    """

    def __init__(self, pool: str, index: int, cluster: str, config: dict[str, Any]) -> None:
        self._pool = pool
        self._index = index
        self._incarnation = secrets.token_hex(4)
        settings = PoolConfig.from_dict(config)
        name = application_name(cluster, pool, str(index), self._incarnation)
        self._connector = Connector(settings, name)
        # The budget is 0 until the Pool actor grants one: a restarted worker must not connect before the backends of
        # its predecessor are gone.
        self._engine = Engine(settings, self._connector)
        if settings.replicas:
            self._engine.replicas = Replicas(settings, self._engine, self._connector, name)
        self._breaker = BreakerLine(pool, index, self._incarnation, self._engine.guard)
        self._metrics = MetricsLine(pool, index, self._incarnation, self._engine)
        self._authority = AuthorityLine(pool, index, self._incarnation, self._engine, application_prefix(cluster, pool))
        self._node: str = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        self._intake: Any = None
        self._newest = 0  # number of the newest ping
        self._epoch = 0
        freed_memory.keep()
        # What is alive now (Ray, asyncpg) stays alive: looking through it again and again took 8 % of a busy worker.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)

    def __repr__(self) -> str:
        return f"PoolWorker({getattr(self, '_pool', '?')}/{getattr(self, '_index', '?')})"

    # --- from the Pool actor ---

    async def ping(
        self,
        number: int,
        incarnation: str | None,
        grant: int | None,
        heard: float | None,
        least: int,
        gone: list[tuple[int, int]],
        workers: int,
        epoch: int,
        lost: bool = False,
        era: int = 0,
    ) -> dict[str, Any]:
        """Take a share of the budget, and say how things stand.

        Args:
            number: of this ping; what was sent before one that has arrived already is out of date.
            incarnation: the life of this worker that it is meant for, if one is known. The share of an earlier life is
                not ours: the connections of that one may be there still.
            grant: the share; ``None`` leaves it as it is.
            heard: ``clock`` of our answer that the Pool actor has heard last. The share holds for some seconds from
                then: however late this message comes, it permits nothing that others may have been given meanwhile.
            least: connections to keep open.
            gone: given-up backends that their server does not show any more: (server, process id).
            workers: how many there are.
            epoch: of the membership.
            lost: we were not heard for so long that everybody was told to go elsewhere: nobody knows of our leases.
            era: in which the version authority must be asked before a write; 0 if it need not.
        """
        if lost:
            for lease in self._engine.leases:
                self._engine.leases.end(lease.token, "its worker could not be heard for some seconds")
        self._breaker.keep(workers)
        self._metrics.open()
        self._authority.keep(era, number > self._newest)  # before there is a share: nothing runs without one
        engine, servers = self._engine, self._engine.servers
        for server, each in enumerate(servers):
            each.connections.confirm_gone({pid for place, pid in gone if place == server})
        if number > self._newest:
            self._newest, self._epoch = number, epoch
            engine.connections.least = least
            if grant is not None and incarnation == self._incarnation:
                engine.grant(grant, 0.0 if heard is None else heard + VALID)
        return {
            "incarnation": self._incarnation,
            "node": self._node,
            "newest": self._newest,
            "budget": engine.budget,
            "clock": engine.now(),
            "unconfirmed": [(server, pid) for server, e in enumerate(servers) for pid in e.connections.unconfirmed],
            "used": sum(each.connections.slots for each in servers),
            "open": sum(each.connections.total for each in servers),
            "demand": engine.demand if len(servers) == 1 else sum(max(1, each.demand) for each in servers),
            "draining": self._engine.draining is not None,
        }

    async def drain(self, seconds: float) -> bool:
        """Take no more work; answers when what was begun is over, or was ended after *seconds*: whether it was in
        time."""
        in_time = await ending.drain(self._engine, seconds)
        await self._metrics.leave()
        return in_time

    async def warm_up(self, least: int) -> Answer:
        """Open connections until *least* exist; the error of the first failure if none could be opened."""
        return await _answer(self._engine.connections.warm_up(least))

    async def use(self, config: dict[str, Any]) -> None:
        """Use another configuration from now on; a new password for connections opened from now on."""
        self._engine.use(PoolConfig.from_dict(config))

    async def status(self) -> dict[str, Any]:
        """Figures of this worker; times in milliseconds."""
        return worker_status.status(self._engine)

    async def close(self, reason: str) -> None:
        """Refuse new work, end leases, close connections."""
        self._breaker.close()
        self._authority.close()
        await self._engine.close(reason)
        await self._metrics.leave()

    # --- from the Breaker ---

    async def follow(self, order: tuple[Any, ...]) -> None:
        """Do what the Breaker says."""
        self._engine.guard.follow(Order(*order), self._engine.now())

    # --- from the Metrics ---

    async def metrics(self, incarnation: str, known: int) -> list[Delta]:
        """What happened since delta *known* of this life; nothing if it is another one."""
        return self._metrics.deltas(known) if incarnation == self._incarnation else []

    # --- from handles ---

    @packed
    async def token(self) -> Answer:
        """How far the primary's log has come by now."""
        return await _answer(tokens.current(self._engine))

    async def here(self) -> str:
        """Which life of this worker answers."""
        return self._incarnation

    @packed
    async def run(self, client: str, job: str, number: int, runs: list[messages.Run]) -> messages.Reply:
        """Run a batch of independent statements; see :mod:`raypg.messages`."""
        known = self._engine.client(client, job)
        batch = self._engine.submit(known, number, runs)
        unfinished, parts = await known.first_reply(batch)
        return len(self._engine.queue), unfinished, parts, self._epoch

    @packed
    async def collect(self, client: str, job: str) -> messages.Reply:
        """What finished since the last answer to this client, of batches answered before their end."""
        unfinished, parts = await self._engine.client(client, job).next_reply()
        return len(self._engine.queue), unfinished, parts, self._epoch

    async def cancel(self, client: str, job: str, number: int, position: int) -> None:
        """One caller of a batch has left."""
        self._engine.cancel(self._engine.client(client, job), number, position)

    async def hold(self, client: str) -> None:
        """Does not return before the client leaves. The caller owns the reference to this answer: it fails when the
        caller's process dies, and ``watch`` sees that."""
        await self._engine.held(client)

    async def watch(self, client: str, owned: list[Any]) -> None:
        """Watch over a client that holds leases; *owned* is its ``hold``. Ends what it holds when its process dies.

        Not by heartbeats: a process that holds the GIL for long sends none, and lives. Nor is it watched any longer
        once ``ray.cancel`` of the task in its main thread has cancelled ``hold`` too.
        """
        try:
            await owned[0]
        except (OwnerDiedError, TaskCancelledError):
            self._engine.client_died(client)
        finally:
            self._engine.let_go(client)

    async def leave(self, client: str) -> None:
        """A client has nothing here any more, and its process lives on."""
        self._engine.client_died(client)
        self._engine.let_go(client)

    @packed
    async def acquire(
        self, key: tuple[str, int], job: str, owner: dict[str, Any], timeout: float, seconds: float, begin: str | None
    ) -> Answer:
        """Lease a connection; answers its token and what users see of it. *key* is for :meth:`cancel_acquire`."""
        return await _answer(self._acquire(key, job, owner, timeout, seconds, begin))

    async def _acquire(
        self, key: tuple[str, int], job: str, owner: dict[str, Any], timeout: float, seconds: float, begin: str | None
    ) -> dict[str, Any]:
        lease = await self._engine.acquisitions.lease(key, job, owner, timeout, seconds, begin)
        return {
            "token": lease.token,
            "connection_id": lease.connection.identifier,
            "health_score": lease.connection.health,
            "backend_pid": lease.connection.pid,
        }

    async def cancel_acquire(self, key: tuple[str, int]) -> None:
        """The caller of ``acquire`` has left: it leaves the queue, or what it was granted comes back."""
        self._engine.acquisitions.cancel(key)

    @packed
    async def lease_run(
        self, token: str, number: int, mode: int, sql: str, arguments: Any, timeout: float | None
    ) -> Answer:
        """Run one statement on a leased connection."""
        return await _answer(self._engine.run_leased(token, number, mode, sql, arguments, timeout))

    @packed
    async def lease_prepare(self, token: str, number: int, sql: str, timeout: float | None) -> Answer:
        """What the server says of a statement: the types of its parameters and of its columns."""
        work = functools.partial(describe, sql=sql)
        return await _answer(self._engine.run_leased(token, number, STEP, sql, work, timeout))

    @packed
    async def lease_cursor(
        self, token: str, number: int, cursor: int, step: cursors.Step, timeout: float | None
    ) -> Answer:
        """One step of a cursor on a leased connection; see :func:`raypg.server.cursors.step`."""
        return await _answer(cursors.step(self._engine, token, number, cursor, step, timeout))

    @packed
    async def lease_copy(
        self,
        token: str,
        number: int,
        sql: str,
        arguments: tuple[Any, ...],
        how: tuple[int, int, dict[int, int | None], tuple[str, ...] | None],
        timeout: float | None,
    ) -> Answer:
        """Begin to copy the result of a query on a leased connection; see :func:`raypg.server.copying.begin`."""
        return await _answer(copying.begin(self._engine, token, number, sql, arguments, *how, timeout))

    @packed
    async def lease_piece(self, token: str, number: int, timeout: float | None, again: bool = False) -> Answer:
        """The next piece of it, or the last one *again*; ``None`` at the end."""
        return await _answer(copying.fetch(self._engine, token, timeout, again))

    @packed
    async def lease_copy_end(self, token: str, number: int) -> Answer:
        """End it before its end."""
        return await _answer(copying.stop(self._engine, token))

    @packed
    async def lease_listen(self, token: str, number: int, channel: str, on: bool) -> Answer:
        """Listen to a channel on a leased connection, or do so no longer."""
        return await _answer(self._engine.leases.listen(token, number, channel, on))

    @packed
    async def lease_heard(self, token: str) -> Answer:
        """The notifications since the last answer, as (channel, process id, payload); empty after a second."""
        return await _answer(self._engine.leases.heard(token))

    async def lease_cancel(self, token: str, number: int) -> None:
        """The caller of a statement on a lease has left."""
        self._engine.leases.cancel(token, number)

    @packed
    async def release(self, token: str, last: str | None = None, forgotten: bool = False) -> Answer:
        """End a lease, after running *last* on it (COMMIT or ROLLBACK), whatever comes of that."""
        return await _answer(self._engine.release(token, last, forgotten))

    @packed
    async def chunk(
        self,
        job: str,
        runs: list[ChunkRun],
        how: tuple[Any, ...],
        token: str | None,
        place: tuple[str, int, bool] | None = None,
    ) -> Answer:
        """Run a chunk of a pipeline, on any connection or (*token*) inside a leased transaction. *place* is its place
        in the order of its pipeline, see :meth:`raypg.server.streams.Streams.turn`."""
        return await _answer(ChunkRequest.run(self._engine, job, runs, how, token, place))

    @packed
    async def write(self, job: str, spec: tuple[Any, ...], data: list[Any]) -> Answer:
        """Write a batch of Arrow data; *data* holds the reference to it. See :mod:`raypg.server.writing`."""
        from raypg.actors import arrow_batches  # pyarrow is big, and most pools never write that way

        if self._intake is None:
            self._intake = arrow_batches.Intake(self._engine)
        return await _answer(arrow_batches.write(self._intake, job, spec, data[0]))

    @packed
    async def explain(self, job: str, runs: list[tuple[str, int]], how: tuple[Any, ...]) -> Answer:
        """How a pipeline would run these; see :func:`raypg.server.planning.explain`."""
        work = functools.partial(planning.explain, self._engine, runs=runs, how=how)
        return await _answer(errand.run(self._engine, job, work))

    @packed
    async def before_commit(self, token: str, pipeline: str, batch: str) -> Answer:
        """What must be known before a leased transaction commits, to find out afterwards whether it did."""
        return await _answer(commits.before(self._engine, token, pipeline, batch))

    @packed
    async def fate(self, job: str, known: dict[str, Any]) -> Answer:
        """What became of a transaction whose COMMIT got no answer; see :func:`raypg.server.commits.fate`."""
        return await _answer(commits.fate(self._engine, job, known))


async def _answer(work: Awaitable[Any]) -> Answer:
    try:
        return "ok", await work
    except Refused as refused:
        return "error", refused.packed
    except Exception as error:
        return "error", pack_error(error)
