"""``raypg load``: files into a table, by the same way as :meth:`raypg.QueryPipelineNode.write`."""

from __future__ import annotations

import asyncio
import glob
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from rich.console import Console

from raypg import QueryPipelineNode, WorkflowConnectionPool
from raypg.cli_pools import connect
from raypg.core.sql_text import quoted_name
from raypg.core.write_plan import parse_name
from raypg.core.write_state import BATCH_ROWS
from raypg.errors import ConfigError
from raypg.pool import get_pool

PIPELINE = "load"
"""Under whose name the ledger has the batches of files."""

BLOCK = 8 * 1024 * 1024
"""Bytes of a CSV file that are read at a time; no row may be longer."""

FORMATS = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".pq": "parquet"}


def load(
    patterns: Sequence[str],
    into: str,
    pool: str,
    mode: str,
    key: Sequence[str],
    on_bad_rows: str,
    batch_rows: int,
    again: bool,
    address: str,
) -> None:
    """Load all files that *patterns* mean, one after the other.

    What a file is to the ledger is its path, size and time of change: loaded again, or once more after it was
    interrupted, it goes on where it was; a changed file is a new one.

    Raises:
        ConfigError: no such file, or one of a kind that is not known.
        Exception: as of :meth:`raypg.QueryPipelineNode.write`.
    """
    files = found(patterns)
    connect(address)
    console = Console()

    def tell(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    how = {"mode": mode, "key": list(key) or None, "on_bad_rows": on_bad_rows, "batch_rows": batch_rows, "again": again}
    asyncio.run(load_files(get_pool(pool), files, into, tell, **how, progress=console.is_terminal))  # type: ignore[arg-type]


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
    progress: bool = False,
) -> None:
    """Load *files*, and tell of each what became of it."""
    table = quoted_name(*filter(None, parse_name(into)))
    async with pool.stream(f"SELECT * FROM {table} LIMIT 0") as stream:
        schema = stream.schema
    async with QueryPipelineNode(PIPELINE, pool) as pipeline:
        for file in files:
            result = await pipeline.write(
                batches(file, schema, batch_rows),
                into,
                mode,
                key,
                None if again else batch_id(file),
                on_bad_rows,
                progress,
                batch_rows=batch_rows,
            )
            told = [f"{result.rows:,} rows in {result.seconds:.1f} s"]
            for count, what in (
                (result.known_rows, "loaded before"),
                (result.duplicates, "left out as duplicates"),
                (result.quarantined, "in raypg.quarantine"),
            ):
                if count:
                    told.append(f"{count:,} {what}")
            tell(f"{file}: {', '.join(told)}")


def found(patterns: Sequence[str]) -> list[Path]:
    """The files that *patterns* mean, each once.

    Raises:
        ConfigError: a pattern means none, or a file is of no kind that is known.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        names = sorted(glob.glob(pattern, recursive=True)) or ([pattern] if Path(pattern).is_file() else [])
        if not names:
            raise ConfigError(f"{pattern}: there is no such file")
        files.update(dict.fromkeys(Path(name) for name in names))
    for file in files:
        if file.suffix.lower() not in FORMATS:
            raise ConfigError(f"{file}: must be one of {', '.join('*' + suffix for suffix in FORMATS)}")
    return list(files)


def batch_id(file: Path) -> str:
    """What the ledger calls a file: the same until it is changed."""
    status = file.stat()
    return f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}"


def batches(file: Path, schema: pa.Schema, batch_rows: int) -> Iterator[pa.RecordBatch]:
    """What is in *file*; the texts of a CSV file as the types of *schema*.

    Raises:
        ConfigError: it cannot be read as what its name says.
    """
    kind = FORMATS[file.suffix.lower()]
    try:
        if kind == "parquet":
            yield from pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=batch_rows)
            return
        types = {field.name: field.type for field in schema if _reads(field.type)}
        others = {field.name: pa.string() for field in schema if field.name not in types}
        yield from pyarrow.csv.open_csv(
            file,
            read_options=pyarrow.csv.ReadOptions(block_size=BLOCK),
            parse_options=pyarrow.csv.ParseOptions(delimiter="\t" if kind == "tsv" else ",", newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types={**types, **others},
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{file}: {error}") from None


def _reads(kind: pa.DataType) -> bool:
    """Whether Arrow reads *kind* from text in the form that PostgreSQL writes; the server reads the rest."""
    types = pa.types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_string(kind) or types.is_date(kind))
