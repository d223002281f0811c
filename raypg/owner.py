"""Who holds a lease, in words for ``get_status`` and ``raypg status``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import ray

from raypg import _compat

_SERVE_REPLICA = "SERVE_REPLICA::"  # what Ray Serve's names of actors begin with

_task: ContextVar[str | None] = ContextVar("raypg_task", default=None)


@contextlib.contextmanager
def named() -> Iterator[None]:
    """What is handed to the background loop inside the block is done for this task. There, Ray knows of none."""
    token = _task.set(_task_name())
    try:
        yield
    finally:
        _task.reset(token)


def describe(client: str) -> dict[str, Any]:
    """Who asks now.

    Args:
        client: the dispatcher's identity towards its workers.

    Returns:
        ``held_by``: the rest in one line; ``job``, ``node``: Ray's ids; ``actor``: id of the actor, or ``None``;
        ``actor_name``: its name, or ``None``; ``task``: name of the task, ``Class.method`` in an actor, ``driver`` in a
        driver, empty in a thread that a task made; ``process``: its process id; ``client``.
    """
    context = ray.get_runtime_context()
    actor = context.get_actor_id()
    name = (context.get_actor_name() or None) if actor else None
    task = _task.get()
    if task is None:
        task = _task_name()
    return {
        "held_by": _in_words(actor, name, task),
        "job": context.get_job_id(),
        "node": context.get_node_id(),
        "actor": actor,
        "actor_name": name,
        "task": task,
        "process": os.getpid(),
        "client": client,
    }


def _task_name() -> str:
    # A driver has no task, its threads neither. A thread that a task made has one without a name.
    return "driver" if _compat.is_driver() else ray.get_runtime_context().get_task_name() or ""


def _in_words(actor: str | None, name: str | None, task: str) -> str:
    if actor is None:
        return task if task == "driver" else f"task {task}" if task else "a thread of a task"
    if name is not None and name.startswith(_SERVE_REPLICA):
        return f"Serve replica {name.removeprefix(_SERVE_REPLICA)}"
    who = f"actor {name or actor[:12]}"
    return f"{who}, {task}" if task else who
