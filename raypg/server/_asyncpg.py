"""The few private parts of asyncpg that raypg needs, in one place; tests/contract pins each of them."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import asyncpg
from asyncpg import connect_utils
from asyncpg import connection as connection_module


async def fetch_with_status(
    raw: asyncpg.Connection, sql: str, arguments: Sequence[Any], limit: int
) -> tuple[list[asyncpg.Record], str]:
    """Run one statement by the extended protocol and return its rows *and* its command tag in one round trip.

    The public calls give either the one (``fetch``) or the other (``execute``).

    Args:
        limit: most rows to return, 0 for all.
    """
    records, status, _ = await raw._execute(sql, arguments, limit, None, return_status=True)
    return records, status.decode() if status else ""


async def copy_in(raw: asyncpg.Connection, text: str, source: AsyncIterator[memoryview]) -> str:
    """Run the COPY … FROM STDIN *text* with the bytes of *source*; its command tag.

    The public ``copy_to_table`` makes the text itself.
    """
    return await raw._copy_in(text, source, None)  # type: ignore[no-any-return]


def cached_statement(raw: asyncpg.Connection, sql: str) -> Any:
    """The prepared statement for *sql* in asyncpg's cache, or ``None``; asking keeps it there."""
    return raw._stmt_cache.get((sql, raw._protocol.get_record_class(), False))


async def prepare(raw: asyncpg.Connection, sql: str, timeout: float) -> None:
    """Have *sql* in asyncpg's cache, as if it had run once; the public ``prepare`` leaves it out of there."""
    await raw._get_statement(sql, timeout)


def file_descriptor(raw: asyncpg.Connection) -> int:
    """The socket of *raw*, to be polled before a statement is sent."""
    descriptor: int = raw._transport.get_extra_info("socket").fileno()
    return descriptor


def address(raw: asyncpg.Connection) -> str:
    """Where *raw* is connected to: of several hosts, which one."""
    return repr(raw._addr)


def set_socket_options(raw: asyncpg.Connection, options: Sequence[tuple[int, int, int]]) -> None:
    """Set (level, option, value) on the socket of *raw*, if it is a TCP socket; asyncpg sets no keepalives."""
    transport = raw._transport.get_extra_info("socket")
    if transport.family != socket.AF_UNIX:
        duplicate = socket.socket(
            fileno=os.dup(transport.fileno())
        )  # uvloop's socket cannot be set; options are shared
        with duplicate:
            for level, option, value in options:
                duplicate.setsockopt(level, option, value)


async def send_cancel(raw: asyncpg.Connection) -> None:
    """Ask the server to cancel what *raw* runs, and return when it has processed the request.

    asyncpg only does this by cancelling the waiting task, which then never learns whether the statement took effect.
    Source: PostgreSQL manual, "Canceling Requests in Progress" (protocol flow): the server closes the connection
    when it has processed the request.
    """
    protocol = raw._protocol
    try:
        await connect_utils._cancel(
            loop=asyncio.get_running_loop(),
            addr=raw._addr,
            params=raw._params,
            backend_pid=protocol.backend_pid,
            backend_secret=protocol.backend_secret,
        )
    except ConnectionResetError:
        # Some servers reset instead of closing, after they have processed the request.
        pass


def never_set_jit(raw: asyncpg.Connection) -> None:
    """Keep asyncpg from switching ``jit`` off and on again around its look-ups of types: no setting of the session may
    be changed where the session is another one in a moment."""
    raw._server_caps = raw._server_caps._replace(jit=False)


def was_not_sent(error: BaseException) -> bool:
    """Whether *error* says that asyncpg sent nothing: it had read the server's last words just before.

    Its state machine then refuses the next operation, before a byte of it is written.
    """
    return isinstance(error, asyncpg.InternalClientError) and str(error).startswith("cannot switch to state")


def hear(raw: asyncpg.Connection, channel: str, callback: Callable[..., None]) -> bool:
    """Call *callback* for each notification over *channel*; False if something is called already.

    The public ``add_listener`` sends LISTEN too, past all that raypg does around a statement.
    """
    if channel in raw._listeners:
        return False
    raw._listeners[channel] = {connection_module._Callback.from_callable(callback)}
    return True


def ignore(raw: asyncpg.Connection, channel: str) -> None:
    """Call nothing for *channel* any more."""
    raw._listeners.pop(channel, None)


def ignore_all(raw: asyncpg.Connection) -> None:
    """Call nothing for any channel any more."""
    raw._listeners.clear()


async def close_portal(cursor: Any) -> None:
    """Close the portal of an asyncpg cursor, which otherwise stays open to the end of its transaction."""
    if cursor._portal_name is not None:
        await cursor._close_portal(None)


def forget_statements(raw: asyncpg.Connection) -> None:
    """Forget the prepared statements of *raw*: the server no longer has them (DISCARD ALL, DEALLOCATE ALL)."""
    raw._drop_local_statement_cache()
