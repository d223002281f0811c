"""What the server says of a statement before it is run."""

from __future__ import annotations

from typing import Any

import asyncpg


async def describe(raw: asyncpg.Connection, sql: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(types of its parameters, attributes of its rows), as asyncpg's ``get_parameters`` and ``get_attributes``.

    Raises:
        asyncpg.PostgresError: what the server has against it.
    """
    statement = await raw.prepare(sql, name="")  # without a name nothing of it stays
    return statement.get_parameters(), statement.get_attributes()
