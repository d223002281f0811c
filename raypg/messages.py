"""The messages between handles and actors: plain tuples and dicts, never classes of a library or of the user.

Caller → worker::

    run(client, job, number, runs)     runs = [Run, …]; a Run is one SQL text with the parameters of many calls
    collect(client)                    what finished since the last answer, when ``run`` answered before the end
    cancel(client, number, position)   one caller of a batch left; nobody else is touched

Worker → caller::

    Reply = (load, open, [Part, …], epoch)    load = callers waiting, open = batches of this client not finished yet,
                                              epoch = that of the membership, as far as the worker knows

A statement of a batch is known by its *position*: its index, counted through the runs of the batch in order.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any, NamedTuple, TypeAlias

from raypg.naming import PROTOCOL
from raypg.portable import PortableError

# What is wanted of a statement. Small integers: they travel with every run.
FETCH = 0  # all rows
ROW = 1  # the first row, or none
STATUS = 2  # the command tag, as asyncpg's execute()
MANY = 3  # executemany(): the parameters are a list of rows, run as one atomic statement
BOTH = 4  # rows and command tag
BEGIN = 5  # the command tag, unless a transaction is open already; only on a lease

Arguments: TypeAlias = tuple[Any, ...]
Settings: TypeAlias = "tuple[tuple[str, str], ...] | None"
"""PostgreSQL settings for one statement, as (name, value), sorted by name."""

Seen: TypeAlias = "tuple[int, int, tuple[str, ...]]"
"""A :class:`raypg.core.seen.Token` as a plain tuple."""

Where: TypeAlias = "tuple[float | None, Seen | None] | tuple[float | None, Seen | None, tuple[str, ...]]"
"""That a replica may answer: (most seconds that its data may be old, or None; what it must show, or None; addresses of
replicas that were found slow at this statement, asked only if no other will do)."""

Note: TypeAlias = "tuple[str, bool, tuple[int, int, tuple[str, ...]]]"
"""How a read that a replica may answer was answered: (the replica's address, or "" for the primary; whether a replica
has refused it because it writes; what the session has seen now, as a token)."""

Run: TypeAlias = "tuple[int, str, list[Arguments], float | None, Settings, Where | None]"
"""(mode, SQL, one tuple of parameters per call, timeout in seconds or None, settings or None, None = the primary)."""

Part: TypeAlias = (
    "tuple[int, list[int] | range, tuple[str, ...] | None, list[Any], dict[int, PortableError] | None, Note | None]"
)
"""(batch number, positions, column names, one payload per position, errors by index into positions, the note of all of
them)."""

Reply: TypeAlias = "tuple[int, int, list[Part], int]"

Place: TypeAlias = "tuple[int, str, str, int, str | None, bool]"
"""A worker in the membership: (number, name of its actor, node, share of the budget, its life, whether it drains)."""


class Finished(NamedTuple):
    """The outcome of one statement: exactly one of *payload* (with *names* for rows) and *error* counts."""

    payload: Any
    names: tuple[str, ...] | None
    error: PortableError | None


_BYTES_PER_ITEM: dict[type, int] = {
    str: 1,
    bytes: 1,
    bytearray: 1,
    memoryview: 1,
    list: 24,
    tuple: 24,
    dict: 24,
    set: 24,
}


def size_of(arguments: Arguments) -> int:
    """A cheap estimate of the bytes that *arguments* take in a message: long values counted, the rest guessed."""
    size = 24
    for value in arguments:
        per_item = _BYTES_PER_ITEM.get(type(value))
        size += 16 if per_item is None else 16 + per_item * len(value)
    return size


def finished_of(part: Part) -> Iterator[tuple[int, Finished]]:
    """The outcomes in *part*: pairs of position and :class:`Finished`."""
    _, positions, names, payloads, failed, _ = part
    for index, position in enumerate(positions):
        error = failed.get(index) if failed else None
        yield position, Finished(payloads[index], names, error)


def hello() -> dict[str, Any]:
    """Who we are: the first message of every handle to a pool."""
    return {**_versions()}


@functools.cache  # to read them takes longer than all else that a process does to join a pool
def _versions() -> dict[str, Any]:
    return {
        "protocol": PROTOCOL,
        "raypg": version("raypg"),
        "ray": version("ray"),
        "python": ".".join(platform.python_version_tuple()[:2]),
    }
