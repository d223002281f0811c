"""What a router is asked for: checked before anything is decided or sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raypg.answers import check_fetch_mode
from raypg.checks import check_statement, check_timeout
from raypg.core.nearest import did_you_mean
from raypg.errors import ConfigError
from raypg.reading import where_of

__all__ = ["check_request"]

_KEYS = frozenset(
    ("query", "params", "parameters", "operation", "session_id", "max_staleness", "after", "timeout", "settings")
) | {"fetch_mode"}


def check_request(request: Mapping[str, Any]) -> None:
    """Refuse a request to ``process`` whose keys or values are wrong. What ``params``, ``session_id``, ``after`` and
    ``settings`` hold is checked where it is used.

    Raises:
        ConfigError: they are.
        TypeError, StatementNotAllowedError: the query cannot travel.
    """
    if type(request) is not dict and not isinstance(request, Mapping):
        raise ConfigError(f"process() takes a dict with the key 'query', not {type(request).__name__}")
    if not request.keys() <= _KEYS:
        key = next(key for key in request if key not in _KEYS)
        raise ConfigError(f"unknown key {key!r}{did_you_mean(str(key), _KEYS)}")
    query = request.get("query")
    if not isinstance(query, str):
        raise ConfigError("a request needs the key 'query', a string")
    check_statement(query)
    operation = request.get("operation", "execute")
    if operation != "execute":
        raise ConfigError(f"operation={operation!r}: a router knows only 'execute'")
    if "params" in request and "parameters" in request:
        raise ConfigError("give params or parameters, not both: they mean the same")
    if "timeout" in request:
        check_timeout(request["timeout"])
    if "max_staleness" in request:
        where_of("replica", request["max_staleness"], None)
    if "fetch_mode" in request:
        check_fetch_mode(request["fetch_mode"])
