"""A Ray cluster of three nodes: the session's own, and two that leave when the tests of a file are over: with them the
pools of all other tests would be larger."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest
import ray
from nodes import Nodes


@pytest.fixture(scope="module")
def nodes(ray_cluster: Any) -> Iterator[Nodes]:
    """More nodes can be added to the cluster of the session; they are taken away again."""
    more = Nodes()
    try:
        yield more
    finally:
        more.close()


@pytest.fixture(scope="module")
def three_nodes(nodes: Nodes) -> tuple[str, str, str]:
    """Ids of three nodes, that of this process first."""
    return ray.get_runtime_context().get_node_id(), nodes.add(labels={"role": "db"}), nodes.add()


@pytest.fixture
async def table(schema: str, direct: asyncpg.Connection) -> str:
    """Name of an empty table of numbers."""
    await direct.execute(f"create table {schema}.item (id int)")
    return f"{schema}.item"
