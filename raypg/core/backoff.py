"""Waiting longer after each failure, and never all at the same time.

Randomness is passed in (a number from ``random.random()``), so the results can be tested exactly.
"""

from __future__ import annotations

import math

__all__ = ["Backoff", "jittered"]


class Backoff:
    """Delays that grow geometrically up to a bound.

    Args:
        first: longest first delay, in seconds.
        most: longest delay ever, in seconds.
        factor: by how much the delay grows with each failure.
        jitter: part of each delay that is random: 0.5 draws from the upper half, 1.0 from 0 to the whole.
    """

    __slots__ = ("_next", "factor", "first", "jitter", "most")

    def __init__(self, first: float, most: float, factor: float = 2.0, jitter: float = 0.5) -> None:
        if not 0 < first <= most < math.inf:
            raise ValueError(f"delays must satisfy 0 < first <= most < infinity, not first={first}, most={most}")
        if not 1 <= factor < math.inf:
            raise ValueError(f"factor must be at least 1, not {factor}")
        if not 0 <= jitter <= 1:
            raise ValueError(f"jitter must be between 0 and 1, not {jitter}")
        self.first = first
        self.most = most
        self.factor = factor
        self.jitter = jitter
        self._next = first

    def next(self, random_unit: float) -> float:
        """Seconds to wait after one more failure; ``random_unit`` is in [0, 1)."""
        delay = self._next
        self._next = min(self.most, delay * self.factor)
        return jittered(delay, self.jitter, random_unit)

    def reset(self) -> None:
        """It worked: begin with ``first`` again."""
        self._next = self.first

    def __repr__(self) -> str:
        return f"<Backoff next {self._next:g} s, at most {self.most:g} s>"


def jittered(value: float, fraction: float, random_unit: float) -> float:
    """``value``, shortened by up to ``fraction`` of it.

    Never lengthened: a limit such as the lifetime of a connection stays a limit.

    Args:
        value: seconds.
        fraction: 0 (none) to 1.
        random_unit: in [0, 1).
    """
    return value * (1 - fraction * random_unit)
