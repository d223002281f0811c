"""The health of one connection: a score from 0 to 100 of how it has served lately.

Only what says something about the connection or its server moves it; a user's wrong SQL does not. A connection that
does not answer a ping at all is not scored but replaced.
"""

from __future__ import annotations

from typing import Final

__all__ = ["FULL", "after_error", "after_ping"]

FULL: Final = 100.0
"""The score of a new connection."""


def after_error(score: float) -> float:
    """The score after a statement failed in a way that is the server's fault, and the connection lives."""
    return max(0.0, score - 10.0)


def after_ping(score: float) -> float:
    """The score after a ping was answered."""
    return min(FULL, score + 5.0)
