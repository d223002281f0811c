"""raypg: the PostgreSQL connection layer for Ray clusters.

pool = WorkflowConnectionPool(name="main_pool", host="db", database="app", user="app", max_connections=20)
await pool.process({"operation": "initialize"})
rows = await pool.fetch("SELECT * FROM users WHERE id = $1", 1)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from raypg.errors import *  # noqa: F403
from raypg.errors import __all__ as _errors

if TYPE_CHECKING:
    from raypg.breaker_config import CircuitBreakerConfig
    from raypg.core.seen import Session
    from raypg.datasink import PostgresDatasink
    from raypg.datasource import PostgresDatasource
    from raypg.pipeline import PipelineResult, PipelineResults, PlanStep, QueryPipelineNode
    from raypg.pool import WorkflowConnectionPool, get_pool
    from raypg.router import QueryRouterNode
    from raypg.row import Row

__version__ = "0.1.0"

__all__ = [
    "CircuitBreakerConfig",
    "PipelineResult",
    "PipelineResults",
    "PlanStep",
    "PostgresDatasink",
    "PostgresDatasource",
    "QueryPipelineNode",
    "QueryRouterNode",
    "Row",
    "Session",
    "WorkflowConnectionPool",
    "get_pool",
    *_errors,
]

_MODULES = {
    "CircuitBreakerConfig": "breaker_config",
    "PipelineResult": "pipeline",
    "PipelineResults": "pipeline",
    "PlanStep": "pipeline",
    "PostgresDatasink": "datasink",
    "PostgresDatasource": "datasource",
    "QueryPipelineNode": "pipeline",
    "QueryRouterNode": "router",
    "Row": "row",
    "Session": "core.seen",
    "WorkflowConnectionPool": "pool",
    "get_pool": "pool",
}
"""Where a name comes from. It is imported when it is used: processes of actors need none of this."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"raypg.{_MODULES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
