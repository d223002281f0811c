"""Ray's private key-value store and cluster id (raypg._compat), and whose module an import finds on a worker."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import ray

from raypg import _compat, access_token
from raypg.errors import ConfigError

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("ray_cluster")]


class Store:
    """Uses the key-value store from an async actor."""

    async def put(self, key: str, value: bytes) -> None:
        _compat.kv_put(key, value)

    async def get(self, key: str) -> bytes | None:
        return _compat.kv_get(key)

    async def delete(self, key: str) -> None:
        _compat.kv_delete(key)

    async def cluster(self) -> tuple[str, _compat.Nodes]:
        return _compat.cluster_id(), _compat.nodes(ray.get_runtime_context().get_node_id(), {})

    async def is_driver(self) -> list[bool]:
        return [_compat.is_driver(), await asyncio.to_thread(_compat.is_driver)]


@pytest.fixture(scope="module")
def store(ray_cluster: Any) -> Any:
    actor: Any = ray.remote(Store).options(num_cpus=0).remote()
    yield actor
    ray.kill(actor)


async def test_driver_and_actors_see_one_key_value_store(store: Any) -> None:
    key = f"contract/{uuid.uuid4().hex}"
    assert await store.get.remote(key) is None
    _compat.kv_put(key, b"from the driver")
    assert await store.get.remote(key) == b"from the driver"
    await store.put.remote(key, b"\0from an actor\xff")
    assert _compat.kv_get(key) == b"\0from an actor\xff", "overwritten"
    assert _compat.kv_keys(key[:-1]) == [key]
    assert _compat.kv_keys(f"not-{key}") == []
    await store.delete.remote(key)
    assert _compat.kv_get(key) is None
    _compat.kv_delete(key)


async def test_of_two_who_store_a_key_that_is_not_there_one_succeeds(store: Any) -> None:
    key = f"test/{uuid.uuid4().hex}"
    assert _compat.kv_put_new(key, b"first")
    assert not _compat.kv_put_new(key, b"second")
    assert await store.get.remote(key) == b"first"
    _compat.kv_delete(key)


def test_the_cluster_has_one_token_and_the_environment_decides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = access_token.token()
    assert len(made) >= 32
    assert access_token.token() == access_token.decide() == made
    for wrong in ("short", "with a blank in it", "ümlaut-ümlaut-ümlaut"):
        monkeypatch.setenv(access_token.VARIABLE, wrong)
        with pytest.raises(ConfigError, match="RAYPG_TOKEN") as caught:
            access_token.decide()
        assert wrong not in str(caught.value)
    monkeypatch.setenv(access_token.VARIABLE, "a-token-of-ones-own")
    assert access_token.decide() == "a-token-of-ones-own"
    monkeypatch.delenv(access_token.VARIABLE)
    assert access_token.token() == "a-token-of-ones-own"
    monkeypatch.setenv(access_token.VARIABLE, made)
    access_token.decide()


async def test_what_an_actor_stored_outlives_it() -> None:
    key = f"contract/{uuid.uuid4().hex}"
    actor: Any = ray.remote(Store).options(num_cpus=0).remote()
    await actor.put.remote(key, b"kept")
    ray.kill(actor)
    with pytest.raises(ray.exceptions.ActorDiedError):
        await actor.get.remote(key)
    assert _compat.kv_get(key) == b"kept"
    _compat.kv_delete(key)


async def test_all_processes_know_the_same_cluster_id_and_nodes(store: Any) -> None:
    identity, nodes = await store.cluster.remote()
    assert identity == _compat.cluster_id()
    assert len(bytes.fromhex(identity)) >= 16
    here = ray.get_runtime_context().get_node_id()
    assert nodes == _compat.nodes(here, {}) == (frozenset([here]), (here,))
    assert _compat.nodes(here, {"ray.io/node-id": here}).eligible == (here,)
    assert _compat.nodes(here, {"role": "db"}).eligible == ()


SHADOWING = """
import sys, ray
ray.init(address=sys.argv[1], namespace="x", log_to_driver=False, logging_level="error",
         runtime_env={"working_dir": "."})

@ray.remote(num_cpus=0)
def look():
    import actors, deployments, raypg.actors, raypg.deployments
    return [actors.WHOSE, deployments.WHOSE, raypg.actors.__name__, hasattr(raypg.actors, "WHOSE")]

print(ray.get(look.remote()))
"""


def test_a_users_own_packages_called_actors_and_deployments_win_and_ours_are_still_there(tmp_path: Path) -> None:
    for name in ("actors", "deployments"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("WHOSE = 'the user'\n")
    done = subprocess.run(
        [sys.executable, "-P", "-c", SHADOWING, ray.get_runtime_context().gcs_address],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['the user', 'the user', 'raypg.actors', False]"


async def test_a_driver_is_told_from_a_worker(store: Any) -> None:
    """And its threads; in an actor too where no task is known."""
    assert _compat.is_driver()
    assert await asyncio.to_thread(_compat.is_driver)

    @ray.remote(num_cpus=0)
    def in_task() -> bool:
        return _compat.is_driver()

    assert await store.is_driver.remote() == [False, False]
    assert not await in_task.remote()
