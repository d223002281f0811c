"""Codecs by name: how values of a PostgreSQL type are turned into Python values on every worker.

A codec is named, not passed: a function that lives in one process would be lost on the way to the workers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import asyncpg


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a str is needed, not {type(value).__name__}")
    return value


def _vector_to_text(value: Any) -> str:
    return "[" + ",".join(repr(float(item)) for item in value) + "]"


def _vector_from_text(text: str) -> list[float]:
    return [float(item) for item in text[1:-1].split(",")] if len(text) > 2 else []


async def install(raw: asyncpg.Connection, codecs: Mapping[str, str]) -> None:
    """Give *raw* the *codecs*: type name (``schema.name``, or a name of pg_catalog or public) → codec name.

    ``json``: any JSON value as Python objects. ``text``: the server's text form, unchanged. ``vector``: pgvector's
    type as a list of floats. ``hstore``: a dict of strings.

    Raises:
        ValueError: the server has no such type.
    """
    for type_name, codec in codecs.items():
        schema, _, name = type_name.rpartition(".")
        if not schema:
            schema = await raw.fetchval(
                "SELECT n.nspname FROM pg_catalog.pg_type t JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace "
                "WHERE t.typname = $1 ORDER BY n.nspname = 'pg_catalog' DESC, n.nspname = 'public' DESC LIMIT 1",
                name,
            )
            if schema is None:
                raise ValueError(f"codec {codec!r}: the server has no type {type_name!r}")
        if codec == "hstore":
            await raw.set_builtin_type_codec(name, schema=schema, codec_name="pg_contrib.hstore")
        elif codec == "json":
            await raw.set_type_codec(name, schema=schema, encoder=json.dumps, decoder=json.loads)
        elif codec == "vector":
            await raw.set_type_codec(name, schema=schema, encoder=_vector_to_text, decoder=_vector_from_text)
        else:
            await raw.set_type_codec(name, schema=schema, encoder=_text, decoder=str)
