"""One replica of a pool, as one worker sees it: its connections there, its breaker for it, and what is known of it."""

from __future__ import annotations

import logging
import random
from typing import Any

import asyncpg

from raypg.config import PoolConfig
from raypg.core.backoff import Backoff
from raypg.core.replicas import UNASKED, Candidate, PrimaryLog, Role, Service, Standing, judge
from raypg.errors import CircuitBreakerError, ConnectError
from raypg.portable import pack_error
from raypg.server.connect import Connector
from raypg.server.engine import Engine
from raypg.server.figures import Figures
from raypg.server.observer import Observer
from raypg.server.routed import RoutedRead

logger = logging.getLogger(__name__)


NOT_AGAIN_FOR = (0.2, 2.0)
"""Seconds for which nobody waits for a replica that somebody has waited for in vain: at first, and in the end."""


class Replica:
    """One replica.

    Its breaker is this worker's alone, and no actor makes the workers agree, as for the primary's. They need not:
    whoever sends no reads there loses nothing, since others answer them, and the way to a replica may be cut for one
    worker and not for the next. Each finds out for itself, four times a second, whether it answers; and what all of
    them think is in the pool's status (:func:`raypg.replica_status.replicas_of`).

    Args:
        number: its place in the pool's ``replicas``.
        application_name: identity of the worker's connections.
        figures: the worker's.
        primary: how far the primary has come.
    """

    def __init__(
        self, number: int, config: PoolConfig, application_name: str, figures: Figures, primary: PrimaryLog
    ) -> None:
        target = config.replicas[number]
        self.number = number
        self.standing = Standing(",".join(target.addresses))
        self.service = Service()
        self.turn = 0
        connector = Connector(config, application_name, number)
        self.engine = Engine(config, connector, figures)
        self.observer = Observer(self.engine, f"replica {target}", self._take, self._failed)
        connector.on_open = self._look
        self._pool = config.name
        self._primary = primary
        self._role: Role | None = None
        self._answered_at = 0.0
        self._generation = 0
        self._late_until = 0.0
        self._patience = Backoff(*NOT_AGAIN_FOR)
        self.hangs = False
        """Whether it was given up because it did not answer."""
        self.engine.connections.least = 1

    # --- what is known of it ---

    def _take(self, asked_at: float, role: Role) -> None:
        standing, before = self.standing, self._role
        if before is not None and role.life == before.life and asked_at < self._answered_at:
            role = role._replace(lsn=max(role.lsn, before.lsn))  # both questions were under way at the same time
        if before is None or before.life != role.life or role.lsn < before.lsn:
            # Another process, or the same after a crash, may show less than the one before: whoever was promised more
            # must not be answered here.
            self._generation += 1
            standing.name = f"{self.number}.{role.life}.{self._generation}"
            if before is not None:
                self.evacuate("it was restarted")
        self._role, self._answered_at = role, self.engine.now()
        self.hangs = False
        standing.timeline, standing.replayed, standing.age, standing.at = role.timeline, role.lsn, role.age, asked_at
        self.judge()

    async def _look(self, raw: asyncpg.Connection) -> None:
        await self.observer.look(raw)

    def judge(self) -> None:
        """Find out what it is to us, now that more is known of it or of the primary."""
        if self._role is not None:
            self.standing.kind, problem = judge(self._role, self._primary)
            self._note(problem)

    def _failed(self, error: BaseException, hangs: bool) -> None:
        self.standing.kind = "unknown"
        self._note(error.reason if isinstance(error, CircuitBreakerError) else str(error) or type(error).__name__)
        self.evacuate("it does not answer")
        if hangs:
            # What runs there only reads, and may run elsewhere. It is given up, not cancelled: nobody would answer.
            self.hangs = True
            for connection in self.engine.connections:
                if connection.busy:
                    connection.abandon()

    def _note(self, problem: str) -> None:
        before, self.standing.problem = self.standing.problem, problem
        if problem and before in ("", UNASKED):
            logger.warning(
                "pool %s goes on without replica %s: %s", self._pool, self.standing.address, problem.rstrip(".")
            )
        elif before and not problem:
            logger.info("pool %s: replica %s is used", self._pool, self.standing.address)

    def evacuate(self, why: str) -> None:
        """No read that waits here is to run here."""
        engine = self.engine
        error = pack_error(ConnectError(f"replica {self.standing.address}: {why}"))
        for work in engine.queue.drain():
            if isinstance(work, RoutedRead):
                work.fail(error)
            else:
                engine.put_first(work)

    # --- choosing it ---

    @property
    def usable(self) -> bool:
        """Whether reads may be sent there."""
        return not self._why_not()

    def _why_not(self) -> str:
        if self.standing.problem:
            return self.standing.problem
        if self.engine.guard.refusing:
            return "its circuit breaker is open"
        return "" if self.engine.connections.total else "it has no connection yet, or no more"

    @property
    def is_worth_waiting_for(self) -> bool:
        """Whether nobody has waited in vain lately for it to replay something."""
        return self.engine.now() >= self._late_until

    def was_late(self) -> None:
        """Somebody has waited in vain for it to replay something."""
        now = self.engine.now()
        if now >= self._late_until:  # else several have, at the same time
            self._late_until = now + self._patience.next(random.random())

    def was_in_time(self) -> None:
        """It has replayed something in time that somebody waited for."""
        self._patience.reset()

    def candidate(self, connections: int, extra: float) -> Candidate:
        """How soon it would answer, with as many connections as each replica can have when all are asked as much."""
        engine = self.engine
        service = self.service.expected(engine.now())
        return Candidate(service, engine.demand, connections, extra, self.turn)

    def describe(self) -> dict[str, Any]:
        """How it stands, for people."""
        standing, engine = self.standing, self.engine
        return {
            "replica": standing.address,
            "role": standing.kind,
            "healthy": self.usable,
            "problem": self._why_not(),
            "lag_seconds": self._primary.lag(standing),
            "lag_bytes": self._primary.lag_bytes(standing),
            "timeline": standing.timeline or None,
            "budget": engine.connections.budget,
            "total": engine.connections.total,
            "active": engine.connections.total - engine.connections.idle,
            "waiting": len(engine.queue),
            "circuit_breaker": engine.guard.machine.state,
        }
