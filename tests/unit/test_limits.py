"""How many connections a server has room for."""

from __future__ import annotations

from raypg.core.limits import Limits, room

FREE = Limits(100, 3, 0, -1, 0, -1, 0, 60.0)


def test_reserved_connections_and_those_of_others_are_not_ours() -> None:
    assert room(FREE).connections == 97
    found = room(FREE._replace(others=20))
    assert found.connections == 77
    assert found.why == "max_connections=100 of the server, less 3 reserved and 20 that others use"


def test_the_tightest_limit_counts() -> None:
    found = room(FREE._replace(others=20, role=30, role_others=5, database=50, database_others=10))
    assert (found.connections, found.why) == (25, "CONNECTION LIMIT 30 of the role, less 5 that others use")
    found = room(FREE._replace(others=20, role=30, role_others=5, database=12, database_others=10))
    assert (found.connections, found.why) == (2, "CONNECTION LIMIT 12 of the database, less 10 that others use")
    assert room(FREE._replace(role=0)).connections == 0
    assert room(FREE._replace(others=98)).connections == -1
