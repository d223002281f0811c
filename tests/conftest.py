"""Fixtures shared by all tests: PostgreSQL servers, one Ray cluster, a schema per test, seeded randomness."""

from __future__ import annotations

import logging
import os
import random
import secrets
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

# Before anything imports Ray, which reads them once.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import asyncpg
import pytest
from hypothesis import settings as hypothesis_settings
from pgserver import main_server, system_server
from standby import standby_of

from raypg.embedded import EmbeddedServer

TESTS = Path(__file__).parent
SEED = int(os.environ.get("RAYPG_TEST_SEED") or secrets.randbits(32))

hypothesis_settings.register_profile("raypg", print_blob=True, deadline=None)
hypothesis_settings.load_profile("raypg")


def pytest_report_header() -> str:
    """Says how to repeat a run."""
    return f"RAYPG_TEST_SEED={SEED}"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers that depend on the seed of the run and the test's name, whatever else runs."""
    print(f"RAYPG_TEST_SEED={SEED}")
    return random.Random(f"{SEED}:{request.node.nodeid}")


@pytest.fixture(scope="session")
def pg18() -> Iterator[EmbeddedServer]:
    """A running PostgreSQL 18, shared by the session: use your own `schema` in it. See `main_server` for when it is an
    older one."""
    with main_server() as server:
        yield server


@pytest.fixture(scope="session")
def pg15() -> Iterator[EmbeddedServer]:
    """A running PostgreSQL of the system, shared by the session; skipped where there is none (not in CI)."""
    with system_server() as server:
        yield server


@pytest.fixture(scope="session")
def standby18(pg18: EmbeddedServer) -> Iterator[EmbeddedServer]:
    """A streaming standby of `pg18`, shared by the session. To delay, pause or promote: `standby_of`."""
    with standby_of(pg18) as server:
        yield server


@pytest.fixture
def pg(pg18: EmbeddedServer) -> EmbeddedServer:
    """The server that most tests use."""
    return pg18


@pytest.fixture
async def direct(pg: EmbeddedServer) -> AsyncIterator[asyncpg.Connection]:
    """A plain asyncpg connection to `pg`, as its superuser."""
    connection = await asyncpg.connect(**pg.parameters)
    try:
        yield connection
    finally:
        connection.terminate()


@pytest.fixture
async def watcher(pg: EmbeddedServer) -> AsyncIterator[asyncpg.Connection]:
    """A connection outside of any transaction: inside one pg_stat_activity never changes."""
    connection = await asyncpg.connect(**pg.parameters)
    yield connection
    connection.terminate()


@pytest.fixture
async def schema(pg: EmbeddedServer, direct: asyncpg.Connection) -> AsyncIterator[str]:
    """Name of a fresh schema in `pg`, first in the search_path of `direct`; dropped after the test."""
    name = f"t_{secrets.token_hex(6)}"
    await direct.execute(f"create schema {name}")
    await direct.execute(f"set search_path = {name}, public")
    yield name
    # Not by `direct`, which the test may have used up; and what still holds a lock there has no right to.
    cleaner = await asyncpg.connect(**pg.parameters)
    try:
        await cleaner.execute("set lock_timeout = '10s'")
        await cleaner.execute(f"drop schema {name} cascade")
    finally:
        await cleaner.close()


def pickle_tests_by_value() -> None:
    """Let Ray's workers have what a test module defines: they cannot import test modules."""
    from ray import cloudpickle

    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and Path(file).is_relative_to(TESTS):
            cloudpickle.register_pickle_by_value(module)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """A Ray cluster of one node with 4 CPUs, shared by the session; what `ray.init` returned."""
    import ray

    pickle_tests_by_value()
    # Short, since paths of Unix sockets are limited to 107 bytes.
    directory = tempfile.mkdtemp(prefix="raypg-ray-", dir="/tmp")
    context = ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=256 * 1024 * 1024,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        _temp_dir=directory,
        # Ray knows a dead node after five of these, not 15 s: still later than raypg itself (5 s).
        _system_config={"health_check_period_ms": 1500},
    )
    try:
        yield context
    finally:
        ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def serving(ray_cluster: Any) -> None:
    """Ray Serve runs, without HTTP of its own, until the cluster ends."""
    from ray import serve

    serve.start(proxy_location="Disabled")


@pytest.fixture
def quiet_ray_data() -> None:
    """Ray Data shows no progress bars."""
    from ray.data import DataContext

    DataContext.get_current().enable_progress_bars = False
