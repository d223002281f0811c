"""TLS against a server that has it (the system's PostgreSQL; the one of the wheel is built without)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import asyncpg
import pytest
from certificates import Authority
from pgserver import system_server
from pools import backends_of, own_pool
from waiting import eventually

from raypg import messages
from raypg.binaries import public_directory, server_account
from raypg.config import from_kwargs
from raypg.embedded import EmbeddedServer
from raypg.errors import ConnectError, QueryTimeoutError, ResultLostError
from raypg.server.connect import Connector
from raypg.server.connection import ServerConnection

pytestmark = pytest.mark.pg15

HBA = """
hostssl    all  secretive  127.0.0.1/32  scram-sha-256
hostnossl  all  open       127.0.0.1/32  scram-sha-256
hostssl    all  certified  127.0.0.1/32  cert
hostssl    all  careful    127.0.0.1/32  scram-sha-256  clientcert=verify-full
host       all  postgres   127.0.0.1/32  scram-sha-256
"""
PASSWORD = "a password"


@dataclass(frozen=True)
class Tls:
    """A server with TLS. Its certificate is for ``localhost`` only; ``secretive`` gets in with TLS, ``open`` without,
    ``certified`` by its certificate, ``careful`` by certificate and password."""

    server: EmbeddedServer
    directory: Path
    authority: Authority
    stranger: Authority
    server_certificate: Path

    def parameters(
        self,
        user: str = "postgres",
        settings: Mapping[str, object] | None = None,
        *,
        host: str = "localhost",
        **more: object,
    ) -> dict[str, Any]:
        password = {} if user == "certified" else {"password": PASSWORD}
        if user == "postgres":
            password = {"password": self.server.password}
        place = {"host": host, "port": self.server.port, "database": "postgres", "user": user}
        texts = {key: str(value) for key, value in {**(settings or {}), **more}.items()}
        rare: dict[str, str] = {key: texts.pop(key) for key in ("sslcrl", "ssl_max_protocol_version") if key in texts}
        string = {"connection_string": f"postgresql://?{urlencode(rare)}"} if rare else {}
        return {**place, **password, **texts, **string}

    def certificate_of(self, user: str) -> dict[str, str]:
        return {"sslcert": str(self.directory / f"{user}.crt"), "sslkey": str(self.directory / f"{user}.key")}


@pytest.fixture(scope="module")
def tls() -> Iterator[Tls]:
    account = server_account()
    directory = Path(tempfile.mkdtemp(prefix="raypg-tls-", dir=public_directory(account)))
    directory.chmod(0o755)
    authority, stranger = Authority(directory, "authority"), Authority(directory, "stranger")
    certificate, key = authority.issue("server", "localhost")
    for user in ("certified", "careful"):
        authority.issue(user)
    stranger.issue("certified", file="forged")
    hba = directory / "pg_hba.conf"
    hba.write_text(HBA)
    if account is not None:
        os.chown(key, account.uid, account.gid)
    settings = {
        "ssl": "on",
        "ssl_cert_file": str(certificate),
        "ssl_key_file": str(key),
        "ssl_ca_file": str(authority.root),
        "hba_file": str(hba),
    }
    with system_server(settings) as server:
        roles = ("secretive", "open", "certified", "careful")

        async def make_roles() -> None:
            connection = await asyncpg.connect(**server.parameters)
            for role in roles:
                await connection.execute(f"create role {role} login password '{PASSWORD}'")
            await connection.close()

        asyncio.run(make_roles())
        yield Tls(server, directory, authority, stranger, certificate)
    shutil.rmtree(directory)


@pytest.fixture(autouse=True)
def no_files_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have certificates below ``~/.postgresql``."""
    monkeypatch.setenv("HOME", str(tmp_path))


@contextlib.asynccontextmanager
async def opened(parameters: dict[str, Any]) -> AsyncIterator[ServerConnection]:
    config = from_kwargs(name="p", environ={}, **parameters)
    connection = await Connector(config, "raypg:0a1b2c3d:0:89abcdef").open()
    try:
        yield connection
    finally:
        connection.raw.terminate()


async def seen_by_server(connection: ServerConnection) -> asyncpg.Record:
    """What the server says of the encryption of *connection*: ssl, version, client_dn."""
    row: asyncpg.Record = await connection.raw.fetchrow(
        "select ssl, version, client_dn from pg_stat_ssl where pid = pg_backend_pid()"
    )
    return row


async def refused(parameters: dict[str, Any]) -> ConnectError:
    with pytest.raises(ConnectError) as caught:
        async with opened(parameters):
            pass
    assert PASSWORD not in str(caught.value)
    return caught.value


# --- which mode gets in, and how ---


@pytest.mark.parametrize(
    ("sslmode", "user", "encrypted"),
    [
        ("disable", "postgres", False),
        ("disable", "open", False),
        ("allow", "postgres", False),
        ("allow", "secretive", True),
        ("prefer", "postgres", True),
        ("prefer", "secretive", True),
        ("prefer", "open", False),
        ("require", "secretive", True),
    ],
)
async def test_modes_that_check_no_certificate(tls: Tls, sslmode: str, user: str, encrypted: bool) -> None:
    async with opened(tls.parameters(user, host="127.0.0.1", sslmode=sslmode)) as connection:
        assert (await seen_by_server(connection))["ssl"] is encrypted
        assert await connection.is_alive()


@pytest.mark.parametrize(
    ("sslmode", "host"), [("require", "127.0.0.1"), ("verify-ca", "127.0.0.1"), ("verify-full", "localhost")]
)
async def test_modes_that_do(tls: Tls, sslmode: str, host: str) -> None:
    async with opened(tls.parameters(host=host, sslmode=sslmode, sslrootcert=tls.authority.root)) as connection:
        assert (await seen_by_server(connection))["ssl"] is True


async def test_the_authority_may_be_found_at_home(tls: Tls, tmp_path: Path) -> None:
    (tmp_path / ".postgresql").mkdir()
    shutil.copy(tls.authority.root, tmp_path / ".postgresql" / "root.crt")
    async with opened(tls.parameters(sslmode="verify-full")) as connection:
        assert (await seen_by_server(connection))["ssl"] is True


async def test_versions_can_be_limited(tls: Tls) -> None:
    async with opened(tls.parameters(sslmode="require", ssl_max_protocol_version="TLSv1.2")) as connection:
        assert (await seen_by_server(connection))["version"] == "TLSv1.2"
    async with opened(tls.parameters(sslmode="prefer", ssl_max_protocol_version="TLSv1.2")) as connection:
        assert (await seen_by_server(connection))["version"] == "TLSv1.2"


# --- client certificates ---


async def test_a_certificate_instead_of_a_password(tls: Tls) -> None:
    settings = {"sslmode": "verify-full", "sslrootcert": tls.authority.root, **tls.certificate_of("certified")}
    async with opened(tls.parameters("certified", settings)) as connection:
        assert (await seen_by_server(connection))["client_dn"] == "/CN=certified"


@pytest.mark.parametrize("sslmode", ["prefer", "require"])
async def test_a_certificate_and_a_password(tls: Tls, sslmode: str) -> None:
    settings = {"sslmode": sslmode, **tls.certificate_of("careful")}
    async with opened(tls.parameters("careful", settings)) as connection:
        assert (await seen_by_server(connection))["client_dn"] == "/CN=careful"


async def test_a_renewed_certificate_is_read_at_the_next_connection(tls: Tls, tmp_path: Path) -> None:
    given = {"sslcert": tmp_path / "my.crt", "sslkey": tmp_path / "my.key"}
    config = from_kwargs(name="p", environ={}, **tls.parameters("certified", given, sslmode="require"))
    connector = Connector(config, "raypg:0a1b2c3d:0:89abcdef")
    with pytest.raises(ConnectError, match=r"my\.crt.*No such file"):
        await connector.open()
    for key, path in tls.certificate_of("certified").items():
        shutil.copy(path, given[key])
    connection = await connector.open()
    assert (await seen_by_server(connection))["client_dn"] == "/CN=certified"
    connection.raw.terminate()


# --- errors say what to do ---


async def test_a_server_that_wants_tls(tls: Tls) -> None:
    error = await refused(tls.parameters("secretive", sslmode="disable"))
    assert error.category == "authentication_failed"
    assert "sslmode='require'" in str(error)


async def test_a_server_that_has_none(pg18: EmbeddedServer) -> None:
    error = await refused({**pg18.parameters, "sslmode": "require"})
    assert "offers no TLS" in str(error)
    assert "sslmode='prefer'" in str(error)
    async with opened({**pg18.parameters, "sslmode": "prefer"}) as connection:
        assert await connection.is_alive()


@pytest.mark.parametrize("sslmode", ["verify-ca", "verify-full"])
async def test_nobody_to_trust(tls: Tls, sslmode: str) -> None:
    error = await refused(tls.parameters(sslmode=sslmode))
    assert "sslrootcert" in str(error)
    assert "root.crt" in str(error)


@pytest.mark.parametrize("sslmode", ["require", "verify-ca", "verify-full"])
async def test_a_server_of_another_authority(tls: Tls, sslmode: str) -> None:
    error = await refused(tls.parameters(sslmode=sslmode, sslrootcert=tls.stranger.root))
    assert "certificate is refused" in str(error)
    assert "sslrootcert" in str(error)


async def test_the_authorities_of_the_system_do_not_know_it(tls: Tls) -> None:
    assert "sslrootcert" in str(await refused(tls.parameters(sslrootcert="system")))


async def test_a_server_of_another_name(tls: Tls) -> None:
    error = await refused(tls.parameters(host="127.0.0.1", sslmode="verify-full", sslrootcert=tls.authority.root))
    assert "127.0.0.1" in str(error)
    assert "another name" in str(error)
    assert "verify-ca" in str(error)


async def test_a_revoked_server(tls: Tls) -> None:
    revoked = tls.authority.revoke(tls.server_certificate)
    settings = {"sslmode": "verify-full", "sslrootcert": tls.authority.root, "sslcrl": revoked}
    assert "sslcrl" in str(await refused(tls.parameters(settings=settings)))


async def test_no_certificate_where_one_is_needed(tls: Tls) -> None:
    error = await refused(tls.parameters("certified", sslmode="require"))
    assert error.category == "authentication_failed"
    assert "sslcert=" in str(error)


async def test_the_certificate_of_another_user(tls: Tls) -> None:
    error = await refused(tls.parameters("certified", settings=tls.certificate_of("careful"), sslmode="require"))
    assert error.category == "authentication_failed"
    assert "this very user" in str(error)


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
async def test_a_certificate_of_another_authority(tls: Tls, version: str) -> None:
    settings = {"sslmode": "require", "ssl_max_protocol_version": version, **tls.certificate_of("forged")}
    error = await refused(tls.parameters("certified", settings))
    assert "sslcert" in str(error)


async def test_a_key_that_does_not_belong_to_the_certificate(tls: Tls) -> None:
    mixed = {"sslcert": tls.directory / "careful.crt", "sslkey": tls.directory / "certified.key"}
    error = await refused(tls.parameters("careful", mixed, sslmode="require"))
    assert "careful.crt" in str(error)
    assert "certified.key" in str(error)


# --- what is sent besides statements ---


@pytest.mark.parametrize(
    ("sslmode", "user"),
    [("allow", "secretive"), ("prefer", "secretive"), ("require", "secretive"), ("verify-full", "postgres")],
)
async def test_cancel_requests_go_through(tls: Tls, sslmode: str, user: str) -> None:
    root = {"sslrootcert": tls.authority.root} if sslmode == "verify-full" else {}
    async with opened(tls.parameters(user, root, sslmode=sslmode)) as connection:
        started = time.monotonic()
        with pytest.raises(QueryTimeoutError):
            await connection.run(messages.STATUS, "select pg_sleep(60)", (), timeout=0.2)
        assert time.monotonic() - started < 15
        assert await connection.run(messages.FETCH, "select 1 as a", ()) == ([(1,)], ("a",))


async def test_a_backend_that_ended_is_seen_in_the_socket(tls: Tls) -> None:
    async with opened(tls.parameters(host="127.0.0.1", sslmode="require")) as victim, opened(tls.parameters()) as other:
        assert await victim.is_alive()
        assert await other.raw.fetchval("select pg_terminate_backend($1, 5000)", victim.pid)

        async def noticed() -> bool:
            return not await victim.is_alive()

        await eventually(noticed, timeout=2)


async def test_a_pool(ray_cluster: Any, tls: Tls) -> None:
    settings = {"sslmode": "verify-full", "sslrootcert": str(tls.authority.root), **tls.certificate_of("certified")}
    async with own_pool(tls.server, **{**tls.parameters("certified"), **settings, "max_connections": 4}) as pool:
        assert await asyncio.gather(*(pool.fetchval("select $1::int", n) for n in range(50))) == list(range(50))
        with pytest.raises(QueryTimeoutError):
            await pool.fetchval("select pg_sleep(60)", timeout=0.2)
        async with pool.transaction() as tx:
            assert (
                await tx.fetchval("select client_dn from pg_stat_ssl where pid = pg_backend_pid()") == "/CN=certified"
            )
        direct = await asyncpg.connect(**tls.server.parameters)
        pids = [row["pid"] for row in await backends_of(direct, pool.name)]
        assert len(pids) >= 2
        assert await direct.fetchval("select bool_and(ssl) from pg_stat_ssl where pid = any($1::int[])", pids)
        await direct.close()


async def test_reads_travel_together_over_tls_too(tls: Tls) -> None:
    async with opened(tls.parameters(host="127.0.0.1", sslmode="require")) as connection:
        text = "select repeat('x', $1::int)"
        await connection.run(messages.FETCH, text, (1,))
        sizes = [1, 100_000, 0, 70_000, 5]
        answers: dict[int, Any] = {}

        def told(index: int, result: Any, error: BaseException | None) -> None:
            answers[index] = error or result[0][0][0]

        await connection.run_together([(connection.prepared(text), (size,), 0) for size in sizes], told)
        assert [answers[index] for index in range(len(sizes))] == ["x" * size for size in sizes]
        assert await connection.run(messages.FETCH, text, (2,)) == ([("xx",)], ("repeat",))


async def test_what_became_of_a_write_whose_rows_cannot_be_read_over_tls_too(tls: Tls) -> None:
    async with opened(tls.parameters(host="127.0.0.1", sslmode="require")) as connection:
        await connection.raw.execute(
            "create temp table late "
            "(id int unique, next int references pg_temp.late (id) deferrable initially deferred)"
        )
        insert = "insert into late values (1, $1) returning repeat('x', 100000), '20000-01-01'::timestamp"
        with pytest.raises(asyncpg.ForeignKeyViolationError):
            await connection.run(messages.FETCH, insert, (7,))
        with pytest.raises(ResultLostError):
            await connection.run(messages.FETCH, insert, (1,))
        assert await connection.run(messages.FETCH, "select id, next from late", ()) == ([(1, 1)], ("id", "next"))
