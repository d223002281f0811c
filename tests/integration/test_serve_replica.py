"""A pool's handle in a Ray Serve replica: sent to it, and found by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from owners import in_async
from ray import serve

import raypg
from raypg import WorkflowConnectionPool


class Lookup:
    """A replica that answers from the database and holds no connection itself."""

    def __init__(self, pool: WorkflowConnectionPool) -> None:
        self.sent = pool
        self.found = raypg.get_pool(pool.name)

    async def double(self, number: int) -> tuple[int, int]:
        sent = await self.sent.fetchval("SELECT $1::int * 2", number)
        async with self.found.transaction() as tx:
            found = await tx.fetchval("SELECT $1::int * 2", number)
        return sent, found

    async def hold(self) -> tuple[dict[str, Any], str, int]:
        """What is told of its own lease."""
        return await in_async(self.sent)


@pytest.fixture(scope="module")
def served(serving: None, pool: WorkflowConnectionPool) -> Iterator[Any]:
    deployment: Any = serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 0})(Lookup)
    yield serve.run(deployment.bind(pool), route_prefix=None, name="lookup")
    serve.delete("lookup")


async def test_replicas_share_the_pool(served: Any, pool: WorkflowConnectionPool) -> None:
    answers = [served.double.remote(number) for number in range(50)]
    assert [await answer for answer in answers] == [(2 * number, 2 * number) for number in range(50)]
    status = await pool.process({"operation": "get_status"})
    assert status["pool_size"] <= status["max_connections"]


async def test_a_replica_is_named_as_holder_of_its_lease(served: Any) -> None:
    lease, line, process = await served.hold.remote()
    assert lease["held_by"].startswith("Serve replica lookup#Lookup#")
    assert lease["held_by"] in line
    assert lease["actor_name"].endswith(lease["held_by"].removeprefix("Serve replica "))
    assert f" {process} " in line
