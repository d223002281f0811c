"""raypg: the PostgreSQL connection layer for Ray clusters.

pool = WorkflowConnectionPool(name="main_pool", host="db", database="app", user="app", max_connections=20)
await pool.process({"operation": "initialize"})
rows = await pool.fetch("SELECT * FROM users WHERE id = $1", 1)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raypg.breaker_config import CircuitBreakerConfig
from raypg.core.seen import Session
from raypg.errors import *  # noqa: F403
from raypg.errors import __all__ as _errors
from raypg.pipeline import PipelineResult, PipelineResults, PlanStep, QueryPipelineNode
from raypg.pool import WorkflowConnectionPool, get_pool
from raypg.router import QueryRouterNode
from raypg.row import Row

if TYPE_CHECKING:
    from raypg.datasink import PostgresDatasink
    from raypg.datasource import PostgresDatasource

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

_RAY_DATA = {"PostgresDatasink": "datasink", "PostgresDatasource": "datasource"}
"""What needs Ray Data, which takes a second to import, and its module."""


def __getattr__(name: str) -> Any:
    if name not in _RAY_DATA:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"raypg.{_RAY_DATA[name]}"), name)
