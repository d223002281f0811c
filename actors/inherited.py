"""What an actor that outlives its job has inherited of it."""

from __future__ import annotations

import logging

import ray

logger = logging.getLogger(__name__)

_CONCERNED = ("working_dir", "py_modules", "env_vars", "pip", "conda", "uv")


def warn_of_runtime_env(pool: str) -> None:
    """Say so if the actor of *pool*, which outlives the job that made it, lives in that job's runtime_env."""
    environment = dict(ray.get_runtime_context().runtime_env)
    inherited = [key for key in _CONCERNED if environment.get(key)]
    if inherited:
        logger.warning(
            "pool %s inherits %s of the job that made it, and outlives that job: make pools that are shared "
            "between jobs with `raypg up`, or from a job without a runtime_env",
            pool,
            ", ".join(inherited),
        )
