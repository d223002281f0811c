"""How many connections a server has room for. Pure."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Limits", "Room", "room"]


class Limits(NamedTuple):
    """What a server says of its limits, and of the connections that are not ours.

    Attributes:
        max_connections: of the server.
        reserved: of these, kept for superusers and for roles with pg_use_reserved_connections.
        others: client backends that are not of this pool.
        role: rolconnlimit of our role; −1 for none. It binds no superuser.
        role_others: of *others*, those of our role.
        database: datconnlimit of our database; −1 for none. It binds no superuser.
        database_others: of *others*, those in our database.
        authentication_timeout: seconds after which the server gives up a client that does not finish to connect.
    """

    max_connections: int
    reserved: int
    others: int
    role: int
    role_others: int
    database: int
    database_others: int
    authentication_timeout: float


class Room(NamedTuple):
    """The tightest limit: connections that are left for us, and where they end, in words."""

    connections: int
    why: str


def room(limits: Limits) -> Room:
    """What the server has left for this pool, by the tightest of its limits (PostgreSQL, "Connections and
    Authentication", CREATE ROLE, CREATE DATABASE)."""
    found = [
        Room(
            limits.max_connections - limits.reserved - limits.others,
            f"max_connections={limits.max_connections} of the server, less {limits.reserved} reserved and "
            f"{limits.others} that others use",
        )
    ]
    if limits.role >= 0:
        found.append(
            Room(
                limits.role - limits.role_others,
                f"CONNECTION LIMIT {limits.role} of the role, less {limits.role_others} that others use",
            )
        )
    if limits.database >= 0:
        found.append(
            Room(
                limits.database - limits.database_others,
                f"CONNECTION LIMIT {limits.database} of the database, less {limits.database_others} that others use",
            )
        )
    return min(found)
