"""The writes of one worker, while somebody in the cluster keeps results: each is announced before it is sent.

See :mod:`raypg.core.coherence`. What a connection is writing hangs on the connection, until the statement or its
transaction is over; or, if the connection was given up, until its backend is gone for certain.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from raypg.core.coherence import EVERYTHING
from raypg.core.holding import CATALOGUE
from raypg.core.intents import Intent, Intents
from raypg.core.sql_text import quoted_name
from raypg.errors import UnavailableError
from raypg.server.held import Held, Use
from raypg.server.outcomes import timed_out
from raypg.server.write_reach import WriteReach

if TYPE_CHECKING:
    from raypg.core.sql import Verdict
    from raypg.server.connection import ServerConnection
    from raypg.server.engine import Engine
    from raypg.server.writing import Spec

logger = logging.getLogger(__name__)

Ask = Callable[[Mapping[int, str]], Awaitable[bool]]
"""Asks the authority for intents, by number; whether they are allowed. It need not return in time."""

WITHIN = 15.0
"""Seconds in which an intent is allowed at the latest, whoever is dead or silent; far more than that takes."""

LOOK_EVERY = 0.1
"""Seconds between two looks at the clock while the authority does not answer."""

AGAIN_AFTER = 0.05
"""Seconds until the authority is asked again."""


class Writes:
    """Announces the writes of one engine.

    Args:
        engine: whose.
        life: of the worker.

    Attributes:
        watched: whether anybody keeps results, so that :meth:`begin` must be called before anything is sent that may
            write. The one thing to look at otherwise.
        messages: how often the authority was asked.
    """

    def __init__(self, engine: Engine, life: str = "") -> None:
        self._engine = engine
        self.watched = False
        self.messages = 0
        self.intents = Intents(life)
        self.reach = WriteReach(engine)
        self.ask: Ask | None = None
        self._new: list[Intent] = []
        self._waiting: dict[Intent, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # --- for whoever sends statements ---

    async def begin(self, connection: ServerConnection, texts: Collection[str], timeout: float | None = None) -> None:
        """Wait until nobody holds results of what *texts* may write to. It is over when the
        connection settles, see :meth:`Held.settle`.

        Args:
            timeout: seconds that who sends them has.

        Raises:
            UnavailableError: that cannot be found out; nothing may be sent.
            QueryTimeoutError: nor in time.
        """
        until = math.inf if timeout is None else time.monotonic() + timeout
        await self.reach.ready(connection, until)
        tables = frozenset().union(*map(self.reach.tables_of, texts))
        try:
            async with asyncio.timeout(None if timeout is None else until - time.monotonic()):
                await self.begin_on(connection, tables)
        except TimeoutError:
            raise timed_out(timeout) from None

    async def begin_on(self, connection: ServerConnection, tables: Iterable[str]) -> None:
        """The same for tables, without a limit of time. Errors as there."""
        held = connection.held
        if held is None:
            held = connection.held = Held(self.intents)
        new = self.intents.enter([table for table in tables if table not in held.intents])
        held.intents |= {intent.table: intent for intent in new}
        waiting = [intent for intent in held.intents.values() if not intent.allowed]
        if not waiting:
            return
        loop = asyncio.get_running_loop()
        for intent in waiting:
            if intent not in self._waiting:
                self._waiting[intent] = loop.create_future()
                if not self._new:
                    loop.call_soon(self._send)
                self._new.append(intent)
        await asyncio.gather(*(asyncio.shield(self._waiting[intent]) for intent in waiting if not intent.allowed))

    def concerns(self, sql: str, verdict: Verdict) -> bool:
        """Whether :meth:`begin` is to be told of *sql*: not if it is certain that it only reads."""
        return bool(verdict.relations) or not verdict.retryable or self.reach.may_write(sql)

    @staticmethod
    def texts_of_batch(spec: Spec) -> Collection[str]:
        """Statements that write to what a batch of :mod:`raypg.server.writing` does: its table, and those of the ledger
        that it needs. Where these do not exist, one may write to anything, as far as anybody knows."""
        schema, table = spec.into
        texts = [f"TRUNCATE {quoted_name(schema, table) if schema else quoted_name(table)}"]
        if spec.batch_id is not None:
            texts.append("TRUNCATE raypg.batches")
        if spec.on_bad_rows == "quarantine":
            texts.append("TRUNCATE raypg.quarantine")
        return texts

    # --- for the line to the authority ---

    def use(self, era: int) -> None:
        """From now on the authority is to be asked, in that era; or not at all, if it is 0."""
        if era == self.intents.era:
            return
        before, self.intents.era = self.intents.era, era
        self.watched = bool(era)
        if not era:
            for intent in tuple(self._waiting):
                self._allow(intent)
        elif not before:
            self._widen(CATALOGUE)  # what runs already was not announced

    def widen(self) -> None:
        """What we know of the catalogue holds no longer: what runs already may write to more than was announced. To be
        called before that is acknowledged, and reported with it."""
        if self.watched:
            self._widen(EVERYTHING)

    def _widen(self, table: str) -> None:
        for connection in filter(self._engine.connections.is_in_use, self._engine.connections):
            held = connection.held = connection.held or Held(self.intents)
            if connection.lease is None or connection.busy or held.intents or _in_transaction(connection):
                use = connection.taken_at, connection.lease
                if held.widen(table, use) and connection.lease is None:
                    self._background(self._until_over(connection, held, table, use))
        self._engine.connections.hold_unconfirmed(lambda: self._hold_of(table))

    def _hold_of(self, table: str) -> Held:
        held = Held(self.intents)
        held.intents[table] = self.intents.enter((table,))[0]
        return held

    async def _until_over(self, connection: ServerConnection, held: Held, table: str, use: Use) -> None:
        """Whoever uses *connection* now ends it without knowing of us."""
        while connection.held is held and (connection.taken_at, connection.lease) == use:
            if not self._engine.connections.is_in_use(connection):
                held.settle(connection)
                return
            await asyncio.sleep(LOOK_EVERY / 10)
        if connection.held is held:
            held.over(table, use)

    # --- inside ---

    def _send(self) -> None:
        batch, self._new = self._new, []
        self._background(self._settle(batch))

    async def _settle(self, batch: list[Intent]) -> None:
        """Ask until they are allowed, or until it does not matter what the authority says."""
        began = time.monotonic()
        asking: asyncio.Future[bool] | None = None
        try:
            while True:
                allowed = False
                if asking is None and self.ask is not None:
                    self.messages += 1
                    asking = asyncio.ensure_future(self.ask({intent.number: intent.table for intent in batch}))
                if asking is not None:
                    await asyncio.wait((asking,), timeout=LOOK_EVERY)
                    if asking.done():
                        allowed, asking = asking.exception() is None and asking.result(), None
                now = time.monotonic()
                if allowed or not self.watched or self.intents.may_write_alone(now):
                    break
                if now - began > WITHIN:
                    raise UnavailableError(
                        "the statement was not sent: it cannot be made sure that nobody holds results of what it writes"
                    )
                if asking is None:
                    await asyncio.sleep(AGAIN_AFTER)
        except BaseException as error:
            for intent in batch:
                waiting = self._waiting.pop(intent, None)
                if waiting is not None and not waiting.done():
                    waiting.set_exception(error if isinstance(error, Exception) else UnavailableError("it has ended"))
                    waiting.exception()  # nobody may wait any more
            if not isinstance(error, UnavailableError):
                raise
        else:
            for intent in batch:
                self._allow(intent)
        finally:
            if asking is not None:
                asking.cancel()

    def _allow(self, intent: Intent) -> None:
        intent.allowed = True
        waiting = self._waiting.pop(intent, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    def _background(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _in_transaction(connection: ServerConnection) -> bool:
    return not connection.raw.is_closed() and connection.raw.is_in_transaction()
