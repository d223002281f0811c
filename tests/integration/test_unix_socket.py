"""Unix sockets: ``host`` is the directory, the server on the worker's own node."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from pgserver import main_server
from pools import backends_of, own_pool
from waiting import eventually

from raypg.binaries import public_directory, server_account
from raypg.config import from_kwargs
from raypg.embedded import EmbeddedServer
from raypg.errors import ConnectError, QueryTimeoutError
from raypg.server.connect import Connector

NAME = "raypg:0a1b2c3d:0:89abcdef"


@pytest.fixture(scope="module")
def local() -> Iterator[EmbeddedServer]:
    """A server with a socket in ``local.settings["unix_socket_directories"]``."""
    account = server_account()
    # Short, since paths of Unix sockets are limited to 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="raypg-s-", dir=public_directory(account)))
    if account is not None:
        os.chown(directory, account.uid, account.gid)
    directory.chmod(0o755)
    with main_server({"unix_socket_directories": str(directory)}) as server:
        yield server
    shutil.rmtree(directory)


@pytest.fixture
def parameters(local: EmbeddedServer) -> dict[str, Any]:
    return {**local.parameters, "host": local.settings["unix_socket_directories"]}


async def test_a_pool(ray_cluster: Any, local: EmbeddedServer, parameters: dict[str, Any]) -> None:
    async with own_pool(local, **{**parameters, "max_connections": 4}) as pool:
        assert await asyncio.gather(*(pool.fetchval("select $1::int", n) for n in range(50))) == list(range(50))
        assert await pool.fetchval("select inet_client_addr()") is None
        started = time.monotonic()
        with pytest.raises(QueryTimeoutError):
            await pool.fetchval("select pg_sleep(60)", timeout=0.2)
        assert time.monotonic() - started < 5
        direct = await asyncpg.connect(**local.parameters)
        pids = [row["pid"] for row in await backends_of(direct, pool.name)]
        assert len(pids) >= 2
        ports = await direct.fetch("select client_port from pg_stat_activity where pid = any($1::int[])", pids)
        assert {row["client_port"] for row in ports} == {-1}  # what PostgreSQL shows for a socket
        # A backend that ends while idle is noticed, here too, before anything is sent.
        for pid in pids:
            assert await direct.fetchval("select pg_terminate_backend($1, 5000)", pid)
        assert set(await asyncio.gather(*(pool.execute("do $$ begin perform 1; end $$") for _ in range(20)))) == {"DO"}
        await direct.close()


@pytest.mark.parametrize("sslmode", ["disable", "prefer", "require"])
async def test_tls_is_not_for_sockets(parameters: dict[str, Any], sslmode: str) -> None:
    """As in libpq, which ignores sslmode there: the server has no TLS."""
    connection = await Connector(from_kwargs(name="p", environ={}, **parameters, sslmode=sslmode), NAME).open()
    assert await connection.raw.fetchval("select inet_client_addr()") is None
    connection.raw.terminate()


async def test_the_passfile_has_sockets_under_localhost(parameters: dict[str, Any], tmp_path: Path) -> None:
    passfile = tmp_path / "pass"
    passfile.write_text(f"localhost:{parameters['port']}:*:*:{parameters.pop('password')}\n")
    passfile.chmod(0o600)
    connection = await Connector(from_kwargs(name="p", environ={}, **parameters, passfile=str(passfile)), NAME).open()
    assert await connection.is_alive()
    connection.raw.terminate()


async def test_a_backend_that_ended_is_seen_in_the_socket(local: EmbeddedServer, parameters: dict[str, Any]) -> None:
    connection = await Connector(from_kwargs(name="p", environ={}, **parameters), NAME).open()
    direct = await asyncpg.connect(**local.parameters)
    assert await direct.fetchval("select pg_terminate_backend($1, 5000)", connection.pid)

    async def noticed() -> bool:
        return not await connection.is_alive()

    await eventually(noticed, timeout=2)
    await direct.close()


async def test_without_a_socket_the_error_says_where_it_was_looked_for(
    parameters: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConnectError) as caught:
        await Connector(from_kwargs(name="p", environ={}, **{**parameters, "host": str(tmp_path)}), NAME).open()
    assert caught.value.category == "connection_refused"
    assert str(tmp_path) in str(caught.value)
    assert "own node" in str(caught.value)
