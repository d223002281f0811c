"""``raypg load``: files into a table, by the same way as :meth:`raypg.QueryPipelineNode.write`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import asyncpg
import pyarrow as pa
from rich.console import Console

from raypg import QueryPipelineNode, WorkflowConnectionPool
from raypg.cli_pools import connect
from raypg.core.arrow_types import FLOATS, INTEGERS
from raypg.core.nearest import did_you_mean, nearest
from raypg.core.sql_text import quoted_name
from raypg.core.write_plan import check_options, parse_name
from raypg.core.write_state import BATCH_ROWS
from raypg.errors import BatchConflictError, ConfigError, OutcomeUnknownError, RaypgError
from raypg.ingest.writing import WriteResult
from raypg.load_ledger import PIPELINE, Begun, batch_id, file_id, go_on, how_of, known
from raypg.pool import get_pool
from raypg.row_files import batches, found, names_in, row_at

READ_HERE: dict[str, pa.DataType] = {**INTEGERS, **FLOATS, "date": pa.date32()}
"""Types of columns that Arrow reads from text in the form that PostgreSQL writes; the server reads the rest."""

_DATA_EXCEPTION = "22"
"""Class of SQLSTATE."""

SHOWN = 60
"""Characters that are shown of a value."""

_COLUMNS = """
SELECT pg_catalog.format('%I.%I', n.nspname, c.relname), a.attname::text, coalesce(base.typname, t.typname)::text,
       EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid AND i.indisunique),
       a.attgenerated = '' AND a.attidentity <> 'a'
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
LEFT JOIN pg_catalog.pg_type base ON base.oid = t.typbasetype AND t.typtype = 'd'
WHERE c.oid = pg_catalog.to_regclass($1) ORDER BY a.attnum
"""

_TABLES = """
SELECT pg_catalog.format('%I.%I', n.nspname, c.relname),
       CASE WHEN pg_catalog.pg_table_is_visible(c.oid) THEN pg_catalog.format('%I', c.relname) END
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'f') AND n.nspname !~ '^(pg_|information_schema$)'
"""


class LoadError(RaypgError):
    """A file could not be loaded, or only a part of it. Says what was wrong, what is committed and what to do.
    ``args``: (message,)."""


class Target(NamedTuple):
    """A table that files are loaded into.

    Attributes:
        shown: its schema and name, as SQL.
        unique: it has a unique index.
        types: its columns, and as what their texts are read here; as texts if the server reads them.
        given: those of them for which values may be given.
    """

    shown: str
    unique: bool
    types: dict[str, pa.DataType]
    given: tuple[str, ...]


def load(
    patterns: Sequence[str],
    into: str,
    pool: str,
    mode: str,
    key: Sequence[str],
    on_bad_rows: str,
    batch_rows: int,
    again: bool,
    header: bool,
    address: str,
) -> None:
    """Load all files that *patterns* mean, one after the other.

    What a file is to the ledger is its path, size and time of change, and the table: loaded again, or once more after
    it was interrupted, it goes on where it was; a changed file is a new one.

    Raises:
        ConfigError: no such file, or one of a kind that is not known; another argument is wrong.
        Exception: as of :func:`load_files`.
    """
    files = found(patterns)
    parse_name(into)
    check_options(mode, on_bad_rows, list(key) or None, None)
    connect(address)
    console = Console()

    def tell(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    loading = load_files(
        get_pool(pool),
        files,
        into,
        tell,
        mode=mode,
        key=list(key) or None,
        on_bad_rows=on_bad_rows,
        batch_rows=batch_rows,
        again=again,
        header=header,
        progress=console.is_terminal,
    )
    asyncio.run(loading)


async def load_files(
    pool: WorkflowConnectionPool,
    files: Sequence[Path],
    into: str,
    tell: Callable[[str], None],
    *,
    mode: str = "append",
    key: Sequence[str] | None = None,
    on_bad_rows: str = "fail",
    batch_rows: int = BATCH_ROWS,
    again: bool = False,
    header: bool = True,
    progress: bool = False,
) -> None:
    """Load *files*, and tell of each what became of it. Without *header*, CSV and TSV have no line of names, but all
    columns of the table that can be given, in its order.

    Raises:
        ConfigError: there is no such table or column, a file cannot be read, or its rows would be there twice. Nothing
            was loaded.
        LoadError: a file was not loaded, or not all of it.
    """
    check_options(mode, on_bad_rows, key, None)
    target = await table_of(pool, into)
    names = None if header else target.given
    check_columns(target, key or (), {str(file): names_in(file, names) for file in files})
    ids = {file: file_id(file, target.shown) for file in files}
    wanted = Begun(how_of(mode, key, header), batch_rows)
    loads = {} if again else await known(pool, ids.values())
    ways = go_on(ids, loads, wanted, twice=mode == "append" or not target.unique)
    async with QueryPipelineNode(PIPELINE, pool) as pipeline:
        for file, way in ways.items():
            try:
                result = await pipeline.write(
                    batches(file, target.types, way.batch_rows, names),
                    into,
                    mode,
                    key,
                    None if again else batch_id(ids[file], way),
                    on_bad_rows,
                    progress,
                    batch_rows=way.batch_rows,
                )
            except (RaypgError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                what = what_failed(file, error, names)
                raise LoadError(f"{what}\n{what_next(error, mode, on_bad_rows, again)}") from error
            told = [f"{result.rows:,} rows in {result.seconds:.1f} s"]
            for count, what in (
                (result.known_rows, "loaded before"),
                (result.duplicates, "left out as duplicates"),
                (result.quarantined, "in raypg.quarantine"),
            ):
                if count:
                    told.append(f"{count:,} {what}")
            if way != wanted:
                told.append(f"in batches of {way.batch_rows:,} rows, as it was begun")
            tell(f"{file}: {', '.join(told)}")


async def table_of(pool: WorkflowConnectionPool, into: str) -> Target:
    """The table of that name, from the catalogue: who may only INSERT may not SELECT from it.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    schema, name = parse_name(into)
    columns = await pool.fetch(_COLUMNS, quoted_name(*filter(None, (schema, name))))
    if not columns:
        guess = nearest(into, [text for row in await pool.fetch(_TABLES) for text in row if text])
        raise ConfigError(f"into={into!r}: there is no such table{f' (did you mean {guess!r}?)' if guess else ''}")
    types = {row[1]: READ_HERE.get(row[2], pa.string()) for row in columns}
    return Target(columns[0][0], columns[0][3], types, tuple(row[1] for row in columns if row[4]))


def check_columns(target: Target, key: Sequence[str], files: Mapping[str, Sequence[str]]) -> None:
    """Look for what *target* does not have before anything is loaded. *files*: the columns of each.

    Raises:
        ConfigError: a column of *key* or of a file is not among its columns; names the nearest.
    """
    for where, names in [("the key", key), *files.items()]:
        for name in names:
            if name not in target.types:
                hint = did_you_mean(name, target.types)
                raise ConfigError(f"{where}: {target.shown} has no column {name!r}{hint}")


def what_failed(file: Path, error: Exception, names: Sequence[str] | None) -> str:
    """*error* in words; with line, column and values, if it is about a row of *file*, whose columns are *names* if it
    does not say itself."""
    if isinstance(error, BatchConflictError):
        return (
            f"{file}: a part of it was loaded when it had other rows (though its size and time of change are the "
            "same), or the columns of the table other types; --again loads all its rows, whatever is there"
        )
    row = getattr(error, "row", None)
    if row is None:
        return str(error) if str(file) in str(error) else f"{file}: {error}"
    try:
        line, values = row_at(file, row, names)
    except (OSError, pa.ArrowInvalid):
        line, values = None, {}
    column = getattr(error, "column_name", None)
    if column is None and (getattr(error, "sqlstate", None) or "").startswith(_DATA_EXCEPTION):
        # PostgreSQL puts a text that it cannot read in quotes, and does not say in which column it was.
        column = ", ".join(name for name, value in values.items() if value and f'"{value}"' in str(error.args[0]))
    where = f"row {row}, counted from 0" if line is None else f"line {line} (row {row}, counted from 0)"
    lines = str(error).removeprefix(f"row {row} of the data: ").splitlines()
    text = "\n".join(each for each in lines if not each.startswith("DETAIL:  Failing row contains"))
    shown = ", ".join(f"{name}={_short(value)}" for name, value in values.items())
    row_told = f" [{_short(shown, 5 * SHOWN)}]" if shown else ""
    return f"{file}, {where}{f', column {column}' if column else ''}: {text}{row_told}"


def _short(value: str | None, most: int = SHOWN) -> str:
    text = "NULL" if value is None else value
    return text if len(text) <= most else f"{text[: most - 1]}…"


def what_next(error: Exception, mode: str, on_bad_rows: str, again: bool) -> str:
    """What is committed of a file that failed with *error*, and what to do."""
    written: WriteResult = getattr(error, "written", WriteResult())
    rows = written.rows + written.known_rows
    at_least = "at least " if isinstance(error, OutcomeUnknownError) else ""
    told = f"{at_least}{rows:,} rows of this file are committed" if rows or at_least else "no row of it is committed"
    if again:
        return f"{told}; --again notes nothing, so that the same command loads all rows once more"
    told += "; the same command loads only what is missing"
    if hasattr(error, "row") and on_bad_rows == "fail":
        told += ", and with --on-bad-rows quarantine all rows but those that are refused"
    if rows and mode == "append":
        told += (
            "\na file that is changed is a new one, and loaded from its beginning: before you load it mended, delete "
            "the rows that are committed, or give --mode ignore or upsert with a --key"
        )
    return told
