"""Where pools are found, and made, in a Ray cluster."""

from __future__ import annotations

from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util import list_named_actors

from raypg import _compat, naming
from raypg.config import PoolConfig
from raypg.errors import PoolNotFoundError


def running_pools() -> list[str]:
    """Names of the pools that run in this cluster, sorted."""
    named = list_named_actors(all_namespaces=True)
    found = (naming.pool_of(actor["name"]) for actor in named if actor["namespace"] == naming.NAMESPACE)
    return sorted(name for name in found if name is not None)


def find(name: str) -> ActorHandle[Any]:
    """The Pool actor of pool *name*.

    Raises:
        PoolNotFoundError: no such pool; names those that run.
        ConfigError: it cannot be the name of a pool.
    """
    naming.check_pool_name(name)
    try:
        return ray.get_actor(naming.pool_actor(name), namespace=naming.NAMESPACE)
    except ValueError:
        raise PoolNotFoundError(name, running_pools()) from None


def find_or_start(config: PoolConfig) -> ActorHandle[Any]:
    """The Pool actor for *config*, started if it does not run. Whether it really has this configuration, it says
    itself: of two callers that start it at once, one wins, and Ray ignores the arguments of the other."""
    from raypg.actors.pool import PoolActor  # not for those who only use a pool

    return _start(PoolActor, naming.pool_actor(config.name), config.name, config.to_dict())


def find_breaker() -> ActorHandle[Any] | None:
    """The Breaker actor; ``None`` if there is none."""
    return _named(naming.BREAKER_ACTOR)


def find_or_start_breaker() -> ActorHandle[Any]:
    """The Breaker actor, started if it does not run."""
    from raypg.actors.breaker import BreakerActor

    return _start(BreakerActor, naming.BREAKER_ACTOR)


def find_or_start_pipeline() -> ActorHandle[Any]:
    """The Pipeline actor, started if it does not run."""
    from raypg.actors.pipeline import PipelineActor

    return _start(PipelineActor, naming.PIPELINE_ACTOR)


def find_metrics() -> ActorHandle[Any] | None:
    """The Metrics actor; ``None`` if there is none."""
    return _named(naming.METRICS_ACTOR)


def find_or_start_metrics() -> ActorHandle[Any]:
    """The Metrics actor, started if it does not run."""
    from raypg.actors.metrics import MetricsActor

    return _start(MetricsActor, naming.METRICS_ACTOR)


def _named(name: str) -> ActorHandle[Any] | None:
    try:
        return ray.get_actor(name, namespace=naming.NAMESPACE)
    except ValueError:
        return None


def _start(kind: type, name: str, *arguments: Any) -> ActorHandle[Any]:
    """The actor of that name, which outlives whoever made it, and its own death."""
    return (
        ray.remote(kind)
        .options(
            name=name,
            namespace=naming.NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            # On the head, where Ray's own state is: without it nothing goes on anyway, and any other node may be lost.
            resources={_compat.HEAD: 0.001},
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=10_000,
        )
        .remote(*arguments)
    )
