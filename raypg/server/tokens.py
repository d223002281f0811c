"""A token for what has been written up to now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raypg.core.seen import Token
from raypg.server import errand, roles

if TYPE_CHECKING:
    from raypg.server.connection import ServerConnection
    from raypg.server.engine import Engine


async def current(engine: Engine) -> tuple[int, int, tuple[str, ...]]:
    """How far the primary's log has come, as a plain :class:`raypg.core.seen.Token`.

    Raises:
        UnavailableError: the primary cannot be asked.
    """

    async def ask(connection: ServerConnection) -> Token:
        role = roles.role_of(await connection.raw.fetchrow(roles.QUERY))
        return Token(role.timeline, role.lsn)

    token: Token = await errand.run(engine, "", ask)
    return token.plain
