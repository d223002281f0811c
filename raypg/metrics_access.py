"""Asking the Metrics actor."""

from __future__ import annotations

from typing import Any

from raypg import cluster
from raypg.asking import ask
from raypg.portable import unpack_error

__all__ = ["ask_metrics", "histories", "history", "newest", "snapshots"]

ANSWER_WITHIN = 15.0
"""Seconds in which the Metrics actor must answer: it may just be started, or hear again what its last life knew."""

_OTHERWISE = "the Metrics actor does not answer; statements run without it, try again"


async def snapshots(
    pools: list[str] | None = None,
    statements: int = 20,
    in_detail: bool = True,
    fresh: bool = True,
    notable: bool = False,
) -> dict[str, dict[str, Any]]:
    """Of each of *pools* (all if ``None``) what is known now; see :meth:`raypg.core.pool_metrics.PoolMetrics.snapshot`.

    Args:
        fresh: ask the workers for what happened until now; else it is what they told in the last second.

    Raises:
        UnavailableError: the Metrics actor does not answer, or has not heard of a pool yet.
    """
    return await ask_metrics("snapshot", pools, statements, in_detail, fresh, notable)  # type: ignore[no-any-return]


async def history(pool: str, series: str, seconds: float) -> tuple[int, list[tuple[int, float]]]:
    """The last *seconds* of one of :data:`raypg.core.history.SERIES`: (seconds of a step, [(time, value)]).

    Raises:
        ConfigError: no such series.
        UnavailableError: as :func:`snapshots`.
    """
    return await ask_metrics("history", pool, series, seconds)  # type: ignore[no-any-return]


async def histories(pool: str, seconds: float) -> tuple[int, int, dict[str, list[float]]]:
    """The last *seconds* of every series: (seconds of a step, when the first begins, series → values).

    Raises:
        UnavailableError: as :func:`snapshots`.
    """
    return await ask_metrics("histories", pool, seconds)  # type: ignore[no-any-return]


async def newest() -> dict[str, tuple[int, dict[str, float]]]:
    """Of each pool the last second that is over: (when it began, series → value).

    Raises:
        UnavailableError: the Metrics actor does not answer.
    """
    return await ask_metrics("newest")  # type: ignore[no-any-return]


async def ask_metrics(method: str, *arguments: Any, within: float = ANSWER_WITHIN) -> Any:
    """What a *method* of the Metrics actor answers.

    Raises:
        RaypgError: what it answers is an error.
        UnavailableError: it does not answer within so many seconds.
    """
    kind, value = await ask(cluster.find_metrics, method, *arguments, within=within, otherwise=_OTHERWISE)
    if kind == "error":
        raise unpack_error(value)
    return value
