"""How much the handles of one database may have under way: bytes, handed out in bulk for about a second.

A credit is the right to have so many bytes of statements under way at a time. What the database may be given is divided
over the jobs that ask, and within a job over its clients: who wants less than its share gets all it wants, and the
others share what is left (max-min fairness).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["LEAST", "SECONDS", "Ledger", "shares"]

SECONDS: Final = 1.0
"""For which a credit is good."""

GRACE: Final = 1.0
"""Seconds more until a client that does not ask again is forgotten."""

LEAST: Final = 256_000
"""Bytes that every client is given, however many there are: a client without credit would stand still."""


def shares(wanted: dict[str, int], whole: int) -> dict[str, int]:
    """Divide *whole* over those who want something: nobody gets more than it wants, and who gets less than it wants
    gets as much as anybody else."""
    granted: dict[str, int] = {}
    left = whole
    for position, (key, want) in enumerate(sorted(wanted.items(), key=lambda item: item[1])):
        granted[key] = min(want, left // (len(wanted) - position))
        left -= granted[key]
    return granted


@dataclass(slots=True)
class _Claim:
    job: str
    wanted: int
    until: float


class Ledger:
    """The credits of one pool.

    Args:
        capacity: bytes that all clients together may have under way.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._claims: dict[str, _Claim] = {}

    def __len__(self) -> int:
        return len(self._claims)

    def take(self, client: str, job: str, wanted: int, now: float) -> int:
        """*client* of *job* wants *wanted* bytes for the next :data:`SECONDS`; returns how many it gets."""
        self.expire(now)
        self._claims[client] = _Claim(job, max(wanted, LEAST), now + SECONDS + GRACE)
        jobs: dict[str, dict[str, int]] = {}
        for name, claim in self._claims.items():
            jobs.setdefault(claim.job, {})[name] = claim.wanted
        by_job = shares({name: sum(clients.values()) for name, clients in jobs.items()}, self.capacity)
        return max(LEAST, shares(jobs[job], by_job[job])[client])

    def leave(self, client: str) -> None:
        """*client* wants nothing more."""
        self._claims.pop(client, None)

    def expire(self, now: float) -> None:
        """Forget clients that have not asked again."""
        for client in [name for name, claim in self._claims.items() if claim.until <= now]:
            del self._claims[client]
