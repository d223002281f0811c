"""The protocol of the version authority, in every order that a small world allows: nobody holds what is written."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from raypg.core import coherence as core
from raypg.core.coherence import EVERYTHING, Authority, Report
from raypg.core.holding import CATALOGUE, LEASE, MOST_SHARED, Holding
from raypg.core.intents import LINGER, Intent, Intents

TICK = 0.51
"""Seconds by which time goes on: a lease is four of them, and all that a worker waits for alone, eight."""


@dataclass
class Cache:
    """A process that keeps results: at most one of each table."""

    name: str
    holding: Holding = field(default_factory=Holding)
    who: str = ""
    lives: int = 0
    asked: tuple[int, float] | None = None  # (number of the poll under way, when it was sent)
    polls: int = 0
    stored: dict[str, int] = field(default_factory=dict)
    reading: dict[str, tuple[int, int | None]] = field(default_factory=dict)  # table → (mark, what was read)


@dataclass
class Worker:
    """A process that writes: at most one statement at a time for each table."""

    name: str
    intents: Intents
    holding: Holding = field(default_factory=Holding)
    who: str = ""
    lives: int = 0
    asked: tuple[int, float] | None = None
    polls: int = 0
    told_era: int = 0
    waits: dict[str, list[Intent]] = field(default_factory=dict)  # not sent yet
    asking: set[str] = field(default_factory=set)
    writes: dict[str, list[Intent]] = field(default_factory=dict)  # sent, and not over
    untold: dict[str, int] = field(default_factory=dict)  # writes that were begun while nobody had to be asked
    known: tuple[int, bool] | None = None  # (mark, whether there was a trigger), of the catalogue
    dead: bool = False


@dataclass
class Poll:
    """An attendance that has reached the authority, and is not answered yet."""

    number: int
    received: float


class World:
    """All of it: caches, workers, the authority, and the messages between them, which may be late or lost.

    Args:
        changes: a trigger is created and dropped now and then, by which who writes to the first table writes to all:
            only who has read the catalogue knows what it writes to.
    """

    def __init__(self, caches: int, workers: int, tables: str, changes: bool = False) -> None:
        self.now = 100.0
        self.tables = tuple(tables)
        self.changes = changes
        self.trigger = False
        self.version = dict.fromkeys(self.tables, 0)
        self.lives = 1
        self.remembered = False  # outside of the authority: that workers must ask
        self.authority = Authority(self.now, 1 << 32)
        self.caches = [Cache(f"c{n}", who=f"c{n}.0") for n in range(caches)]
        self.workers = [Worker(f"w{n}", Intents(f"w{n}"), who=f"w{n}.0") for n in range(workers)]
        self.mail: list[tuple[Any, ...]] = []
        self.polls: dict[str, Poll] = {}
        self.intends: list[tuple[int, str, str, core.Waits]] = []  # (life of authority, worker, table, waits)
        self.ticks = self.begun = self.crashes = self.kills = self.reads = self.held = 0
        for worker in self.workers:
            self.authority.expect(worker.name, self.now)

    # --- what must hold ---

    def check(self) -> None:
        for cache in self.caches:
            for table, version in cache.stored.items():
                if not cache.holding.unchanged((table,), cache.holding.mark, self.now):
                    continue
                self.held += 1
                assert version == self.version[table], f"{cache.name} answers with version {version} of {table}"
                for worker in self.workers:
                    busy = any(table in self.reached(what) for what in (*worker.writes, *worker.untold))
                    assert not busy, f"{cache.name} holds {table} while {worker.name} writes it"

    def reached(self, what: str) -> tuple[str, ...]:
        """The tables that a write to that one writes to."""
        if what == CATALOGUE:
            return ()
        return self.tables if self.trigger and what == self.tables[0] else (what,)

    # --- what may happen next ---

    def moves(self, limits: dict[str, int]) -> Iterator[tuple[str, Callable[[World], None]]]:
        for n, cache in enumerate(self.caches):
            yield from self._cache_moves(n, cache, limits)
        for n, worker in enumerate(self.workers):
            yield from self._worker_moves(n, worker, limits)
        for n, message in enumerate(self.mail):
            yield f"deliver {message[0]} {message[1]}", lambda w, n=n: w._deliver(w.mail.pop(n))  # type: ignore[misc]
        for who in self.polls:
            yield f"answer {who}", lambda w, who=who: w._answer(who)  # type: ignore[misc]
        for n, (_, _, _, waits) in enumerate(self.intends):
            if copy.deepcopy(self.authority).may_write(waits, self.now):
                yield f"allow {n}", lambda w, n=n: w._allow(n)  # type: ignore[misc]
        if self.ticks < limits["ticks"]:
            yield "tick", World._tick
        if self.crashes < limits["crashes"]:
            yield "crash", World._crash
        if not self.authority.complete:
            yield "found", World._found
        if self.authority.active != self.remembered:
            yield "remember", World._remember

    def _cache_moves(self, n: int, cache: Cache, limits: dict[str, int]) -> Iterator[Any]:
        if cache.asked is None:
            yield f"poll {cache.name}", lambda w: w._poll(w.caches[n])
        elif self.now - cache.asked[1] > TICK:
            yield f"give up poll {cache.name}", lambda w: setattr(w.caches[n], "asked", None)
        for table in self.tables:
            if table not in cache.reading and self.reads < limits["reads"]:
                yield f"read {cache.name} {table}", lambda w, t=table: w._read(w.caches[n], t)
            elif table in cache.reading and cache.reading[table][1] is None:
                yield f"see {cache.name} {table}", lambda w, t=table: w._see(w.caches[n], t)
            elif table in cache.reading:
                yield f"store {cache.name} {table}", lambda w, t=table: w._store(w.caches[n], t)

    def _worker_moves(self, n: int, worker: Worker, limits: dict[str, int]) -> Iterator[Any]:
        if worker.dead:
            yield f"buried {worker.name}", lambda w: w._bury(w.workers[n])
            return
        if self.authority.era != worker.told_era:
            yield f"ping {worker.name}", lambda w: w._ping(w.workers[n])
        if worker.intents.era and worker.asked is None:
            yield f"poll {worker.name}", lambda w: w._poll(w.workers[n])
        elif worker.asked is not None and self.now - worker.asked[1] > TICK:
            yield f"give up poll {worker.name}", lambda w: w._begin_anew(w.workers[n])
        if self.changes and worker.holding.unchanged((CATALOGUE,), worker.holding.mark, self.now):
            yield f"look {worker.name}", lambda w: w._look(w.workers[n])
        if self.kills < limits["kills"]:
            yield f"kill {worker.name}", lambda w: w._kill(w.workers[n])
        for table in (*self.tables, CATALOGUE) if self.changes else self.tables:
            idle = table not in worker.waits and table not in worker.writes and table not in worker.untold
            if idle and self.begun < limits["writes"]:
                what = "begin" if table != CATALOGUE else "change"
                yield f"{what} {worker.name} {table}", lambda w, t=table: w._begin(w.workers[n], t)
            if table in worker.waits and table not in worker.asking and not worker.waits[table][0].allowed:
                yield f"intend {worker.name} {table}", lambda w, t=table: w._intend(w.workers[n], t)
            if table in worker.waits and self._may_send(worker, table):
                yield f"send {worker.name} {table}", lambda w, t=table: w._send(w.workers[n], t)
            if table in worker.writes or table in worker.untold:
                slow = table in worker.writes and table != CATALOGUE
                what = f"over {worker.name}" if slow else "over"
                yield f"{what} {table}", lambda w, t=table: w._over(w.workers[n], t)

    # --- caches and workers ---

    def _poll(self, who: Cache | Worker) -> None:
        who.polls += 1
        who.asked = who.polls, self.now
        report = who.intents.report(self.now) if isinstance(who, Worker) else None
        if isinstance(who, Worker) and self.changes:
            who.holding.may_keep((CATALOGUE,), self.now)  # is put down as wanted
        wanted = list(who.holding.wanted)
        self.mail.append(("attend", who.name, who.who, who.polls, who.holding.done, wanted, report))

    def _hear(self, who: Cache | Worker, number: int, answer: Any) -> None:
        if who.asked is None or who.asked[0] != number:
            return  # given up
        sent, who.asked = who.asked[1], None
        if answer is None or who.holding.is_lost(self.now):
            self._begin_anew(who)
            return
        renews, events, clock = answer
        if isinstance(who, Worker):
            who.intents.echo, who.intents.word = clock, self.now
        for tables in who.holding.heard(sent, renews, events):
            if isinstance(who, Cache):
                for table in list(who.stored) if tables is None else tables:
                    who.stored.pop(table, None)
            else:
                self._widen(who)

    def _begin_anew(self, who: Cache | Worker) -> None:
        """The lease is lost, or the authority does not know it, or did not answer."""
        who.asked = None
        who.holding.begin_anew()
        if isinstance(who, Cache):
            who.stored.clear()
        else:
            who.intents.echo = None
            self._widen(who)
        who.lives += 1
        who.who = f"{who.name}.{who.lives}"

    def _widen(self, worker: Worker) -> None:
        """What it knows of the catalogue holds no longer: what was begun may write to more than was announced."""
        for intents in (*worker.waits.values(), *worker.writes.values()):
            if len(intents) == 1:
                intents += worker.intents.enter((EVERYTHING,))

    def _look(self, worker: Worker) -> None:
        worker.known = worker.holding.mark, self.trigger

    def _read(self, cache: Cache, table: str) -> None:
        self.reads += 1
        cache.holding.may_keep((table,), self.now)
        cache.reading[table] = cache.holding.mark, None

    def _see(self, cache: Cache, table: str) -> None:
        cache.reading[table] = cache.reading[table][0], self.version[table]

    def _store(self, cache: Cache, table: str) -> None:
        mark, seen = cache.reading.pop(table)
        if seen is not None and cache.holding.unchanged((table,), mark, self.now):
            cache.stored[table] = seen

    def _begin(self, worker: Worker, table: str) -> None:
        self.begun += 1
        if not worker.intents.era:
            worker.untold[table] = 0
        else:
            worker.waits[table] = worker.intents.enter((self._announced(worker, table),))

    def _announced(self, worker: Worker, table: str) -> str:
        """What it announces before it writes to *table*."""
        if not self.changes or table == CATALOGUE:
            return table
        if worker.known is None or not worker.holding.unchanged((CATALOGUE,), worker.known[0], self.now):
            return EVERYTHING
        return EVERYTHING if worker.known[1] and table == self.tables[0] else table

    def _intend(self, worker: Worker, table: str) -> None:
        worker.asking.add(table)
        intent = worker.waits[table][0]
        self.mail.append(("intend", worker.name, table, {intent.number: intent.table}))

    def _may_send(self, worker: Worker, table: str) -> bool:
        return worker.waits[table][0].allowed or worker.intents.may_write_alone(self.now)

    def _send(self, worker: Worker, table: str) -> None:
        worker.writes[table] = worker.waits.pop(table)
        worker.writes[table][0].allowed = True
        worker.asking.discard(table)

    def _over(self, worker: Worker, table: str) -> None:
        self._written(table)
        if table in worker.untold:
            del worker.untold[table]
            if not worker.untold and worker.intents.era:
                worker.intents.leave(worker.caught_up, self.now)  # type: ignore[attr-defined]
        else:
            worker.intents.leave(worker.writes.pop(table), self.now - LINGER)

    def _written(self, what: str) -> None:
        for table in self.reached(what):
            self.version[table] += 1
        self.trigger = self.trigger != (what == CATALOGUE)

    def _ping(self, worker: Worker) -> None:
        """The Pool actor tells the era, and finds that the worker lives."""
        self.authority.expect(worker.name, self.now)
        worker.told_era = self.authority.era
        worker.intents.word = self.now
        before, worker.intents.era = worker.intents.era, worker.told_era
        if worker.intents.era and not before and worker.untold:
            worker.caught_up = worker.intents.enter((CATALOGUE,))  # type: ignore[attr-defined]

    def _kill(self, worker: Worker) -> None:
        """Its process is dead; what its backends do goes on until they are gone."""
        self.kills += 1
        worker.dead = True
        worker.waits.clear()

    def _bury(self, worker: Worker) -> None:
        for table in (*worker.writes, *worker.untold):
            self._written(table)
        self.authority.gone(worker.name, self.now)
        self.workers.remove(worker)

    # --- the authority ---

    def _deliver(self, message: tuple[Any, ...]) -> None:
        kind, name, *rest = message
        if kind == "attend":
            who, number, done, wanted, report = rest
            if self.authority.attend(who, self.now, done, wanted, report):
                self.polls[f"{who} {number}"] = Poll(number, self.now)
            else:
                self.mail.append(("answered", name, number, None))
        elif kind == "intend":
            table, numbered = rest
            waits = self.authority.intend(name, numbered, self.now)
            if waits is None:
                self.mail.append(("intended", name, table, False))
            else:
                self.intends.append((self.lives, name, table, waits))
        elif kind == "answered":
            for someone in (*self.caches, *self.workers):
                if someone.name == name:
                    self._hear(someone, *rest)
        else:
            table, allowed = rest
            for worker in self.workers:
                if worker.name == name:
                    worker.asking.discard(table)
                    if allowed and table in worker.waits:
                        worker.waits[table][0].allowed = True

    def _answer(self, key: str) -> None:
        poll, who = self.polls.pop(key), key.split()[0]
        answer = self.authority.answer(who, poll.received, self.now)
        told = None if answer is None else (*copy.deepcopy(answer), self.now)
        self.mail.append(("answered", who.split(".")[0], poll.number, told))

    def _allow(self, n: int) -> None:
        _, name, table, waits = self.intends.pop(n)
        assert self.authority.may_write(waits, self.now)
        self.mail.append(("intended", name, table, True))

    def _tick(self) -> None:
        self.ticks += 1
        self.now += TICK
        self.authority.expire(self.now)

    def _remember(self) -> None:
        self.remembered = self.authority.active

    def _crash(self) -> None:
        """The authority is dead, with all that it knew; messages to it are lost."""
        self.crashes += 1
        self.lives += 1
        self.remembered = self.remembered or self.authority.active  # put down before the first answer
        self.authority = Authority(self.now, self.lives << 32, self.remembered)
        self.authority.complete = False
        self.polls.clear()
        self.intends.clear()
        self.mail = [message for message in self.mail if message[0] in ("answered", "intended")]
        for worker in self.workers:
            worker.asking.clear()

    def _found(self) -> None:
        """Every worker has been heard, dead ones are known."""
        for worker in self.workers:
            self.authority.expect(worker.name, self.now - 0.001)
            if not worker.dead:
                self._ping(worker)
        self.authority.complete = True


def frozen(value: Any) -> Any:
    """Something to compare worlds by."""
    if isinstance(value, dict):
        return tuple(sorted((str(key), frozen(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return tuple(frozen(item) for item in value)
    if isinstance(value, set | frozenset):
        return tuple(sorted(map(str, value)))
    if hasattr(value, "__dict__"):
        return frozen(vars(value))
    return value


def explore(world: World, limits: dict[str, int], most: int) -> int:
    """Go to every world that can be reached, breadth first, and check it; how many there were, at most *most*."""
    seen = {hash(frozen(world))}
    level = [world]
    while level and len(seen) < most:
        following = []
        for known in level:
            for _, move in known.moves(limits):
                other = copy.deepcopy(known)
                move(other)
                key = hash(frozen(other))
                if key not in seen:
                    seen.add(key)
                    other.check()
                    following.append(other)
        level = following
    return len(seen)


def sharing(*tables: str) -> tuple[Authority, Holding]:
    """An authority without workers, and a cache that shares *tables*."""
    authority, holding = Authority(0.0, 1), Holding()
    assert not holding.may_keep(tables, 0.0)
    assert authority.attend("c", 0.0, 0, holding.wanted)
    tell(authority, holding, 0.1)
    assert holding.may_keep(tables, 0.1)
    return authority, holding


def tell(authority: Authority, holding: Holding, now: float) -> list[list[str] | None]:
    """The cache attends, and hears; what it is to drop."""
    assert authority.attend("c", now, holding.done, holding.wanted)
    answer = authority.answer("c", now, now)
    assert answer is not None
    return list(holding.heard(now, *answer))


def test_workers_ask_while_there_is_a_cache_and_a_little_longer() -> None:
    authority = Authority(0.0, 1)
    assert authority.era == 0
    assert authority.intend("w", {1: "t"}, 0.0) == {}
    assert authority.attend("c", 0.0, 0, ())
    era = authority.era
    assert era > 1
    authority.leave("c")
    authority.expire(core.IDLE - 0.1)
    assert authority.era == era
    authority.expire(core.IDLE + LEASE)
    assert authority.era == 0
    assert authority.attend("d", 20.0, 0, ())
    assert authority.era > era


def test_what_others_have_written_is_dropped_and_may_be_had_again() -> None:
    authority, holding = sharing("t", "u", CATALOGUE)
    authority.changed(["t", "x"])
    assert tell(authority, holding, 0.2) == [["t"]]
    assert not holding.may_keep(("t",), 0.2)
    tell(authority, holding, 0.3)
    assert holding.may_keep(("t", "u"), 0.3)
    authority.changed(None)
    assert tell(authority, holding, 0.4) == [["t", "u"]]
    assert holding.may_keep((CATALOGUE,), 0.4)


def test_a_holder_that_does_not_hear_what_it_is_told_loses_its_lease() -> None:
    authority, holding = sharing("t")
    authority.expect("w", 0.2)
    assert authority.attend("h", 0.2, 0, (), Report("w", authority.era, 0.2, 0, {}))
    waits = authority.intend("w", {1: "t"}, 0.3)
    assert waits is not None
    assert not authority.may_write(waits, 0.3)
    now = 0.3
    while not authority.may_write(waits, now):
        now += 0.5
        assert now < 0.3 + 2 * LEASE
        if authority.attend("c", now, holding.done, ()):
            authority.answer("c", now, now)  # lost


def test_a_time_of_another_clock_does_not_make_a_worker_heard() -> None:
    authority = Authority(100.0, 1)
    authority.expect("w", 100.0)
    assert authority.attend("c", 100.0, 0, ())
    assert authority.attend("h", 100.0, 0, (), Report("w", authority.era, 500_000.0, 0, {}))
    assert authority.answer("c", 100.0, 101.0) == (True, [])
    assert authority.attend("c", 101.5, 0, ())
    assert authority.answer("c", 101.5, 100.01 + core.HEARD) == (False, [])


def test_a_process_shares_so_many_tables_at_most() -> None:
    holding = Holding()
    assert not holding.may_keep([str(number) for number in range(MOST_SHARED)], 0.0)
    assert not holding.may_keep(["one more"], 0.0)
    assert len(holding.wanted) == MOST_SHARED


WEIGHTS = {"tick": 0.25, "crash": 0.01, "kill": 0.01, "give": 0.1, "begin": 0.3, "over": 0.3, "ping": 2.0}
"""How often something happens, when it may, next to all that is not named: by what happens, or also to whom."""


SILENT = {"poll w0": 0.02, "intend w0": 0.02, "begin w0": 1.0, "crash": 0.0, "kill": 0.0}
"""That of a world in which a worker is hardly ever heard."""


def walk(
    world: World, limits: dict[str, int], rng: random.Random, steps: int, rates: dict[str, float] = WEIGHTS
) -> Counter[str]:
    """One way through the worlds, by chance, checked at each step; how often which thing happened."""
    told: list[str] = []
    for _ in range(steps):
        moves = list(world.moves(limits))
        weights = [rates.get(" ".join(name.split()[:2]), rates.get(name.split()[0], 1.0)) for name, _ in moves]
        ((name, move),) = rng.choices(moves, weights)
        told.append(name)
        move(world)
        try:
            world.check()
        except AssertionError as error:
            raise AssertionError(f"{error}, after: {'; '.join(told)}") from None
    return Counter(step.split()[0] for step in told) + Counter(held=world.held)


NO_LIMITS = {"ticks": 10_000, "writes": 10_000, "crashes": 2, "kills": 1, "reads": 10_000}


def test_in_every_order_of_a_small_world_nobody_holds_what_is_written() -> None:
    limits = {"ticks": 1, "writes": 1, "crashes": 0, "kills": 0, "reads": 1}
    assert explore(World(1, 1, "t"), limits, 4_000) > 1_000


SIZES = [(1, 1, "t"), (2, 1, "t"), (1, 2, "tu"), (2, 2, "tu"), (1, 1, "tu", True), (1, 2, "tu", True)]


def walks(rng: random.Random, count: int, rates: dict[str, float] = WEIGHTS) -> Counter[str]:
    """Ways through worlds of several sizes; what happened."""
    return sum((walk(World(*SIZES[n % 6]), NO_LIMITS, rng, 500, rates) for n in range(count)), Counter())


def all_sorts(rng: random.Random, count: int) -> Counter[str]:
    """The same, one of each size and sort *count* times."""
    return sum((walks(rng, 6) + walks(rng, 6, WEIGHTS | SILENT) for _ in range(count)), Counter())


def test_on_long_ways_through_larger_worlds_neither(rng: random.Random) -> None:
    happened = all_sorts(rng, 15)
    print(happened)
    assert all(happened[what] > 20 for what in ("held", "send", "over", "allow", "crash", "buried", "store", "look"))


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("widens", [True, False])
def test_what_runs_while_the_catalogue_changes_may_write_to_anything(
    silent: bool, widens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(1, 2, "tu", changes=True)
    (cache,), (first, second) = world.caches, world.workers

    def talk(*whom: Cache | Worker) -> None:
        """All of these hear, and are heard."""
        for who in whom * 4:
            if who.asked is None:
                world._poll(who)
            while world.mail:
                world._deliver(world.mail.pop(0))
            for key in list(world.polls):
                world._answer(key)
            for n in reversed(range(len(world.intends))):
                if world.authority.may_write(world.intends[n][3], world.now):
                    world._allow(n)
            while world.mail:
                world._deliver(world.mail.pop(0))

    def write(worker: Worker, what: str) -> None:
        world._begin(worker, what)
        world._intend(worker, what)
        talk(cache, *([second] if silent and worker is second else [first, second]))

    talk(cache)
    for worker in (first, second):
        world._ping(worker)
    talk(cache, first, second)
    world._look(first)
    write(first, "t")
    assert [intent.table for intent in first.waits["t"]] == ["t"]
    world._send(first, "t")
    if not widens:
        monkeypatch.setattr(World, "_widen", lambda self, worker: None)
    if silent:  # a poll fails, and it begins anew; the lease that it had runs out
        world._poll(first)
        world.mail.clear()
        world._begin_anew(first)
    write(second, CATALOGUE)
    for _ in range(6):
        if silent and not second.waits[CATALOGUE][0].allowed:
            world._tick()
            talk(cache, first, second)
    world._send(second, CATALOGUE)
    world._over(second, CATALOGUE)
    for _ in range(3):
        world._tick()
        talk(cache, first, second)
        world._read(cache, "u")
        world._see(cache, "u")
        world._store(cache, "u")
        if widens:
            world.check()
    if widens:
        assert cache.stored == {}
        world._over(first, "t")
        talk(cache, first, second)
        world._tick()
        talk(cache, first, second)
        assert cache.holding.may_keep(("u",), world.now)
    else:
        with pytest.raises(AssertionError, match="holds u while w0 writes it"):
            world.check()


def _wrong(owner: Any, name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(owner, name, value)


def _answer_and_renew(self: Authority, who: str, received: float, now: float) -> Any:
    for worker in self._workers.values():
        worker.heard = now
    return _answer(self, who, received, now)


_answer, _attend, _grant, _start = Authority.answer, Authority.attend, Authority._grant, Authority.__init__
_heard = Holding.heard


def _told_nothing(
    self: Authority, who: str, received: float, done: int, wants: Any, report: Report | None = None
) -> bool:
    return _attend(self, who, received, done, wants, None if report is None else report._replace(intents={}))


def _deaf(self: Holding, sent: float, renews: bool, events: Any) -> Any:
    return _heard(self, sent, renews, [event for event in events if event[1] == "share"])


def _hasty(self: Authority, now: float, era: int, active: bool = False) -> None:
    _start(self, now, era, active)
    self._from = now


def _grants_blindly(self: Authority) -> None:
    workers, self._workers = self._workers, {}
    _grant(self)
    self._workers = workers


WRONG = {
    "a write waits for nobody": _wrong(Authority, "may_write", lambda *_: True),
    "a lease never ends for its holder": _wrong(
        Holding,
        "unchanged",
        lambda self, tables, mark, now: all(t in self._since and self._since[t] <= mark for t in tables),
    ),
    "leases go on though a worker is not heard": _wrong(Authority, "answer", _answer_and_renew),
    "a new authority does not wait for old leases": _wrong(Authority, "__init__", _hasty),
    "what is written is granted": _wrong(Authority, "_open", lambda self, worker, number, table: None),
    "workers do not tell what they write": _wrong(Authority, "attend", _told_nothing),
    "a worker does not wait long enough alone": _wrong(
        Intents, "may_write_alone", lambda self, now: now >= self.word + LEASE / 2
    ),
    "a cache does not drop what it is told to": _wrong(Holding, "heard", _deaf),
    "tables are granted before all workers are heard": _wrong(Authority, "_grant", _grants_blindly),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_protocol_with_a_fault_is_found_out(wrong: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    WRONG[wrong](monkeypatch)
    with pytest.raises(AssertionError, match="after:"):
        all_sorts(rng, 300)
