"""Which replica is to answer a read: what is known of each, how far it is behind, and how long it would take.

How old a replica's data is, is measured against the primary alone: it was asked from time to time how far its log had
come, and whoever has replayed up to one of those places is no older than that answer. So an idle primary makes nobody
late, and clocks of different machines are not compared.

Pure: times are passed in, in seconds of any one clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeVar

__all__ = ["Candidate", "PrimaryLog", "Role", "Service", "Standing", "fastest"]

Kind = Literal["unknown", "standby", "primary", "foreign"]

CLOSEST: Final = 0.05
"""Seconds between two samples of the primary's log that are kept apart."""

MOST_SAMPLES: Final = 2400
"""Samples that are kept: ten minutes, at four a second."""

BELIEVED: Final = 5.0
"""Seconds after which half of what is known of a replica's speed is forgotten: who was slow gets another chance."""

UNASKED: Final = "it was not asked yet"

ALIKE: Final = 1.25
"""Replicas whose times differ by less than this factor take turns."""


class Role(NamedTuple):
    """What a server says of itself.

    Attributes:
        recovering: whether it is a standby.
        system: identifier of the cluster, the same for a primary and its standbys.
        life: name of the life of its process; a restart gives another.
        timeline: 0 if it does not tell.
        lsn: end of its log: flushed on a primary, replayed on a standby.
        age: on a standby, seconds since the last transaction was committed that it has replayed, by its clocks; None =
            none yet.
    """

    recovering: bool
    system: int
    life: str
    timeline: int
    lsn: int
    age: float | None


@dataclass(slots=True)
class Standing:
    """What is known of a replica.

    Attributes:
        address: as the user named it.
        kind: what it is to us.
        name: its name in tokens; changes when what it has replayed may have gone back.
        timeline: 0 = not known.
        replayed: it has replayed the log up to here.
        at: when it was asked.
        age: see :class:`Role`.
        problem: why it is not used; empty if it is.
    """

    address: str
    kind: Kind = "unknown"
    name: str = ""
    timeline: int = 0
    replayed: int = 0
    at: float = -math.inf
    age: float | None = None
    problem: str = UNASKED


class _Sample(NamedTuple):
    """The primary's log ended at ``lsn`` when it was asked first, and when it was asked last, and in between."""

    first: float
    last: float
    lsn: int


class PrimaryLog:
    """How far the primary's log had come, and when."""

    def __init__(self) -> None:
        self.timeline = 0
        self.system = 0
        self._samples: deque[_Sample] = deque(maxlen=MOST_SAMPLES)

    @property
    def lsn(self) -> int:
        """Where it was when it was asked last; 0 = never."""
        return self._samples[-1].lsn if self._samples else 0

    def note(self, asked_at: float, role: Role) -> None:
        """The primary has answered a question that was asked at that time."""
        if role.timeline != self.timeline or role.system != self.system:
            self._samples.clear()  # places on another timeline mean something else
            self.timeline, self.system = role.timeline, role.system
        samples = self._samples
        first = asked_at
        if samples and samples[-1].lsn == role.lsn:
            first = samples.pop().first
        elif len(samples) > 1 and asked_at - samples[-2].last < CLOSEST:
            samples.pop()
        samples.append(_Sample(first, asked_at, role.lsn))

    def staleness(self, replayed: int, now: float) -> float:
        """Seconds, at most, by which data that was replayed up to there is older than the primary's; inf = not known.

        A replica that is up to date counts as old as the last answer of the primary."""
        for sample in reversed(self._samples):
            if sample.lsn <= replayed:
                return max(0.0, now - sample.last)
        return math.inf

    def lag(self, standing: Standing) -> float:
        """Seconds that a replica was behind when it was asked, 0 if it had replayed all that the primary was known to
        have; NaN = not known."""
        if standing.kind != "standby" or not self._samples:
            return math.nan
        behind = False
        for sample in reversed(self._samples):
            if sample.first > standing.at:
                continue
            if sample.lsn <= standing.replayed:
                return max(0.0, standing.at - sample.last) if behind else 0.0
            behind = True
        # It was behind already when we began to ask.
        return max(standing.at - self._samples[0].first, standing.age or 0.0) if behind else 0.0

    def lag_bytes(self, standing: Standing) -> int | None:
        """Bytes of the log that a replica had not replayed when it was asked; None = not known."""
        if standing.kind != "standby" or not self._samples:
            return None
        known = next((sample.lsn for sample in reversed(self._samples) if sample.first <= standing.at), 0)
        return max(0, known - standing.replayed)


class Service:
    """How long reads take on one server, lately."""

    __slots__ = ("_at", "_seconds")

    def __init__(self) -> None:
        self._seconds = 0.0
        self._at = 0.0

    def note(self, seconds: float, now: float) -> None:
        """A read took so long."""
        self._seconds += (seconds - self._seconds) * (0.1 if self._seconds else 1.0)
        self._at = now

    def expected(self, now: float) -> float:
        """Seconds that the next one may take."""
        age = max(0.0, now - self._at)
        return self._seconds * math.pow(0.5, age / BELIEVED)


class Candidate(NamedTuple):
    """A replica that could answer.

    Attributes:
        service: seconds that a read takes there.
        busy: reads that run there, or wait.
        connections: that it may have.
        extra: seconds that pass before it may be asked.
        turn: number of the last choice that fell on it.
    """

    service: float
    busy: int
    connections: int
    extra: float
    turn: int

    @property
    def seconds(self) -> float:
        """In how many seconds it is expected to have answered."""
        return self.service * (1 + self.busy / max(1, self.connections)) + self.extra


Key = TypeVar("Key")


def fastest(candidates: Sequence[tuple[Key, Candidate]]) -> Key | None:
    """The one that is expected to have answered first; those that are about equal take turns."""
    if not candidates:
        return None
    limit = min(candidate.seconds for _, candidate in candidates) * ALIKE
    alike = [(key, candidate) for key, candidate in candidates if candidate.seconds <= limit]
    return min(alike, key=lambda pair: pair[1].turn)[0]


def judge(role: Role, primary: PrimaryLog) -> tuple[Kind, str]:
    """What a server that was named as a replica is, and why it is not to be used; the latter is empty if it is."""
    if primary.system and role.system != primary.system:
        return "foreign", "it belongs to another database cluster than the primary: check its connection string"
    if not role.recovering:
        return "primary", "it is no standby: it has been promoted, or never was one"
    if primary.timeline and role.timeline and role.timeline != primary.timeline:
        return "standby", f"it follows timeline {role.timeline}, the primary is on {primary.timeline}"
    return "standby", ""
