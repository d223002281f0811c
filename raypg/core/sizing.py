"""How a pool's connections are divided."""

from __future__ import annotations

__all__ = ["divide", "share"]


def divide(cap: int, workers: int, control_needs: int = 4) -> list[int]:
    """Shares of the workers: even, at least one each, the remainder to the first.

    Args:
        cap: most connections of the whole pool.
        workers: how many share them.
        control_needs: smallest cap of which one connection is kept for raypg's own questions. Below it that
            one is borrowed when it is needed: to keep it would cost too much of the pool.

    Returns:
        Connections per worker; their sum is the cap, less the one for control.

    Raises:
        ValueError: there is less than one connection for each worker, or a number makes no sense.
    """
    if cap < 1:
        raise ValueError(f"a pool needs at least 1 connection, not {cap}")
    if workers < 1:
        raise ValueError(f"a pool needs at least 1 worker, not {workers}")
    reserve = 1 if cap >= control_needs and cap > 1 else 0
    usable = cap - reserve
    if workers > usable:
        kept = ", one of them for control" if reserve else ""
        raise ValueError(f"{workers} workers cannot share {cap} connections{kept}: each needs at least one")
    each, remainder = divmod(usable, workers)
    return [each + 1] * remainder + [each] * (workers - remainder)


def share(total: int, part: int, whole: int) -> int:
    """What one worker has to keep of *total*, by its *part* of the *whole* budget; rounded up, so that all of them
    together keep no less. 0 without a budget."""
    return -(-total * part // whole) if whole else 0
