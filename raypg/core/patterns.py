"""What is learnt of statements while they run: how long each takes where, what it gains to keep its results, or to send
several of it together, and which come most often.

All figures age: half of what was learnt counts for nothing after :data:`HALF_LIFE`. What is learnt changes where and
how something is asked, never what is answered. Pure: times are passed in, in seconds of any one clock.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final

from raypg.core.statements import Statement, identify, shown

__all__ = ["HALF_LIFE", "FoldGain", "Frequent", "Pattern", "Patterns"]

HALF_LIFE: Final = 300.0
"""Seconds after which half of what was learnt is forgotten."""

LEAST: Final = 8.0
"""Observations, aged, from which something counts as learnt."""

TRY_EVERY: Final = 16
"""What was learnt to be of no use is tried again each so many times: the load may have changed."""

SLOWER: Final = 1.5
"""How much longer than the best a replica takes that is asked only if no other will do."""

AVERAGED_OVER: Final = 64.0
"""Observations that a mean is taken over."""

LEAST_GAIN: Final = 1.05
"""How much faster reads must be together than one by one."""

KEEP_SECONDS: Final = 30e-6
"""What it takes to keep a result (measured for some rows)."""

HIT_SECONDS: Final = 20e-6
"""What it takes to give a result that is kept."""

DROP_SECONDS: Final = 500e-6
"""What it takes a writer to have a result dropped before it may write: a message to and fro."""

RATE_HALF_LIFE: Final = 60.0
RATE_FROM: Final = 10.0
"""Seconds of observation from which a rate is known."""


class Pattern:
    """One fingerprint.

    Attributes:
        count: calls, aged.
        kept, used, dropped: results of it that were kept and have ended, aged; how often those had been used; how many
            of them were dropped because of a write.
        saved: seconds that hits have saved, aged.
    """

    __slots__ = (
        "_asked_slow",
        "_at",
        "_targets",
        "_tries",
        "command",
        "count",
        "dropped",
        "fingerprint",
        "kept",
        "saved",
        "text",
        "used",
    )

    def __init__(self, statement: Statement, text: str, now: float) -> None:
        self.fingerprint = statement.fingerprint
        self.command = statement.command
        self.text = text
        self.count = self.kept = self.used = self.dropped = self.saved = 0.0
        self._targets: dict[str, list[float]] = {}  # target → [asked, seconds, rows], aged
        self._at = now
        self._tries = self._asked_slow = 0

    def _age(self, now: float) -> None:
        if now - self._at < 1.0:
            return
        factor = math.pow(0.5, (now - self._at) / HALF_LIFE)
        self._at = now
        self.count *= factor
        self.kept *= factor
        self.used *= factor
        self.dropped *= factor
        self.saved *= factor
        for figures in self._targets.values():
            for number in range(3):
                figures[number] *= factor

    # --- what happens ---

    def asked(self, target: str, seconds: float, rows: int, now: float) -> None:
        """*target* has answered."""
        self._age(now)
        self.count += 1
        figures = self._targets.setdefault(target, [0.0, 0.0, 0.0])
        figures[0] += 1
        figures[1] += seconds
        figures[2] += rows

    def hit(self, now: float) -> None:
        """What is kept was given."""
        self._age(now)
        self.count += 1
        self.saved += max(0.0, self.seconds - HIT_SECONDS)

    def ended(self, uses: int, dropped: bool, now: float) -> None:
        """A result that was kept is kept no more; *dropped*: because of a write."""
        self._age(now)
        self.kept += 1
        self.used += uses
        self.dropped += dropped

    # --- what follows ---

    @property
    def seconds(self) -> float:
        """What one call takes that is asked, on average; 0 if none was."""
        asked = sum(figures[0] for figures in self._targets.values())
        return sum(figures[1] for figures in self._targets.values()) / asked if asked else 0.0

    def by_target(self) -> dict[str, tuple[float, float, float]]:
        """Target → (calls, seconds of one, rows of one)."""
        return {
            target: (asked, seconds / asked, rows / asked)
            for target, (asked, seconds, rows) in self._targets.items()
            if asked > 0
        }

    def expected(self) -> dict[str, float]:
        """Target → seconds that a call takes there, of the targets of which that was learnt."""
        return {target: seconds for target, (asked, seconds, _) in self.by_target().items() if asked >= LEAST}

    def slow_ones(self, now: float) -> tuple[str, ...]:
        """See :meth:`Patterns.slow_ones`."""
        self._age(now)
        known = {target: seconds for target, seconds in self.expected().items() if target != "primary"}
        limit = min(known.values(), default=0.0) * SLOWER
        slow = tuple(sorted(target for target, seconds in known.items() if seconds > limit))
        if not slow:
            return ()
        self._asked_slow += 1
        return slow if self._asked_slow % TRY_EVERY else ()

    @property
    def keeping_gains(self) -> float | None:
        """Seconds that one kept result saves all in all, what keeping takes taken off; None = not learnt."""
        if self.kept < LEAST:
            return None
        saves = self.used / self.kept * (self.seconds - HIT_SECONDS)
        return saves - KEEP_SECONDS - self.dropped / self.kept * DROP_SECONDS

    def is_worth_keeping(self, now: float) -> bool:
        """Whether to keep the next result: not what is dropped before anybody asks again, nor what is asked faster."""
        self._age(now)
        gains = self.keeping_gains
        if gains is None or gains > 0:
            return True
        self._tries += 1
        return self._tries % TRY_EVERY == 0


class Patterns:
    """The patterns of one router.

    Args:
        most: fingerprints; beyond that those are forgotten that take and save least time.
    """

    def __init__(self, most: int = 1000) -> None:
        self._most = most
        self._known: dict[str, Pattern] = {}
        self._by_text: OrderedDict[str, Pattern] = OrderedDict()
        self._began: float | None = None
        self._recent = 0.0
        self._recent_at = 0.0

    def __len__(self) -> int:
        return len(self._known)

    def of(self, sql: str, now: float) -> Pattern:
        """The pattern of *sql*, a new one if need be."""
        found = self._by_text.get(sql)
        if found is not None and self._known.get(found.fingerprint) is found:
            return found
        statement = identify(sql)
        found = self._known.get(statement.fingerprint)
        if found is None:
            if len(self._known) >= self._most:
                self._shrink(now)
            found = self._known[statement.fingerprint] = Pattern(statement, shown(sql, statement), now)
        self._by_text[sql] = found
        if len(self._by_text) > 4 * self._most:
            self._by_text.popitem(last=False)
        return found

    def slow_ones(self, sql: str, now: float) -> tuple[str, ...]:
        """The replicas that take :data:`SLOWER` times as long for *sql* as the best of them, sorted; none each so many
        times, to find out whether that still holds. It also counts the call."""
        self.called(now)
        return self.of(sql, now).slow_ones(now)

    def called(self, now: float) -> None:
        """Some statement was called."""
        if self._began is None:
            self._began = self._recent_at = now
        if now - self._recent_at >= 1.0:
            self._recent *= math.pow(0.5, (now - self._recent_at) / RATE_HALF_LIFE)
            self._recent_at = now
        self._recent += 1

    def _shrink(self, now: float) -> None:
        """Forget a tenth: those of least value."""
        for pattern in self._known.values():
            pattern._age(now)
        least = sorted(self._known.values(), key=lambda pattern: pattern.count * pattern.seconds + pattern.saved)
        for pattern in least[: max(1, self._most // 10)]:
            del self._known[pattern.fingerprint]

    def insights(self, now: float, most: int = 20) -> dict[str, Any]:
        """What was learnt, for people: ``detected_patterns``, those first that take and save most time, and
        ``workload_forecast``; what is not known is not there."""
        for pattern in self._known.values():
            pattern._age(now)
        by_value = sorted(self._known.values(), key=lambda p: p.count * p.seconds + p.saved, reverse=True)
        found: dict[str, Any] = {}
        if by_value:
            found["detected_patterns"] = [_described(pattern) for pattern in by_value[:most]]
        forecast = self._forecast(now)
        if forecast:
            found["workload_forecast"] = forecast
        return found

    def _forecast(self, now: float) -> Mapping[str, float]:
        """The next minute, if it is as the last ones were, those that are nearest counting most."""
        if self._began is None or now - self._began < RATE_FROM:
            return {}
        aged = self._recent * math.pow(0.5, (now - self._recent_at) / RATE_HALF_LIFE)
        observed = 1.0 - math.pow(0.5, (now - self._began) / RATE_HALF_LIFE)
        rate = aged * math.log(2) / RATE_HALF_LIFE / observed
        return {"queries_per_second": rate, "expected_queries": rate * 60.0, "horizon_seconds": 60.0}


def _described(pattern: Pattern) -> dict[str, Any]:
    found: dict[str, Any] = {
        "fingerprint": pattern.fingerprint,
        "query_type": pattern.command,
        "query": pattern.text,
        "recent_calls": pattern.count,
    }
    targets = pattern.by_target()
    if targets:
        found["by_target"] = {
            target: {"recent_calls": asked, "avg_time_ms": seconds * 1000, "avg_rows": rows}
            for target, (asked, seconds, rows) in targets.items()
        }
    if pattern.kept:
        found["cache"] = {
            "uses_per_result": pattern.used / pattern.kept,
            "dropped_by_writes": pattern.dropped / pattern.kept,
            "saved_ms": pattern.saved * 1000,
        }
        gains = pattern.keeping_gains
        if gains is not None:
            found["cache"]["gain_per_result_ms"] = gains * 1000
    return found


class Frequent:
    """Which texts come most often, counted in fixed memory; aged, so that those of now win.

    Args:
        most: texts that are watched.
    """

    def __init__(self, most: int = 256) -> None:
        self._most = most
        self._counts: dict[str, float] = {}

    def note(self, text: str) -> None:
        """It has come once more."""
        counts = self._counts
        if text in counts:
            counts[text] += 1.0
            return
        if len(counts) >= self._most:
            # Who comes rarely goes; the others count half from now on.
            kept = sorted(counts.items(), key=lambda pair: pair[1], reverse=True)[: self._most // 2]
            self._counts = counts = {known: count / 2 for known, count in kept}
        counts[text] = 1.0

    def top(self, most: int, least: float = 2.0) -> list[str]:
        """Those that came most often, and *least* times at least."""
        ordered = sorted(self._counts.items(), key=lambda pair: pair[1], reverse=True)
        return [text for text, count in ordered[:most] if count >= least]


class FoldGain:
    """Whether several reads of one text in one write to the server are faster than one by one.

    They save trips, and what stands behind waits for what stands in front: where nearly all the time is the server's
    own, they gain nothing, and make some wait in vain while another connection is free.

    Args:
        most: texts that are watched; then those are forgotten that came first.
    """

    def __init__(self, most: int = 1000) -> None:
        self._most = most
        # Text → [alone, seconds of one, together, seconds of one, times it was held back]
        self._known: OrderedDict[str, list[float]] = OrderedDict()

    def note(self, text: str, seconds: float, together: bool) -> None:
        """One has taken so long on its connection."""
        known = self._known.get(text)
        if known is None:
            known = self._known[text] = [0.0, 0.0, 0.0, 0.0, 0.0]
            if len(self._known) > self._most:
                self._known.popitem(last=False)
        place = 2 if together else 0
        count = known[place] = min(known[place] + 1.0, AVERAGED_OVER)
        known[place + 1] += (seconds - known[place + 1]) / count

    def gain(self, text: str) -> float | None:
        """How many times as fast they are together; ``None`` = not learnt."""
        known = self._known.get(text)
        if known is None or min(known[0], known[2]) < LEAST or known[3] <= 0:
            return None
        return known[1] / known[3]

    def pays(self, text: str) -> bool:
        """Whether to send the next one with others."""
        gain = self.gain(text)
        if gain is None or gain >= LEAST_GAIN:
            return True
        known = self._known[text]
        known[4] += 1.0
        return known[4] % TRY_EVERY == 0
