"""How many connections each of several workers is to have."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import TypeVar

__all__ = ["check", "reserve", "share", "targets"]

Key = TypeVar("Key", bound=Hashable)

CONTROL_NEEDS = 4
"""Smallest cap of which one connection is kept for control: to count connections, and to end those of dead workers.
Below it that one is borrowed when it is needed: to keep it would cost too much of the pool."""

STARVED = 0.2
"""Part of its share that a worker must lack before others give up some of theirs: to move a connection costs closing
one and opening one."""


def reserve(cap: int) -> int:
    """Connections of *cap* that are kept for control: 1 or 0."""
    return 1 if cap >= CONTROL_NEEDS else 0


def check(cap: int, workers: int, servers: int = 1) -> None:
    """Whether *workers* may share *cap* connections.

    Args:
        servers: that each worker connects to: the primary, and its replicas.

    Raises:
        ValueError: there is less than one connection for each worker and server, or a number makes no sense.
    """
    if cap < 1:
        raise ValueError(f"a pool needs at least 1 connection, not {cap}")
    if workers < 1:
        raise ValueError(f"a pool needs at least 1 worker, not {workers}")
    if workers * servers > cap - reserve(cap):
        kept = ", one of them for control" if reserve(cap) else ""
        who = f"{workers} workers" if workers > 1 or servers == 1 else "one worker"
        each = "" if servers == 1 else f" to each of {servers} servers"
        raise ValueError(f"{who} cannot share {cap} connections{kept}: each needs at least one{each}")


def share(total: int, part: int, whole: int) -> int:
    """What one worker has to keep of *total*, by its *part* of the *whole* budget; rounded up, so that all of them
    together keep no less. 0 without a budget."""
    return -(-total * part // whole) if whole else 0


def targets(total: int, current: Mapping[Key, int], wanted: Mapping[Key, float]) -> dict[Key, int]:
    """Divide *total* connections among workers.

    Everybody has one, as far as they go. Beyond that nothing moves unless it must: because somebody's work lacks
    connections that others have no work for (or less work), or because there are more or fewer connections to divide.
    What is short is divided in proportion to demand, never beyond it; what is left, evenly.

    Args:
        total: connections to divide.
        current: what each has now; the keys are those who share.
        wanted: connections that each has work for.

    Returns:
        What each is to have; the sum is *total*, if there is anybody.
    """
    if not current:
        return {}
    if sum(current.values()) == total and all(current.values()) and not _starved(total, current, wanted):
        return dict(current)
    keys = list(current)
    result = dict.fromkeys(keys, 0)
    left = total
    for key in sorted(keys, key=lambda key: (-min(wanted[key], 1.0), -current[key]))[:left]:
        result[key] = 1
        left -= 1
    # D'Hondt's highest averages, each claim ending where demand does.
    while left > 0 and (short := [key for key in keys if result[key] < wanted[key]]):
        best = max(short, key=lambda key: (wanted[key] / (result[key] + 1), current[key]))
        result[best] += 1
        left -= 1
    while left > 0:
        least = min(keys, key=lambda key: (result[key], -current[key]))
        result[least] += 1
        left -= 1
    return result


def _starved(total: int, current: Mapping[Key, int], wanted: Mapping[Key, float]) -> bool:
    """Whether somebody lacks enough to be worth a move, and is due more than it has."""
    demand = sum(wanted.values())
    for key, share in current.items():
        lacks = min(wanted[key], total) - share
        due = total * wanted[key] / demand if demand > total else wanted[key]
        if min(lacks, due - share) >= max(1.0, math.ceil(STARVED * share)):
            return True
    return False
