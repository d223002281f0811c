"""One caller's line to one worker: statements of many callers travel together, outcomes come back in columns.

Natural batching: whatever is asked for in one step of the event loop, and whatever piles up while the allowed messages
are under way, goes into the next message. Nobody waits for a batch to fill.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray.exceptions import TaskCancelledError

from raypg import _compat, messages
from raypg.calling import send, tell
from raypg.errors import CircuitBreakerError, WorkerDrainingError
from raypg.messages import Arguments, Note, Part, Reply, Run, Settings, Where
from raypg.packing import pack, unpack
from raypg.portable import unpack_error

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from raypg.dispatch import Dispatcher

MOST_MESSAGES = 2
"""Messages with statements under way to one worker: one that it works on, one that is on its way."""

MOST_STATEMENTS = 250
MOST_BYTES = 80_000
"""Limits of one message. Above 100 kB Ray sends it through the object store, which takes three times as long; and while
a worker takes in a message nobody else is served: with 500 statements a light job waited 13 ms beside a heavy one,
with 250 it waits 8.5 ms, and both together get more done."""

ISOLATION = 0.5
"""Seconds, at least, in which a worker is passed over that said that it cannot reach the database."""

PATIENCE = 1.5
"""Seconds without an answer after which it is found out whether the worker lives. Longer than ``collect`` waits."""

FRESH_LOAD = 1.0
"""Seconds for which what a worker said of its load is believed when it was not asked since."""


_lines = itertools.count(1)


class Call:
    """One statement of one caller, on its way."""

    __slots__ = (
        "arguments",
        "channel",
        "future",
        "mode",
        "note",
        "number",
        "position",
        "retried",
        "settings",
        "since",
        "sql",
        "timeout",
        "where",
    )

    def __init__(
        self,
        mode: int,
        sql: str,
        arguments: Any,
        timeout: float | None,
        settings: Settings,
        loop: asyncio.AbstractEventLoop,
        where: Where | None = None,
    ) -> None:
        self.mode = mode
        self.sql = sql
        self.arguments = arguments
        self.timeout = timeout
        self.settings = settings
        self.where = where
        self.note: Note | None = None
        self.since = loop.time()
        self.future: asyncio.Future[tuple[Any, tuple[str, ...] | None]] = loop.create_future()
        self.retried = False
        self.channel: Channel | None = None
        self.number = -1
        self.position = -1


class WorkerGone(Exception):
    """The worker died, or its node was lost; what it had been sent has an unknown outcome."""


class Channel:
    """The line from one event loop of one process to one worker.

    Args:
        dispatcher: whom to tell when the worker is gone.
        handle: the worker.
        index, node, budget: what the membership says of it.
        incarnation: which life of the worker this is a line to.
    """

    def __init__(
        self, dispatcher: Dispatcher, handle: ActorHandle[Any], index: int, node: str, budget: int, incarnation: str
    ) -> None:
        self.handle = handle
        self.index = index
        self.node = node
        self.budget = budget
        self.incarnation = incarnation
        self.closed = False
        self.draining = False
        self._dispatcher = dispatcher
        # A line that is lost may have a successor to the very same life of a worker, which still has what came over it,
        # and tells that to whoever asks under this name.
        self._identity = f"{dispatcher.client}/{next(_lines)}"
        self._numbers = itertools.count(1)  # of batches
        self._pending: deque[Call] = deque()
        self._batches: dict[int, list[Call]] = {}
        self._untold: dict[int, int] = {}  # batch number → statements without an outcome yet
        self._loop = asyncio.get_running_loop()
        self._under_way: dict[asyncio.Future[bytes], tuple[int, float]] = {}  # no answer yet → number, when it was sent
        self._sending = False
        self._asking = False
        self._patience: asyncio.TimerHandle | None = None
        self._collector: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._owned: Any = None
        self.open = 0
        self._load = 0
        self._heard_at = 0.0
        self._isolated_until = 0.0

    @property
    def usable(self) -> bool:
        """Whether new work may be sent to it."""
        return not (self.closed or self.draining)

    @property
    def load(self) -> int:
        """Callers that wait there, as far as is known."""
        if self._load and not self.open and self._loop.time() - self._heard_at > FRESH_LOAD:
            self._load = 0
        return self._load

    @property
    def has_room(self) -> bool:
        """Whether nobody has to wait there, as far as is known."""
        return self.open < self.budget and not self.load

    def heard_from(self) -> None:
        """The worker has given a sign of life."""
        self._heard_at = self._loop.time()

    def is_quiet(self) -> bool:
        """Whether nothing was heard of it lately."""
        return self._loop.time() - self._heard_at >= PATIENCE

    @property
    def isolated(self) -> bool:
        """Whether the worker said lately that it alone cannot reach the database."""
        return self._loop.time() < self._isolated_until

    def refused_by(self, error: BaseException) -> bool:
        """Whether *error* says that this worker will not do, and another one may: it is isolated, which passes, or it
        drains, and is to end. Nothing was run."""
        if isinstance(error, WorkerDrainingError):
            self.draining = True
            self._dispatcher.refresh_soon()
            return True
        if not isinstance(error, CircuitBreakerError) or not error.isolated:
            return False
        self._isolated_until = self._loop.time() + max(ISOLATION, error.retry_after or 0.0)
        return True

    # --- sending ---

    def send(self, call: Call) -> None:
        """Send *call* with the next message."""
        call.channel, call.number = self, -1  # what it was on another line must not be cancelled on this one
        self.open += 1
        self._pending.append(call)
        self._send_soon()

    def _send_soon(self) -> None:
        # Not at once: the other callers of this step of the loop join.
        if not self._sending and len(self._under_way) < MOST_MESSAGES:
            self._sending = True
            self._loop.call_soon(self._send_pending)

    def _send_pending(self) -> None:
        """Send what is pending in as many messages as may be under way. Plain calls and callbacks: a task for each
        message took a tenth of the time of a lone statement."""
        self._sending = False
        try:
            while self._pending and not self.closed and len(self._under_way) < MOST_MESSAGES:
                number = next(self._numbers)
                calls, runs = self._pack(number)
                if not runs:
                    continue
                self._batches[number] = calls
                self._untold[number] = len(calls)
                message = pack((self._identity, self._dispatcher.job, number, runs))
                answer = asyncio.wrap_future(send(self.handle.run, message).future())
                self._under_way[answer] = number, self._loop.time()
                answer.add_done_callback(self._answered)
                if self._patience is None:
                    self._patience = self._loop.call_later(PATIENCE, self._lose_patience)
        except _compat.ActorGone:
            self.lose()
        except Exception as error:
            self._broken(error)

    def _answered(self, answer: asyncio.Future[bytes]) -> None:
        number, _ = self._under_way.pop(answer, (0, 0.0))
        try:
            self._settle(unpack(answer.result()))
        except TaskCancelledError as error:
            self._cancelled(number, error)
        except _compat.ActorGone:
            self.lose()
        except asyncio.CancelledError:
            return  # the loop ends
        except Exception as error:
            self._broken(error)
        if self._pending:
            self._send_soon()

    def _lose_patience(self) -> None:
        """Ask after the worker if a message has had no answer for long: calls to a lost node hang, they do not fail."""
        self._patience = None
        if self.closed or not self._under_way:
            return
        oldest = min(sent for _, sent in self._under_way.values())
        if self._loop.time() - oldest >= PATIENCE and not self._asking:
            self._asking = True
            self._start(self._ask_after())
        self._patience = self._loop.call_later(PATIENCE, self._lose_patience)

    async def _ask_after(self) -> None:
        try:
            if not await self._dispatcher.is_current(self):
                self.lose()
        except Exception as error:
            self._broken(error)
        finally:
            self._asking = False

    def _pack(self, number: int) -> tuple[list[Call], list[Run]]:
        """The next message: calls with the same text share it."""
        groups: dict[tuple[int, str, float | None, Settings, Where | None], tuple[list[Arguments], list[Call]]] = {}
        size = count = 0
        while self._pending and count < MOST_STATEMENTS and size < MOST_BYTES:
            call = self._pending.popleft()
            if call.future.done():  # its caller has left
                self.open -= 1
                continue
            key = (call.mode, call.sql, call.timeout, call.settings, call.where)
            group = groups.get(key)
            if group is None:
                group = groups[key] = ([], [])
                size += len(call.sql) + 64
            group[0].append(call.arguments)
            group[1].append(call)
            size += messages.size_of(call.arguments)
            count += 1
        calls: list[Call] = []
        runs: list[Run] = []
        for (mode, sql, timeout, settings, where), (rows, group_calls) in groups.items():
            runs.append((mode, sql, rows, timeout, settings, where))
            for call in group_calls:
                call.number, call.position = number, len(calls)
                calls.append(call)
        return calls, runs

    def lease_forgotten(self) -> None:
        """A lease of this line was dropped without being released: it no longer counts as load."""
        self.open -= 1

    def be_watched(self) -> None:
        """Let the worker see it when this process dies. Once per line, before the first lease."""
        if self._owned is None:
            self._owned = send(self.handle.hold, self._dispatcher.client)
            send(self.handle.watch, self._dispatcher.client, [self._owned])

    async def ask(self, method: str, *arguments: Any, references: Sequence[Any] = ()) -> Any:
        """Send a message and wait for its answer, as long as the worker lives. *references* to objects go beside it.

        Raises:
            WorkerGone: it does not; nothing more goes over this line.
        """
        try:
            future = asyncio.wrap_future(send(getattr(self.handle, method), pack(arguments), *references).future())
            while True:
                done, _ = await asyncio.wait((future,), timeout=PATIENCE)
                if done:
                    answer = unpack(future.result())
                    self.heard_from()
                    return answer
                if not await self._dispatcher.is_current(self):
                    future.cancel()
                    self.lose()
                    raise WorkerGone
        except _compat.ActorGone as error:
            self.lose()
            raise WorkerGone from error

    # --- receiving ---

    def _settle(self, reply: Reply) -> None:
        self._heard(reply)
        if self._collector is None and self._owed():
            self._collector = self._start(self._collect())

    def _owed(self) -> set[int]:
        """The batches that were answered before their end. What the worker says of it may be older than what we know:
        an answer to ``collect`` that says that nothing is left is read after one to a later ``run`` that left some."""
        return self._untold.keys() - {number for number, _ in self._under_way.values()} if self._untold else set()

    def _heard(self, reply: Reply) -> int:
        """Take in what a worker says; how many batches it has not told all of."""
        self._load, unfinished, parts, epoch = reply
        self.heard_from()
        self._dispatcher.heard_of(epoch)
        for part in parts:
            self._tell(part)
        return unfinished

    async def _collect(self) -> None:
        try:
            while (owed := self._owed()) and not self.closed:
                unfinished = self._heard(await self.ask("collect", self._identity, self._dispatcher.job))
                if not unfinished and owed & self._untold.keys():
                    self.lose()  # it has forgotten them: nobody may wait for ever
        except WorkerGone:
            self.lose()
        except Exception as error:
            self._broken(error)
        finally:
            self._collector = None

    def _tell(self, part: Part) -> None:
        number = part[0]
        calls = self._batches.get(number)
        if calls is None:
            return
        note = part[5]
        for position, (payload, names, error) in messages.finished_of(part):
            future = calls[position].future
            self.open -= 1
            if future.done():
                continue
            if note is not None:
                calls[position].note = note
            if error is None:
                future.set_result((payload, names))
                continue
            problem = unpack_error(error)
            if not self.refused_by(problem) or not self._dispatcher.send_elsewhere(calls[position], problem):
                future.set_exception(problem)
        # Not "all futures are done": those who left are done at once, but count as load until the worker says so.
        self._untold[number] -= len(part[1])
        if not self._untold[number]:
            del self._batches[number], self._untold[number]

    # --- when it goes wrong ---

    def cancel(self, call: Call) -> None:
        """The caller of *call* has left: tell the worker, and nobody else."""
        if call.number in self._batches and not self.closed:
            tell(self.handle.cancel, self._identity, self._dispatcher.job, call.number, call.position)

    def _cancelled(self, number: int, error: TaskCancelledError) -> None:
        """``ray.cancel`` of the plain task that sent it has cancelled a message, and means all that was in it."""
        for call in self._batches.get(number, ()):
            if not call.future.done():
                call.future.set_exception(error)
                self.cancel(call)

    def lose(self) -> None:
        """The worker is gone: what waits goes elsewhere, what was sent is for the dispatcher to judge."""
        if not self.closed:
            self.closed = True
            sent = [call for calls in self._batches.values() for call in calls if not call.future.done()]
            unsent = [call for call in self._pending if not call.future.done()]
            self._batches.clear()
            self._untold.clear()
            self._pending.clear()
            self._dispatcher.worker_gone(self, sent, unsent)

    def _broken(self, error: Exception) -> None:
        """Something failed that should not: every caller on this line learns of it, none waits for ever."""
        for calls in (*self._batches.values(), self._pending):
            for call in calls:
                if not call.future.done():
                    call.future.set_exception(error)
        self._batches.clear()
        self._untold.clear()
        self._pending.clear()
        self.open = 0

    def close(self, error: Exception) -> None:
        """The pool is closed: no more statements on this line."""
        self.closed = True
        self._broken(error)

    def _start(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
