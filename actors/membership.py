"""The workers of one pool, as its Pool actor keeps them: started, pinged, granted their shares, drained, replaced.

Each ping grants a share and brings back how the worker stands. Who must have how much is decided by
:mod:`raypg.core.budget`, where workers belong by :mod:`raypg.core.placement`. What is known here of time:

- A share holds for ``VALID`` seconds from the worker's own last answer, so a worker that cannot be heard opens no more
  connections, whatever old messages it may still find in its mailbox.
- After ``LOST_AFTER`` seconds of silence it is lost: handles are told, and go elsewhere.
- After ``REAP_AFTER`` seconds, or as soon as its process is known to be dead, its connections are ended on the server,
  and only when they are gone is its share given to others.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import ray
from ray.actor import ActorHandle

from raypg import _compat, naming
from raypg.actors.authority import VersionAuthority
from raypg.actors.authority_line import life_of
from raypg.actors.member import Life, Member
from raypg.actors.reaper import Reaper
from raypg.actors.worker import PoolWorker, application_name
from raypg.config import PoolConfig
from raypg.core import placement, sizing
from raypg.core.budget import Budget
from raypg.errors import ConfigError, UnavailableError
from raypg.messages import Place

logger = logging.getLogger(__name__)

START_TIMEOUT = 60.0
"""Seconds in which a worker's process must have started."""

PING_WITHIN = 1.0
"""Seconds that a round of pings waits for its answers. Those that come later count, too."""

PAUSE = 0.05
"""Seconds between two pings to a worker that starts, at least."""

MOST_UNANSWERED = 5
"""Pings to one worker without an answer, after which it is sent no more: they would pile up in its mailbox."""

LOST_AFTER = 4.0
"""Seconds without an answer after which a worker is lost."""

REAP_AFTER = 6.0
"""Seconds without an answer after which its connections are ended. Longer than a share holds."""

LINGER = 4.0
"""Seconds that a drained worker stays at least, to refuse what is still sent to it: longer than handles go by what they
have heard (``STALE``), and by what workers knew then. Of a write that is sent to a dead worker nobody knows."""

ROUNDS = 4
"""Most rounds of pings at a time: to shrink, to hear of it, to grow, to hear of it."""


class Membership:
    """The workers of a pool.

    Args:
        pool: its name.
        config: gives its configuration as it is now.
        reaper: ends the connections of the dead.
        life: number of this life of the Pool actor: epochs and numbers of a later life are greater.
    """

    def __init__(self, pool: str, config: Callable[[], PoolConfig], reaper: Reaper, life: int) -> None:
        self._pool = pool
        self._config = config
        self._reaper = reaper
        self.members: dict[int, Member] = {}
        self.budget: Budget[Life] = Budget(config().max_connections)
        reaper.has_room = self._has_room
        reaper.news = self.news_now
        reaper.ended = lambda life: self.authority.gone(life_of(*life))
        self.frozen = True
        """Whether no shares are granted yet: what connections there are of before is not known."""
        self.limit: int | None = None  # connections that the server has room for
        self.keeps = False  # whether connections are kept open without work
        self.epoch = (life << 32) + 1
        self._numbers = itertools.count((life << 32) + 1)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._turn = asyncio.Lock()
        self.authority = VersionAuthority(f"pool/{pool}/asks", life, self.news_now)
        self.news = asyncio.Event()
        """Set when there is reason for a round of pings before its time."""
        self.replacing = False

    # --- what there is ---

    @property
    def cap(self) -> int:
        """Most connections: what was asked for, or what the server has room for."""
        cap = self._config().max_connections
        return cap if self.limit is None else max(1, min(cap, self.limit))

    def share(self, member: Member) -> int:
        """What *member* may use now."""
        account = None if member.life is None else self.budget.accounts.get(member.life)
        return 0 if account is None else account.share

    def places(self) -> list[Place]:
        """What handles are told: where work may be sent."""
        return [
            (m.index, m.name, m.node, self.share(m), m.incarnation, m.state == "draining")
            for m in self.members.values()
            if m.state != "lost"
        ]

    def handles(self) -> list[ActorHandle[Any]]:
        """All workers, the lost ones included."""
        return [member.handle for member in self.members.values()]

    def living(self) -> set[str]:
        """Application names of the lives that have connections by right, or will be ended on their own."""
        return {self.name_of(life) for life in self.budget.accounts}

    def name_of(self, life: Life) -> str:
        """What PostgreSQL shows of the connections of that life."""
        return application_name(_compat.cluster_id(), self._pool, str(life[0]), life[1])

    def _has_room(self) -> bool:
        """Whether a connection may be opened that is in no account."""
        return all(member.node for member in self.members.values()) and self.budget.charged < self.cap

    def changed(self) -> None:
        """Workers and handles are to hear of it."""
        self.epoch += 1
        self.news.set()

    def news_now(self) -> None:
        """There is reason for a round of pings."""
        self.news.set()

    # --- who is there ---

    def find(self) -> None:
        """Take over the workers that are there already: they have outlived their Pool actor."""
        for actor in ray.util.list_named_actors(all_namespaces=True):
            index = naming.worker_index(self._pool, actor["name"])
            if index is None or actor["namespace"] != naming.NAMESPACE or index in self.members:
                continue
            with contextlib.suppress(ValueError):  # it is just being ended
                handle = ray.get_actor(actor["name"], namespace=naming.NAMESPACE)
                self._add(index, actor["name"], "", handle)

    def start(self, index: int, node: str) -> Member:
        """Start worker *index* on *node*."""
        name = naming.worker_actor(self._pool, index)
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
            .remote(self._pool, index, _compat.cluster_id(), self._config().to_dict())
        )
        return self._add(index, name, node, handle)

    def _add(self, index: int, name: str, node: str, handle: ActorHandle[Any]) -> Member:
        now = time.monotonic()
        member = self.members[index] = Member(index, name, node, handle, answered_at=now)
        return member

    def arrange(self, nodes: _compat.Nodes) -> list[Member]:
        """Start workers where they are missing, drain those that are too many, give up those whose node is gone.

        Returns:
            Those that were started.
        """
        for member in tuple(self.members.values()):
            if member.node and member.node not in nodes.alive:
                logger.warning("pool %s: the node of worker %d is gone", self._pool, member.index)
                self._forget(member)
        if self.replacing:
            return []
        config = self._config()
        kept = {m.index: m.node for m in self.members.values() if not m.draining}
        if any(not node for node in kept.values()):
            return []  # found, and not heard yet
        most = (self.cap - sizing.reserve(self.cap)) // (1 + len(config.replicas))
        plan = placement.plan(nodes.eligible, kept, config.workers, most, tuple(self.members))
        started = [self.start(index, node) for index, node in plan.start]
        for index in plan.drain:
            self.drain(self.members[index])
        return started

    def _forget(self, member: Member) -> None:
        """Its process is dead for certain, and will not come back."""
        del self.members[member.index]
        self.changed()
        ray.kill(member.handle)
        if member.life is not None:
            self._bury(member.life)

    def _bury(self, life: Life) -> None:
        if life in self.budget.accounts:
            self.budget.stop(life)
            self._background(self._reaper.bury(self.budget, life, self.name_of(life)))
        else:
            self.authority.gone(life_of(*life))  # they were ended when it was silent

    # --- draining ---

    def drain(self, member: Member) -> asyncio.Task[None]:
        """Let *member* end what it has begun, and end it then."""
        member.draining = True
        if member.state != "lost":
            member.state = "draining"
        if member.life is not None:
            self.budget.stop(member.life)
        self.changed()
        return self._background(self._drain(member))

    async def _drain(self, member: Member) -> None:
        seconds, until = self._config().drain_timeout, time.monotonic() + LINGER
        try:
            in_time = await asyncio.wait_for(member.handle.drain.remote(seconds), seconds + 10)
            if not in_time:
                logger.warning("pool %s: worker %d was busy longer than drain_timeout", self._pool, member.index)
            await asyncio.sleep(until - time.monotonic())
            await asyncio.wait_for(member.handle.close.remote("its worker was taken away"), 10.0)
        except Exception as error:  # whatever it was, a worker that takes no more work must not stay
            logger.warning("pool %s: worker %d did not end by itself: %s", self._pool, member.index, error)
        if self.members.get(member.index) is member:
            self._forget(member)

    async def replace(self, member: Member) -> None:
        """Start another worker on the node of *member*, and drain *member* when it is there."""
        index = next(index for index in itertools.count() if index not in self.members)
        successor = self.start(index, member.node)
        if not await self.appear([successor], START_TIMEOUT):
            self._forget(successor)
            raise UnavailableError(
                f"no new worker of pool {self._pool!r} started within {START_TIMEOUT:g} s on node {member.node}: "
                f"worker {member.index} and those after it go on as they are"
            )
        await self.drain(member)

    # --- pings ---

    async def appear(self, members: Collection[Member], timeout: float) -> bool:
        """Wait until *members* have answered for the first time; whether any has."""
        until = time.monotonic() + timeout
        waiting = set(members)
        while waiting and (left := until - time.monotonic()) > 0:
            # At least a pause: who has not answered several pings is sent no more, and waits for nothing.
            pause = asyncio.sleep(min(left, PAUSE))
            await asyncio.gather(pause, *(self._ping(member, min(left, PING_WITHIN)) for member in waiting))
            waiting = {m for m in waiting if m.incarnation is None and self.members.get(m.index) is m}
        return len(waiting) < len(members)

    async def round(self) -> None:
        """Ping all workers; again while shares move."""
        async with self._turn:
            whom = list(self.members.values())
            for _ in range(ROUNDS):
                self._divide()
                await asyncio.gather(*(self._ping(member) for member in whom))
                self._judge()
                self.authority.look(all(member.node for member in self.members.values()))
                self._divide()
                whom = [m for m in self.members.values() if m.life and self._is_news(m.life)]
                if not whom:
                    return

    def _is_news(self, life: Life) -> bool:
        account = self.budget.accounts.get(life)
        return account is not None and not account.unanswered and account.told != account.share

    def _divide(self) -> None:
        budget = self.budget
        budget.reserved = max(sizing.reserve(self.cap), self._reaper.holds)
        # While it is not known what there is beside those that we have heard of, they get no more than they have.
        budget.cap = min(self.cap, budget.charged + budget.reserved) if self.frozen else self.cap
        before = [account.share for account in self.budget.accounts.values()]
        self.budget.divide()
        if before != [account.share for account in self.budget.accounts.values()]:
            self.changed()

    async def _ping(self, member: Member, within: float = PING_WITHIN) -> None:
        if member.unanswered < MOST_UNANSWERED:
            pinging = self._background(self._ping_once(member))
            await asyncio.wait((pinging,), timeout=within)

    async def _ping_once(self, member: Member) -> None:
        number, life = next(self._numbers), member.life
        gone, member.gone = member.gone, []
        grant: int | None = None
        if life is not None:
            grant = self.budget.send(life, number) if life in self.budget.accounts else 0
        least = 0
        if self.keeps:
            whole = sum(map(self.share, self.members.values()))
            least = sizing.share(self._config().min_connections, self.share(member), whole)
        lost = member.state == "lost"
        member.unanswered += 1
        sent = time.monotonic()
        member.asked(sent)
        try:
            state = await member.handle.ping.remote(
                number, member.incarnation, grant, member.clock, least, gone, len(self.members), self.epoch,
                lost, self.authority.era,
            )  # fmt: skip
        except _compat.ActorEnded:
            if self.members.get(member.index) is member:
                self._forget(member)
            return
        except _compat.ActorGone:
            member.gone += gone  # it is being restarted, or cannot be reached
            return
        finally:
            member.unanswered -= 1
        if self.members.get(member.index) is member:
            self._heard(member, life, number, state, sent)

    def _heard(self, member: Member, asked: Life | None, number: int, state: dict[str, Any], sent: float) -> None:
        begins = member.incarnation != state["incarnation"]
        if begins:
            if member.clock is not None and asked != member.life:
                return  # an answer of a life that has ended since
            self._begun(member, state)
        assert member.life is not None
        if begins or member.state == "lost":
            self.authority.expect(life_of(*member.life), sent)
        member.answered_at = time.monotonic()
        member.clock = max(state["clock"], member.clock or 0.0)
        member.node = state["node"]
        member.open, member.unconfirmed = state["open"], state["unconfirmed"]
        account = self.budget.accounts.get(member.life)
        if account is not None and asked == member.life and state["newest"] == number:
            self.budget.answered(member.life, number, state["used"], state["demand"])
        if member.state == "lost":
            logger.warning("pool %s: worker %d answers again", self._pool, member.index)
            member.state = "draining" if member.draining else "serving"
            if account is None:  # its share was given to others; what it believes to have is out of date
                self.budget.join(member.life, 0, state["used"])
            if member.draining:
                self.budget.stop(member.life)
            else:
                self.budget.resume(member.life)
            self.changed()

    def _begun(self, member: Member, state: dict[str, Any]) -> None:
        """A life of *member* that is new to us; its process is another one, or we are."""
        before = member.life
        member.incarnation, member.clock = state["incarnation"], None
        member.state = "draining" if member.draining else "serving"
        assert member.life is not None
        if before is not None:
            self._bury(before)
        self.budget.join(member.life, state["budget"], state["used"])
        # A life that Ray has started again has the configuration that its first one was made with.
        member.handle.use.remote(self._config().to_dict())
        if member.draining:
            self.budget.stop(member.life)
        elif state["draining"]:
            self.drain(member)  # the Pool actor that had told it so is dead
        self.changed()

    def _judge(self) -> None:
        """Who has been silent for too long?"""
        now = time.monotonic()
        for member in tuple(self.members.values()):
            silent = member.silent(now)
            if member.state in ("serving", "draining") and silent > LOST_AFTER:
                logger.warning("pool %s: worker %d does not answer", self._pool, member.index)
                member.state = "lost"
                if member.life is not None:
                    self.budget.stop(member.life)
                self.changed()
            if member.state == "lost" and member.life is not None and silent > REAP_AFTER:
                name = self.name_of(member.life)
                self._reaper.reap(self.budget, member.life, name, member.is_lost, had=member.open)
            if member.state == "starting" and not member.node and silent > REAP_AFTER:
                # It has outlived its Pool actor, or was to start again where it cannot. Whatever it held is swept up.
                logger.warning(
                    "pool %s: worker %d, of before, does not answer and is given up", self._pool, member.index
                )
                self._forget(member)

    async def verify(self, index: int, incarnation: str) -> bool:
        """Whether that life of worker *index* goes on: true when it answers, false when it is lost or another one."""
        asked = time.monotonic()
        while True:
            member = self.members.get(index)
            if member is None or member.incarnation != incarnation or member.state == "lost":
                return False
            if member.answered_at > asked:
                return True
            await asyncio.sleep(PING_WITHIN / 10)

    # --- small things ---

    async def tell(self, send: Callable[[ActorHandle[Any]], Awaitable[Any]], timeout: float) -> list[Any]:
        """Send all workers a message; their answers, or exceptions, in order of ``members``."""
        return await asyncio.gather(
            *(asyncio.wait_for(send(member.handle), timeout) for member in self.members.values()),
            return_exceptions=True,
        )

    def close(self) -> None:
        """End what goes on in the background."""
        self.authority.close()
        for task in tuple(self._tasks):
            task.cancel()

    def _background(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_logged)
        return task


def check_workers(config: PoolConfig) -> None:
    """Whether there is a connection for each worker, to each server.

    Raises:
        ConfigError: there is not.
    """
    workers = 1 if config.workers == "per_node" else int(config.workers)
    try:
        sizing.check(config.max_connections, workers, 1 + len(config.replicas))
    except ValueError as error:
        raise ConfigError(f"max_connections={config.max_connections}: {error}") from error


def _logged(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("internal error in a Pool actor", exc_info=error)
