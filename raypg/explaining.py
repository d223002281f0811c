"""What ``pipeline.explain()`` says."""

from __future__ import annotations

from dataclasses import dataclass

from raypg.channel import WorkerGone
from raypg.core.sql import shorten
from raypg.dispatch import Dispatcher
from raypg.errors import UnavailableError
from raypg.portable import unpack_error

__all__ = ["PlanStep", "explained"]


@dataclass(frozen=True, slots=True)
class PlanStep:
    """How queries of one text, that were added one after the other, would travel.

    Attributes:
        first: id of the first of them.
        count: how many.
        statement: their text, without literals, shortened.
        lane: ``single`` (each its own transaction, several in one write to the server), ``many`` (a group is one
            transaction) or ``unnest`` (a group is one statement).
        reason: why not by a faster lane; or why by this one.
    """

    first: str
    count: int
    statement: str
    lane: str
    reason: str

    def __str__(self) -> str:
        return f"{self.count} × [{self.statement}]: {self.lane} ({self.reason})"


async def explained(
    dispatcher: Dispatcher, texts: list[tuple[str, int]], how: tuple[str, int, bool, bool], prefix: str, first: int
) -> list[PlanStep]:
    """Ask a worker how queries of these (text, count) would travel.

    Raises:
        UnavailableError: the catalogue cannot be asked now.
    """
    if not texts:
        return []
    channel = await dispatcher.channel()
    try:
        kind, steps = await channel.ask("explain", dispatcher.job, texts, how)
    except WorkerGone:
        raise UnavailableError("the worker died that was asked; ask again") from None
    if kind == "error":
        raise unpack_error(steps)
    at = {}
    position = 0
    for text, count in texts:
        at[position] = text
        position += count
    return [
        PlanStep(f"{prefix}{first + begin}", count, shorten(at[begin]), lane, reason)
        for begin, count, lane, reason in steps
    ]
