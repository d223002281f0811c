"""raypg: the PostgreSQL connection layer for Ray clusters.

pool = WorkflowConnectionPool(name="main_pool", host="db", database="app", user="app", max_connections=20)
await pool.process({"operation": "initialize"})
rows = await pool.fetch("SELECT * FROM users WHERE id = $1", 1)
"""

from __future__ import annotations

from raypg.breaker_config import CircuitBreakerConfig
from raypg.core.seen import Session
from raypg.errors import *  # noqa: F403
from raypg.errors import __all__ as _errors
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
    "QueryPipelineNode",
    "QueryRouterNode",
    "Row",
    "Session",
    "WorkflowConnectionPool",
    "get_pool",
    *_errors,
]
