"""Catalogues made up row by row, as :mod:`raypg.server.facts_reader` would have read them."""

from __future__ import annotations

from typing import Any

from raypg.core import functions

BUILTIN = dict.fromkeys(functions.READ | functions.FORBIDDEN | functions.LOCAL, False) | {"int4pl": True}


def relation(name: str, schema: str = "public", **changes: Any) -> dict[str, Any]:
    row = {"kind": "r", "persistence": "p", "parts": False, "definition": None, "policies": None}
    return row | {"schema": schema, "name": name} | changes


def function(name: str, source: str, language: str = "sql", **changes: Any) -> dict[str, Any]:
    row = {"schema": "public", "kind": "f", "volatility": "s", "defaults": None, "types": [], "calls": None}
    return row | {"name": name, "source": source, "language": language} | changes


def catalogue(**rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """All that is read, with nothing in it but the system's functions and *rows*."""
    empty: dict[str, list[dict[str, Any]]] = {
        kind: []
        for kind in (
            *("settings", "relations", "functions", "operators", "casts", "domains", "classes", "inherits"),
            *("triggers", "cascades", "rules", "uses", "events"),
        )
    }
    builtin = [{"name": name, "immutable": immutable} for name, immutable in BUILTIN.items()]
    return empty | {"builtin": builtin} | rows
