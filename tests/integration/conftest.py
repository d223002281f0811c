"""One pool, shared by all integration tests that do no harm to it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest
from commands import local_cluster, variables_of
from pools import lasting_pool, unique_name

from raypg import WorkflowConnectionPool
from raypg.demo_cluster import LocalCluster
from raypg.embedded import EmbeddedServer


@pytest.fixture(scope="session")
def pool(ray_cluster: Any, pg18: EmbeddedServer) -> Iterator[WorkflowConnectionPool]:
    """A running pool of 10 connections to `pg18`. It has no search_path: qualify names with your `schema`."""
    yield from lasting_pool(pg18, name=unique_name("shared"), max_connections=10)


@pytest.fixture(scope="session")
def pair(ray_cluster: Any, pg18: EmbeddedServer) -> Iterator[WorkflowConnectionPool]:
    """A pool of two connections, which leases exhaust; waiting for one ends after 10 s."""
    yield from lasting_pool(pg18, max_connections=2, acquire_timeout=10.0)


@pytest.fixture(scope="session")
def single(ray_cluster: Any, pg18: EmbeddedServer) -> Iterator[WorkflowConnectionPool]:
    """A pool of one connection: the next caller gets the very session, with its prepared statements, that the last one
    had."""
    yield from lasting_pool(pg18, max_connections=1)


@pytest.fixture(scope="module")
def dashboard(serving: None, pool: WorkflowConnectionPool) -> Iterator[str]:
    """Where the dashboard of all pools of `ray_cluster` is; `pool` has asked for it."""
    handle = WorkflowConnectionPool(name=pool.name, monitoring_port=0)
    answer = asyncio.run(handle.process({"operation": "start_monitoring"}))
    assert answer["status"] == "started"
    yield answer["dashboard_url"]
    ended = asyncio.run(handle.process({"operation": "stop_monitoring"}))
    assert ended["status"] == "stopped"


@pytest.fixture(scope="session")
def command_cluster(pg18: EmbeddedServer) -> Iterator[LocalCluster]:
    """A Ray cluster with job submission, for what is run as a command. Its nodes know where `pg18` is by the PG*
    variables, and its password also as ``DB_PASSWORD``."""
    environment = {**variables_of(pg18), "DB_PASSWORD": pg18.password}
    with local_cluster(environment) as cluster:
        yield cluster


@pytest.fixture
async def table(schema: str, direct: asyncpg.Connection) -> str:
    """Name of an empty table ``(id int primary key, label text not null, amount int check (amount >= 0))``."""
    name = f"{schema}.item"
    await direct.execute(
        f"create table {name} (id int primary key, label text not null default '', amount int check (amount >= 0))"
    )
    return name
