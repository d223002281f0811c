"""The replicas of a pool, as one worker uses them: reads are sent where they are expected to be answered first.

A worker has connections of its own to each server, primary and replicas, and its share of the pool's connections is
divided among them by demand, so that all together never exceed it. What a read must show (its session's own writes, an
age) is checked against what is known of each replica; where that is not enough, primary and replicas are asked, once
for all who wait; and if no replica has it in time, the primary answers.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import OrderedDict
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from typing import Any

import asyncpg

from raypg.config import PoolConfig
from raypg.core.budget import Budget
from raypg.core.replicas import PrimaryLog, Role, fastest
from raypg.core.seen import NOTHING, PRIMARY, Token
from raypg.errors import ConnectError
from raypg.messages import Where
from raypg.portable import PortableError, pack_error, unpack_error
from raypg.server.connect import Connector
from raypg.server.engine import Engine
from raypg.server.observer import Observer
from raypg.server.replica import Replica
from raypg.server.routed import RoutedRead, is_refusal, may_go_on

logger = logging.getLogger(__name__)

AWAIT = 0.1
"""Seconds, at most, that a read waits for a replica to show what it must; then the primary answers."""

AGAIN = 0.002
"""Seconds between two questions to a replica that somebody waits for."""

ASKING = 0.001
"""Seconds that asking a server is expected to take: a replica that need not be asked is preferred by so much."""

YOUNGEST = 0.01
"""Seconds: younger data than this only the primary has for certain, as asking two servers takes some of them."""

DIVIDE_EVERY = 0.1
"""Seconds between two looks at how the worker's share is divided."""

OBSERVE_EVERY = (0.25, 1.0)
"""Seconds between two questions to each server while reads are sent to replicas, and while none are."""

USED_LATELY = 10.0
"""Seconds after its last read for which replicas count as used."""

MOST_LEARNT = 1000
"""Texts that are remembered because a replica has refused them."""


class Replicas:
    """All replicas of a pool, beside its primary.

    Args:
        primary: the engine of the primary.
        connector: of the primary.
        application_name: identity of the worker's connections.
    """

    def __init__(self, config: PoolConfig, primary: Engine, connector: Connector, application_name: str) -> None:
        self.primary = primary
        self.log = PrimaryLog()
        self.members = [
            Replica(number, config, application_name, primary.figures, self.log)
            for number in range(len(config.replicas))
        ]
        self.observer = Observer(primary, "the primary", self._primary_told, lambda *_: None)
        connector.on_open = self._look_at_primary
        self._budget: Budget[int] = Budget(0)
        for key, _ in enumerate(self.engines):
            self._budget.join(key)
        self._valid_until = 0.0
        self._numbers = itertools.count(1)
        self._turns = itertools.count(1)
        self._used_at = -USED_LATELY
        self._learnt: OrderedDict[int, None] = OrderedDict()
        self._unsettled = 0
        loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[object]] = set()
        self._keepers = [loop.create_task(self._divide_often())]
        self._keepers += [loop.create_task(self._observe(who)) for who in self._observers]

    @property
    def engines(self) -> Iterator[Engine]:
        """Those of all servers, the primary's first."""
        yield self.primary
        for replica in self.members:
            yield replica.engine

    @property
    def _observers(self) -> Iterator[Observer]:
        yield self.observer
        for replica in self.members:
            yield replica.observer

    @property
    def at_rest(self) -> bool:
        """Whether no read is here."""
        quiet = all(r.engine.connections.idle == r.engine.connections.total for r in self.members)
        return quiet and not self._unsettled and not any(len(r.engine.queue) for r in self.members)

    def use(self, config: PoolConfig) -> None:
        """Go on with another configuration of the same pool."""
        for replica in self.members:
            replica.engine.use(config)

    async def close(self, reason: str) -> None:
        """Close the connections to all replicas."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*(replica.engine.close(reason) for replica in self.members))

    # --- the share ---

    @property
    def budget(self) -> int:
        """Connections that the worker may have."""
        return self._budget.cap

    def grant(self, total: int, valid_until: float) -> None:
        """The worker may have *total* connections, to all servers together."""
        self._budget.cap, self._valid_until = total, valid_until
        self._divide()

    def _divide(self) -> None:
        engines, budget = list(self.engines), self._budget
        for _ in range(2):  # to shrink, and to grow by what that has freed
            budget.divide()
            number = next(self._numbers)
            for key, engine in enumerate(engines):
                share = budget.send(key, number)
                before = engine.connections.budget
                engine.connections.grant(share, self._valid_until)
                budget.answered(key, number, engine.connections.slots, max(1, engine.demand))
                if share > before:
                    engine.pump()

    async def _divide_often(self) -> None:
        while True:
            await asyncio.sleep(DIVIDE_EVERY)
            try:
                self._divide()
            except Exception:
                logger.exception("pool %s: internal error in a worker", self.primary.config.name)

    # --- what is known ---

    async def _observe(self, observer: Observer) -> None:
        """Ask one server again and again."""
        busy, idle = OBSERVE_EVERY
        while True:
            engine = observer.engine
            try:
                if engine.connections.budget:
                    await observer.ask()
            except Exception:
                logger.exception("pool %s: internal error in a worker", engine.config.name)
            await asyncio.sleep(busy if engine.now() - self._used_at < USED_LATELY else idle)

    async def _look_at_primary(self, raw: asyncpg.Connection) -> None:
        """Whoever connects to a standby would be refused all writes there."""
        if (await self.observer.look(raw)).recovering:
            where = " or ".join(self.primary.config.target.addresses)
            raise ConnectError(
                f"PostgreSQL at {where} is a standby now, and a pool needs a primary: name all servers that may become "
                "one as hosts of the connection string",
                "connection_refused",
            )

    def _primary_told(self, asked_at: float, role: Role) -> None:
        if role.recovering:
            return
        moved = (self.log.system, self.log.timeline) != (role.system, role.timeline)
        self.log.note(asked_at, role)
        if moved:
            for replica in self.members:
                replica.judge()

    def lags(self) -> dict[str, float]:
        """Address → seconds that it is behind; NaN if that is not known."""
        return {replica.standing.address: self.log.lag(replica.standing) for replica in self.members}

    def describe(self) -> list[dict[str, Any]]:
        """How each replica stands."""
        return [replica.describe() for replica in self.members]

    # --- reads ---

    def take(self, reads: Sequence[RoutedRead], where: Where) -> None:
        """Send reads that are all to show the same to where they are answered."""
        if not reads:
            return
        self._used_at = self.primary.now()
        token = NOTHING if where[1] is None else Token(*where[1])
        for read in reads:
            read.where = where
            read.told(self._outcome)
        refused = hash(reads[0].sql) in self._learnt
        too_young = where[0] is not None and where[0] < YOUNGEST
        if refused or too_young or self.primary.guard.machine.forced:
            self._to_primary(reads, token, refused)
            return
        avoided = where[2] if len(where) == 3 else ()
        replica = self._choose(where[0], token, avoided)
        if replica is None:
            self._to_primary(reads, token)
        elif self._shows(replica, where[0], token):
            self._send(reads, replica, token)
        else:
            self._unsettled += 1
            self._background(self._settle(reads, where[0], token, avoided))

    def _background(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _shows(self, replica: Replica, max_staleness: float | None, token: Token) -> bool:
        """Whether it is known that *replica* shows what is asked for."""
        standing = replica.standing
        if max_staleness is not None and self.log.staleness(standing.replayed, self.primary.now()) > max_staleness:
            return False
        return token.shown_by(standing.name, standing.timeline, standing.replayed)

    @property
    def _each(self) -> int:
        """Connections that each replica can have when all are asked as much, and the primary little."""
        return max(1, (self._budget.cap - 1) // len(self.members))

    def _choose(
        self, max_staleness: float | None, token: Token, avoided: Sequence[str] = (), *, known: bool = False
    ) -> Replica | None:
        """The replica that is expected to have answered first; with *known* only one that shows what is asked for. One
        of *avoided* only if no other will do."""
        candidates = []
        for replica in self.members:
            if not replica.usable:
                continue
            extra = 0.0
            if not self._shows(replica, max_staleness, token):
                if known or not replica.is_worth_waiting_for:
                    continue
                extra = ASKING
            candidates.append((replica, replica.candidate(self._each, extra)))
        if avoided:
            candidates = [one for one in candidates if one[0].standing.address not in avoided] or candidates
        return fastest(candidates)

    def _send(self, reads: Iterable[RoutedRead], replica: Replica, token: Token) -> None:
        replica.turn = next(self._turns)
        engine = replica.engine
        note = (replica.standing.address, False, token.having_seen(replica.standing.name).plain)
        now, load = engine.now(), 1 + engine.demand / max(1, engine.connections.budget)
        for read in reads:
            read.home, read.replica, read.note, read.sent_at, read.load = engine, replica, note, now, load
            read.tries += 1
            engine.enqueue(read.client.job, read, cost=1.0)
        engine.pump()

    def _to_primary(self, reads: Iterable[RoutedRead], token: Token, refused: bool = False) -> None:
        note = ("", refused, token.having_seen(PRIMARY).plain)
        for read in reads:
            read.home, read.replica, read.note = self.primary, None, note
            self.primary.enqueue(read.client.job, read, cost=1.0)
        self.primary.pump()

    async def _settle(
        self, reads: Sequence[RoutedRead], max_staleness: float | None, token: Token, avoided: Sequence[str]
    ) -> None:
        """Find out which replica shows what is asked for, and wait for it for a moment."""
        replica: Replica | None = None
        asked: list[Replica] = []
        try:
            async with asyncio.timeout(AWAIT):
                token = await self._place(max_staleness, token)
                while (replica := self._choose(max_staleness, token, avoided, known=True)) is None:
                    asked = [member for member in self.members if member.usable and member.is_worth_waiting_for]
                    if not asked:
                        break
                    # Whoever answers first may show it, and it is not known who will.
                    questions = [asyncio.ensure_future(member.observer.ask()) for member in asked]
                    await asyncio.wait(questions, return_when=asyncio.FIRST_COMPLETED)
                    if not any(self._shows(member, max_staleness, token) for member in asked):
                        await asyncio.sleep(AGAIN)
        except TimeoutError:
            for member in asked:
                member.was_late()
        except Exception:
            logger.exception("pool %s: internal error in a worker", self.primary.config.name)
        finally:
            self._unsettled -= 1
            if self.primary.closed is not None:
                for read in reads:
                    read.fail(pack_error(self.primary.closed))
            elif replica is None:
                self._to_primary(reads, token)
            else:
                if asked:
                    replica.was_in_time()
                self._send(reads, replica, token)

    async def _place(self, max_staleness: float | None, token: Token) -> Token:
        """The same token with what was seen of servers turned into a place in the log. A replica shows no more than the
        primary, so the primary's word will do for any of them."""
        names = {replica.standing.name: replica for replica in self.members if replica.usable}
        ask_primary = any(name not in names for name in token.seen)
        if token.lsn and token.timeline != self.log.timeline:
            ask_primary = True
        if max_staleness is not None:
            ask_primary = True
        if ask_primary:
            role = await self.observer.ask()
            if role is None or role.recovering:
                raise TimeoutError
            lsn = max(token.lsn, role.lsn) if token.timeline == role.timeline else role.lsn
            return Token(role.timeline, lsn)
        place = token._replace(seen=())
        roles = await asyncio.gather(*(names[name].observer.ask() for name in token.seen))
        for name, role in zip(token.seen, roles, strict=True):
            if role is None or names[name].standing.name != name:
                return await self._place(max_staleness, token.having_seen(PRIMARY))
            place = place.joined(Token(role.timeline, role.lsn))
        return await self._place(max_staleness, place) if place.seen else place

    def _outcome(self, read: RoutedRead, error: PortableError | None) -> bool:
        """A read has come to an end on some server; whether that is what its caller is to have."""
        replica, now = read.replica, self.primary.now()
        if replica is None or read.cancelled:
            return True
        if error is None:
            replica.service.note((now - read.sent_at) / read.load, now)
            self.primary.figures.replica_reads += 1
            return True
        refused = is_refusal(error)
        if not refused and not may_go_on(error, replica.hangs):
            return True
        if now >= read.deadline or (read.expires_at is not None and now >= read.expires_at):
            self.primary.figures.refused(unpack_error(error))
            return True  # its caller has waited for long enough
        self._background(replica.observer.ask())  # it may be another one now
        token = NOTHING if read.where[1] is None else Token(*read.where[1])
        read.retried, read.alone = False, True
        if refused:
            self._learn(read.sql)
        other = None if refused or read.tries >= len(self.members) else self._choose(read.where[0], token, known=True)
        if other is None or other is replica:
            self._to_primary((read,), token, refused)
        else:
            self._send((read,), other, token)
        return False

    def _learn(self, sql: str) -> None:
        """A replica has refused *sql*; once is enough."""
        self._learnt[hash(sql)] = None
        if len(self._learnt) > MOST_LEARNT:
            self._learnt.popitem(last=False)
