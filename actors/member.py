"""A worker as its Pool actor knows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from ray.actor import ActorHandle

PING_EVERY = 1.0
"""Seconds between two rounds of pings."""

Life: TypeAlias = "tuple[int, str]"
"""(number of the worker, incarnation): the one that holds connections."""

State = Literal["starting", "serving", "draining", "lost"]


@dataclass(eq=False)
class Member:
    """A worker."""

    index: int
    name: str
    node: str
    handle: ActorHandle[Any]
    answered_at: float
    asked_at: float = 0.0  # when the first ping was sent that it has not answered since
    state: State = "starting"
    incarnation: str | None = None
    clock: float | None = None  # of its last answer
    unanswered: int = 0
    open: int = 0  # connections that it had at its last answer
    unconfirmed: list[tuple[int, int]] = field(default_factory=list)  # (server, process id)
    gone: list[tuple[int, int]] = field(default_factory=list)
    draining: bool = False

    @property
    def life(self) -> Life | None:
        """The key of its account; ``None`` before its first answer."""
        return None if self.incarnation is None else (self.index, self.incarnation)

    def asked(self, now: float) -> None:
        """It is sent a ping."""
        if self.asked_at <= self.answered_at:
            self.asked_at = now

    def silent(self, now: float) -> float:
        """Seconds for which it should have been heard. Not those in which nobody asked: a Pool actor that was held up
        itself must not take those for lost that it did not listen to."""
        if self.asked_at <= self.answered_at:
            return 0.0
        return now - max(self.answered_at, self.asked_at - PING_EVERY)

    def is_lost(self) -> bool:
        """Whether it is silent, and nobody knows why."""
        return self.state == "lost"
