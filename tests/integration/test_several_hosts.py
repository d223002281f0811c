"""Several hosts in one configuration: each is asked with its own password."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raypg.config import from_kwargs
from raypg.embedded import EmbeddedServer
from raypg.errors import ConnectError
from raypg.server.connect import Connector

NAME = "raypg:0a1b2c3d:0:89abcdef"


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nobody listens, kept from others."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def config(ports: list[int], **settings: Any) -> Connector:
    place = {"host": ",".join(["127.0.0.1"] * len(ports)), "port": ",".join(map(str, ports))}
    query = "&".join(f"{key}={value}" for key, value in settings.pop("uri", {}).items())
    uri = "postgresql:///postgres?user=postgres&host={host}&port={port}&".format_map(place) + query
    return Connector(from_kwargs(name="p", environ={}, connection_string=uri, **settings), NAME)


def passfile(path: Path, passwords: dict[int, str]) -> str:
    path.write_text("".join(f"127.0.0.1:{port}:*:*:{password}\n" for port, password in passwords.items()))
    path.chmod(0o600)
    return str(path)


async def test_the_passfile_is_asked_about_the_host_that_is_connected_to(
    pg18: EmbeddedServer, closed_port: int, tmp_path: Path
) -> None:
    known = passfile(tmp_path / "pass", {closed_port: "of another", pg18.port: pg18.password})
    connection = await config([closed_port, pg18.port], passfile=known).open()
    assert await connection.is_alive()
    connection.raw.terminate()


async def test_each_host_gets_its_own(pg18: EmbeddedServer, pg15: EmbeddedServer, tmp_path: Path) -> None:
    assert pg18.password != pg15.password
    known = passfile(tmp_path / "pass", {server.port: server.password for server in (pg18, pg15)})
    ports = [pg15.port, pg18.port]
    # Neither is a standby: both are asked for it, and neither complains about its password.
    with pytest.raises(ConnectError, match="None of the hosts match"):
        await config(ports, passfile=known, uri={"target_session_attrs": "standby"}).open()
    for _ in range(4):
        connection = await config(ports, passfile=known, uri={"load_balance_hosts": "random"}).open()
        assert await connection.is_alive()
        connection.raw.terminate()


async def test_a_command_is_run_for_each(pg18: EmbeddedServer, pg15: EmbeddedServer, tmp_path: Path) -> None:
    for server in (pg18, pg15):
        (tmp_path / str(server.port)).write_text(server.password)
    script = tmp_path / "password.py"
    script.write_text(f"import os; print(open({str(tmp_path)!r} + '/' + os.environ['PGPORT']).read())")
    ports = [pg15.port, pg18.port]
    command = [sys.executable, "-S", str(script)]
    with pytest.raises(ConnectError, match="None of the hosts match"):
        await config(ports, password_command=command, uri={"target_session_attrs": "standby"}).open()


async def test_the_wrong_password_of_one_is_an_error(pg18: EmbeddedServer, closed_port: int, tmp_path: Path) -> None:
    known = passfile(tmp_path / "pass", {closed_port: pg18.password, pg18.port: "wrong"})
    with pytest.raises(ConnectError) as caught:
        await config([closed_port, pg18.port], passfile=known).open()
    assert caught.value.category == "authentication_failed"
