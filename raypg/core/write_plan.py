"""What a write of Arrow data into a table is: names, checks against the catalogue, and the SQL texts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from raypg.core import arrow_types
from raypg.core.arrow_types import Column, Way
from raypg.core.nearest import did_you_mean
from raypg.errors import ConfigError, IncompatibleDataError, StatementNotAllowedError

MODES = ("append", "ignore", "upsert")
ON_BAD_ROWS = ("fail", "quarantine")
ROW = "raypg_row"
"""Column of a staging table that holds the number of the row within its batch."""

SORT_MEMORY = 64
"""Megabytes that the server may sort a batch in, for as long as its transaction: a batch of usual size is more than the
default of ``work_mem`` (4 MB), and would be sorted on disk."""

_SORT_IN_MEMORY = (
    f"SELECT pg_catalog.set_config('work_mem', '{SORT_MEMORY}MB', true) "
    f"WHERE pg_catalog.pg_size_bytes(pg_catalog.current_setting('work_mem')) < {SORT_MEMORY * 1024 * 1024}"
)

SIMPLE_KINDS = frozenset("rp")
"""Tables and partitioned tables: into all else rows go by INSERT."""

_NAME = re.compile(r'\s*(?:"((?:[^"\x00]|"")+)"|([A-Za-z_\u0080-\uffff][\w$]*))\s*(\.|$)')


class Key(NamedTuple):
    """A unique index that ON CONFLICT can name. ``nulls``: whether two NULLs are equal in it."""

    columns: tuple[str, ...]
    primary: bool
    nulls: bool


class Table(NamedTuple):
    """What the catalogue says of a table.

    Attributes:
        schema, name: as they are, not quoted.
        kind: ``pg_class.relkind``.
        secured: row-level security holds for us.
        ruled: it has rules, or we may not INSERT into all of its columns, and so not LOCK it.
        may_stage: we may make temporary tables.
        quiet: writing to it runs no code that could leave something in the session.
        stamp: stands for its columns and their types.
        database, user: where we are and who, as SQL names them.
    """

    schema: str
    name: str
    kind: str
    secured: bool
    ruled: bool
    may_stage: bool
    quiet: bool
    columns: tuple[Column, ...]
    keys: tuple[Key, ...]
    stamp: str = ""
    database: str = "…"
    user: str = "…"

    @property
    def shown(self) -> str:
        return f"{quoted(self.schema)}.{quoted(self.name)}"


class Field(NamedTuple):
    """A column of the data and where it goes."""

    column: Column
    way: Way


class WritePlan(NamedTuple):
    """How a batch gets into its table.

    Attributes:
        staged: by way of a temporary table and INSERT, not by COPY into the table itself.
        key: columns of the key, in the order of the index.
        equal_nulls: rows that have NULL in the key exclude each other too.
    """

    table: Table
    fields: tuple[Field, ...]
    mode: str
    staged: bool
    key: tuple[str, ...]
    equal_nulls: bool
    overriding: bool


def quoted(name: str) -> str:
    """*name* as an identifier, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'


def parse_name(text: Any) -> tuple[str | None, str]:
    """(schema, table) of a name as in SQL: without quotes in lower case, in quotes as it is.

    Raises:
        ConfigError: it is no such name.
    """
    parts: list[str] = []
    position = 0
    while isinstance(text, str) and len(parts) < 3 and (found := _NAME.match(text, position)):
        inside, plain, dot = found.groups()
        parts.append(inside.replace('""', '"') if inside is not None else plain.lower())
        position = found.end()
        if not dot:
            if len(parts) == 1:
                return None, parts[0]
            if len(parts) == 2:
                return parts[0], parts[1]
    raise ConfigError(
        f"into={text!r}: give the name of a table, as in SQL: 'events', 'schema.events', or '\"My Schema\".\"Events\"'"
    )


def check_options(mode: Any, on_bad_rows: Any, key: Any, batch_id: Any) -> tuple[str, ...] | None:
    """The key as a tuple.

    Raises:
        ConfigError: one of them is wrong.
    """
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r} is unknown{did_you_mean(str(mode), MODES)}")
    if on_bad_rows not in ON_BAD_ROWS:
        raise ConfigError(f"on_bad_rows={on_bad_rows!r} is unknown{did_you_mean(str(on_bad_rows), ON_BAD_ROWS)}")
    if batch_id is not None and (not isinstance(batch_id, str) or not batch_id or "\0" in batch_id):
        raise ConfigError(f"batch_id={batch_id!r}: must be a string that is not empty")
    if key is None:
        return None
    names = (key,) if isinstance(key, str) else tuple(key)
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ConfigError(f"key={key!r}: give the names of the columns that make a row unique, each once")
    if mode == "append":
        raise ConfigError(f"key={key!r} says nothing under mode='append'; did you mean 'ignore' or 'upsert'?")
    return names


def make_plan(
    table: Table, data: Sequence[tuple[str, Any]], mode: str, key: tuple[str, ...] | None, overriding: bool
) -> WritePlan:
    """Check data against *table*, and say how it gets there.

    Args:
        data: (name, Arrow type) of each column of the data.
        key: what makes a row unique; ``None`` for the primary key.
        overriding: values may be given for identity columns that are GENERATED ALWAYS.

    Raises:
        IncompatibleDataError: a column is missing, unknown, given twice, or of a type that does not fit.
        StatementNotAllowedError: a value cannot be given, or the user may not make temporary tables.
    """
    known = {column.name: column for column in table.columns}
    names = [name for name, _ in data]
    if not names:
        raise IncompatibleDataError(f"the data has no columns; {table.shown} has {', '.join(known)}")
    fields = []
    for name, kind in data:
        column = known.get(name)
        if column is None:
            raise IncompatibleDataError(
                f"{table.shown} has no column {name!r}{did_you_mean(name, tuple(known))}", name, str(kind), ""
            )
        if names.count(name) > 1:
            raise IncompatibleDataError(f"the data has column {name!r} twice", name, str(kind), column.shown)
        _may_be_given(table, column, overriding)
        fields.append(Field(column, arrow_types.way(kind, column)))
    for column in table.columns:
        if column.needed and column.name not in names and table.kind in SIMPLE_KINDS:
            raise IncompatibleDataError(
                f"column {column.name!r} of {table.shown} is NOT NULL and has no default, and the data has no such "
                "column",
                column.name,
                "",
                column.shown,
            )
    unique = None if mode == "append" else _key(table, key, names, mode)
    staged = (
        mode != "append"
        or table.kind not in SIMPLE_KINDS
        or table.secured
        or table.ruled
        or not all(field.way.direct for field in fields)
    )
    if staged and not table.may_stage:
        reason = _why_staged(table, fields, mode)
        raise StatementNotAllowedError(
            f"{reason}, which goes by way of a temporary table, and {table.user} may make none: "
            f"GRANT TEMPORARY ON DATABASE {table.database} TO {table.user}"
        )
    return WritePlan(
        table,
        tuple(fields),
        mode,
        staged,
        unique.columns if unique else (),
        bool(unique and unique.nulls),
        overriding,
    )


def _why_staged(table: Table, fields: Sequence[Field], mode: str) -> str:
    """What COPY into the table itself cannot do."""
    if mode != "append":
        return f"mode={mode!r} looks for rows of {table.shown} with the same key"
    cast = next((field for field in fields if not field.way.direct), None)
    if cast is not None:
        return f"column {cast.column.name!r} of {table.shown} needs a cast from {cast.way.type} to {cast.column.shown}"
    return f"rows get into {table.shown} by INSERT (it is a view, or has row-level security or rules)"


def _may_be_given(table: Table, column: Column, overriding: bool) -> None:
    if column.generated:
        raise StatementNotAllowedError(
            f"column {column.name!r} of {table.shown} is GENERATED from others: leave it out of the data"
        )
    if column.identity == "a" and not overriding:
        raise StatementNotAllowedError(
            f"column {column.name!r} of {table.shown} is GENERATED ALWAYS AS IDENTITY: leave it out of the data, "
            "or say overriding=True"
        )


def _key(table: Table, key: tuple[str, ...] | None, names: Sequence[str], mode: str) -> Key | None:
    """The unique index that *key* means; ``None`` if none is given, and none is needed."""
    if key is None:
        primary = next((each for each in table.keys if each.primary), None)
        if primary is not None and set(primary.columns) <= set(names):
            return primary
        if mode == "ignore":
            return None
        raise IncompatibleDataError(
            f"mode='upsert' needs key=[…]: {table.shown} has no primary key of which all columns are in the data"
        )
    for each in table.keys:
        if set(each.columns) == set(key):
            if missing := [name for name in key if name not in names]:
                raise IncompatibleDataError(f"column {missing[0]!r} of the key is not in the data", missing[0])
            return each
    unique = "; ".join(", ".join(each.columns) for each in table.keys) or "none"
    raise IncompatibleDataError(
        f"key={list(key)!r}: {table.shown} has no unique index on exactly these columns (it has: {unique}); "
        f"CREATE UNIQUE INDEX ON {table.shown} ({', '.join(map(quoted, key))})"
    )


# --- SQL -------------------------------------------------------------------------------------------------------------


def begin_text(plan: WritePlan) -> str:
    """What else to do when the transaction begins: from then on nobody can change the types of the columns, of which
    the server would not notice that they are not those of the bytes that it is sent."""
    return "" if plan.staged else f"; LOCK TABLE ONLY {plan.table.shown} IN ROW EXCLUSIVE MODE"


def copy_text(plan: WritePlan) -> str:
    """COPY into the table itself."""
    columns = ", ".join(quoted(field.column.name) for field in plan.fields)
    return f"COPY {plan.table.shown} ({columns}) FROM STDIN (FORMAT binary)"


def stage_name(plan: WritePlan) -> str:
    """The staging table of this plan; another one for other columns or types."""
    shape = repr([(field.column.name, field.way.type) for field in plan.fields])
    return f"raypg_stage_{hashlib.sha256(shape.encode()).hexdigest()[:16]}"


def stage_text(plan: WritePlan, keep: bool) -> str:
    """CREATE the staging table; *keep*: it may stay, empty, for the next batch."""
    columns = ", ".join(f"{quoted(field.column.name)} {_stage_type(field.way)}" for field in plan.fields)
    fate, unless = ("DELETE ROWS", "IF NOT EXISTS ") if keep else ("DROP", "")
    made = f"CREATE TEMPORARY TABLE {unless}{stage_name(plan)} ({columns}, {ROW} int8) ON COMMIT {fate}"
    return made if plan.mode == "append" else f"{made}; {_SORT_IN_MEMORY}"


def copy_stage_text(plan: WritePlan) -> str:
    """COPY into the staging table."""
    return f"COPY pg_temp.{stage_name(plan)} FROM STDIN (FORMAT binary)"


def insert_text(plan: WritePlan) -> str:
    """INSERT what is staged, rows $1 (included) to $2 (not). Its command tag counts what took effect.

    Of rows with an equal key the last wins. Rows go in the order of the key, so that writers of the same rows wait for
    each other instead of deadlocking.
    """
    columns = ", ".join(quoted(field.column.name) for field in plan.fields)
    order = f"{ROW}"
    if plan.key:
        order = ", ".join(map(quoted, plan.key))
    elif plan.mode == "ignore":
        order = f"{ROW} DESC"  # the first one wins, and the last row shall
    overriding = " OVERRIDING SYSTEM VALUE" if plan.overriding else ""
    return (
        f"INSERT INTO {plan.table.shown} ({columns}){overriding} SELECT {columns} FROM ({_unique_rows(plan)}) "
        f"AS unique_rows ORDER BY {order}{_on_conflict(plan)}"
    )


def index_text(plan: WritePlan) -> str:
    """CREATE INDEX by which a range of staged rows is found without reading all."""
    stage = stage_name(plan)
    return f"CREATE INDEX {stage}_rows ON pg_temp.{stage} ({ROW})"


def drop_index_text(plan: WritePlan) -> str:
    """DROP INDEX of :func:`index_text`."""
    return f"DROP INDEX pg_temp.{stage_name(plan)}_rows"


def leave_out_text(plan: WritePlan) -> str:
    """DELETE staged rows by their numbers, $1."""
    return f"DELETE FROM pg_temp.{stage_name(plan)} WHERE {ROW} = ANY($1)"


def leave_equal_out_text(plan: WritePlan) -> str:
    """DELETE what is staged, of rows $1 (included) to $2 (not), but for the last row of each key."""
    return (
        f"DELETE FROM pg_temp.{stage_name(plan)} AS staged WHERE NOT EXISTS "
        f"(SELECT FROM ({_unique_rows(plan)}) AS unique_rows WHERE unique_rows.{ROW} = staged.{ROW})"
    )


def _unique_rows(plan: WritePlan) -> str:
    """SELECT of the staged rows $1 to $2, in the types of the table; of those with an equal key the last."""
    values = ", ".join(f"{_cast(field)} AS {quoted(field.column.name)}" for field in plan.fields)
    source = f"SELECT {values}, {ROW} FROM pg_temp.{stage_name(plan)} WHERE {ROW} >= $1 AND {ROW} < $2"
    if not plan.key:
        return source
    distinct = ", ".join(map(quoted, plan.key))
    if not plan.equal_nulls:
        some_null = " OR ".join(f"{quoted(name)} IS NULL" for name in plan.key)
        distinct = f"{distinct}, CASE WHEN {some_null} THEN {ROW} END"
    return f"SELECT DISTINCT ON ({distinct}) * FROM ({source}) AS given ORDER BY {distinct}, {ROW} DESC"


def _on_conflict(plan: WritePlan) -> str:
    if plan.mode == "append":
        return ""
    key = f" ({', '.join(map(quoted, plan.key))})" if plan.key else ""
    changed = [quoted(field.column.name) for field in plan.fields if field.column.name not in plan.key]
    if plan.mode == "ignore" or not changed:
        return f" ON CONFLICT{key} DO NOTHING"
    return f" ON CONFLICT{key} DO UPDATE SET {', '.join(f'{name} = EXCLUDED.{name}' for name in changed)}"


def _stage_type(way: Way) -> str:
    return f"pg_catalog.{way.type}" if not way.type.endswith("[]") else f"pg_catalog.{way.type[:-2]}[]"


def _cast(field: Field) -> str:
    """The staged value in the type of its column, but for length, precision and what a domain asks: these are looked
    at by the assignment, which refuses what an explicit cast would cut."""
    name = quoted(field.column.name)
    return name if field.way.type == field.column.type else f"{name}::{field.column.cast}"
