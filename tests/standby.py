"""Streaming standbys of an embedded server: real replicas, made by ``pg_basebackup``.

Asynchronous functions take what :meth:`EmbeddedServer.parameters` gives, and make a connection of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import asyncpg
from pgserver import SETTINGS
from waiting import eventually

from raypg.embedded import EmbeddedServer


def standby_of(primary: EmbeddedServer, settings: Mapping[str, str] | None = None) -> EmbeddedServer:
    """A standby of *primary*, which must run; not started yet: ``with standby_of(pg18) as standby``.

    It is a copy of all that is there (about 1.5 s), streams from then on, and has the same user and password. It
    needs one WAL sender of *primary*, which has 10. Its temporary directory goes with it.

    Args:
        settings: server settings beside those of all test servers, such as ``recovery_min_apply_delay``.
    """
    standby = EmbeddedServer(
        settings={**SETTINGS, "cluster_name": "raypg_standby", **(settings or {})},
        password=primary.password,
        binaries=primary.bin("postgres").parent,
    )
    try:
        primary.run(
            "pg_basebackup",
            *("--pgdata", str(standby.data_directory)),
            "--write-recovery-conf",
            "--checkpoint=fast",
            "--no-sync",
        )
    except BaseException:
        standby.close()
        raise
    return standby


async def ask(server: EmbeddedServer, query: str, *args: Any) -> Any:
    """One value from a server, by a connection made for it."""
    connection = await asyncpg.connect(**server.parameters)
    try:
        return await connection.fetchval(query, *args)
    finally:
        await connection.close()


async def caught_up(primary: EmbeddedServer, standby: EmbeddedServer, timeout: float = 20.0) -> None:
    """Wait until *standby* has replayed all that *primary* has written so far."""
    written = await ask(primary, "select pg_current_wal_insert_lsn()::text")
    await eventually(
        lambda: ask(standby, "select pg_last_wal_replay_lsn() >= $1::text::pg_lsn", written),
        timeout,
        f"the standby has replayed {written}",
    )


async def pause(standby: EmbeddedServer) -> None:
    """Let *standby* receive, but not replay, until :func:`resume`."""
    await ask(standby, "select pg_wal_replay_pause()")
    await eventually(lambda: ask(standby, "select pg_get_wal_replay_pause_state() = 'paused'"))


async def resume(standby: EmbeddedServer) -> None:
    """End a :func:`pause`."""
    await ask(standby, "select pg_wal_replay_resume()")


async def delay(standby: EmbeddedServer, milliseconds: int) -> None:
    """Let *standby* replay each commit so much later; 0 ends that."""
    connection = await asyncpg.connect(**standby.parameters)
    try:
        await connection.execute(f"alter system set recovery_min_apply_delay = '{milliseconds:d}ms'")
        await connection.execute("select pg_reload_conf()")
    finally:
        await connection.close()
    await eventually(
        lambda: ask(
            standby, "select setting::int = $1 from pg_settings where name = 'recovery_min_apply_delay'", milliseconds
        )
    )


async def promote(standby: EmbeddedServer) -> None:
    """Make *standby* a primary of its own, and wait until it is one."""
    await ask(standby, "select pg_promote(true, 30)")
    await eventually(lambda: ask(standby, "select not pg_is_in_recovery()"))


@contextlib.asynccontextmanager
async def disturbed(
    late: EmbeddedServer, paused: EmbeddedServer, milliseconds: int = 20, between: float = 0.9
) -> AsyncIterator[None]:
    """One standby replays each commit so late, the other one is paused for 0.1 s again and again, with so many seconds
    between."""
    await delay(late, milliseconds)

    async def disturb() -> None:
        while True:
            await pause(paused)
            await asyncio.sleep(0.1)
            await resume(paused)
            await asyncio.sleep(between)

    disturbing = asyncio.create_task(disturb())
    try:
        yield
    finally:
        disturbing.cancel()
        await asyncio.gather(disturbing, return_exceptions=True)
        await resume(paused)
        await delay(late, 0)
