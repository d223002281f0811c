"""Files of rows, CSV, TSV and Parquet, as Arrow data; and where in a file a row is."""

from __future__ import annotations

import csv
import glob
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from raypg.core.nearest import nearest
from raypg.errors import ConfigError

BLOCK = 8 * 1024 * 1024
"""Bytes of a CSV file that are read at a time; no row may be longer."""

FORMATS = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".pq": "parquet"}
COMPRESSED = (".gz", ".bz2", ".zst")
"""Behind ``.csv`` and ``.tsv``."""


def kind_of(file: Path) -> str | None:
    """``csv``, ``tsv`` or ``parquet``, as the name of *file* says; ``None`` if it says something else."""
    suffix = file.suffix.lower()
    if suffix in COMPRESSED:
        kind = FORMATS.get(file.with_suffix("").suffix.lower())
        return kind if kind != "parquet" else None
    return FORMATS.get(suffix)


def found(patterns: Sequence[str]) -> list[Path]:
    """The files that *patterns* mean, each once.

    Raises:
        ConfigError: a pattern means none, or a file is of no kind that is known.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        names = sorted(glob.glob(pattern, recursive=True)) or ([pattern] if Path(pattern).is_file() else [])
        if not names:
            raise ConfigError(f"{pattern}: there is no such file{_meant(Path(pattern))}")
        files.update(dict.fromkeys(Path(name) for name in names))
    for file in files:
        if file.is_dir():
            raise ConfigError(f"{file}: is a folder; give the files in it, as '{file}/*.csv'")
        if kind_of(file) is None:
            kinds = ", ".join("*" + suffix for suffix in FORMATS)
            raise ConfigError(f"{file}: must be one of {kinds}; CSV and TSV also with {', '.join(COMPRESSED)}")
    return list(files)


def _meant(file: Path) -> str:
    try:
        guess = nearest(file.name, [each.name for each in file.parent.iterdir() if kind_of(each)])
    except OSError:
        return f", and no folder {str(file.parent)!r}" if not glob.has_magic(str(file.parent)) else ""
    return f" (did you mean {str(file.parent / guess)!r}?)" if guess else ""


def names_in(file: Path, given: Sequence[str] | None = None) -> list[str]:
    """The names of the columns of *file*: *given*, if that is CSV or TSV without a line of names.

    Raises:
        ConfigError: it cannot be read as what its name says, or has more or fewer columns than *given*.
    """
    try:
        if kind_of(file) == "parquet":
            return list(pyarrow.parquet.read_schema(file).names)
        for line, fields in _records(file):
            if given is not None and len(fields) != len(given):
                raise ConfigError(
                    f"{file}, line {line}: {len(fields)} fields, and there are {len(given)} columns: {', '.join(given)}"
                )
            return fields if given is None else list(given)
    except (pa.ArrowInvalid, OSError, csv.Error) as error:
        raise ConfigError(f"{file}: {error}") from None
    raise ConfigError(f"{file}: it is empty; the first line of a CSV or TSV file names its columns")


def batches(
    file: Path, types: Mapping[str, pa.DataType], batch_rows: int, names: Sequence[str] | None = None
) -> Iterator[pa.Table | pa.RecordBatch]:
    """What is in *file*. Of CSV and TSV, *batch_rows* rows at a time (the last may have less), and each column in its
    type of *types*, if all its fields of these rows can be read so; if not, as texts, for the server to read. So what a
    batch is depends on nothing but its rows and on *types*. *names*: as for :func:`names_in`.

    Raises:
        ConfigError: it cannot be read as what its name says.
    """
    try:
        if kind_of(file) == "parquet":
            yield from pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=batch_rows)
            return
        reader = pyarrow.csv.open_csv(
            str(file),
            read_options=pyarrow.csv.ReadOptions(block_size=BLOCK, column_names=names),
            parse_options=pyarrow.csv.ParseOptions(delimiter=_delimiter(file), newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(names_in(file, names), pa.string()),
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
        for texts in _divided(reader, batch_rows):
            columns = [_read(column, types.get(name)) for name, column in zip(texts.column_names, texts, strict=True)]
            yield pa.table(columns, names=texts.column_names)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{file}{_where_broken(file)}: {error}") from None


def _divided(reader: pa.RecordBatchReader, batch_rows: int) -> Iterator[pa.Table]:
    """The rows of *reader*, *batch_rows* at a time; a table without rows if there are none."""
    waiting = reader.schema.empty_table()
    none_yet = True
    for batch in reader:
        waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch])])
        while waiting.num_rows >= batch_rows:
            yield waiting.slice(0, batch_rows)
            waiting, none_yet = waiting.slice(batch_rows), False
    if waiting.num_rows or none_yet:
        yield waiting


def _read(texts: pa.ChunkedArray, kind: pa.DataType | None) -> pa.ChunkedArray:
    """*texts* as *kind*, if Arrow reads all of them and as PostgreSQL would; if not, as they are."""
    if kind is None or pa.types.is_string(kind):
        return texts
    try:
        values = texts.cast(kind)
    except pa.ArrowInvalid:
        return texts
    # Hexadecimal is taken for the bits of a number, and what is too large for a float becomes infinite.
    if pa.types.is_integer(kind):
        doubtful = pc.match_substring(texts, "x", ignore_case=True)
    elif pa.types.is_floating(kind):
        doubtful = pc.is_inf(values)
    else:
        return values
    return texts if pc.any(doubtful).as_py() else values


def row_at(file: Path, number: int, names: Sequence[str] | None = None) -> tuple[int | None, dict[str, str | None]]:
    """(line on which row *number*, from 0, of *file* begins, its values); no line and no values where they cannot be
    told. *names*: as for :func:`names_in`."""
    if kind_of(file) == "parquet":
        first = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            if number < first + batch.num_rows:
                values = batch.slice(number - first, 1).to_pylist()[0]
                return None, {name: None if value is None else str(value) for name, value in values.items()}
            first += batch.num_rows
        return None, {}
    for place, (line, fields) in enumerate(_records(file), start=0 if names is not None else -1):
        if names is None:
            names = fields
        elif place == number:
            return line, dict(zip(names, fields, strict=False))
    return None, {}


def _where_broken(file: Path) -> str:
    """The first line of *file* that cannot be read, in words; empty if that cannot be told."""
    if kind_of(file) == "parquet":
        return ""
    try:
        width = 0
        for line, fields in _records(file):
            width = width or len(fields)
            if len(fields) != width:
                return f", line {line}"
            if any("\udc80" <= letter <= "\udcff" for field in fields for letter in field if letter > "\ud7ff"):
                return f", line {line} (files must be UTF-8)"
    except (OSError, csv.Error):
        pass
    return ""


def _delimiter(file: Path) -> str:
    return "\t" if kind_of(file) == "tsv" else ","


def _records(file: Path) -> Iterator[tuple[int, list[str]]]:
    """(line on which it begins, fields) of each record, also of the names. Much slower than Arrow, but knows lines.

    Raises:
        OSError, csv.Error: it cannot be read.
    """
    csv.field_size_limit(BLOCK)
    with (
        pa.input_stream(str(file)) as raw,
        io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="") as text,
    ):
        reader = csv.reader(text, delimiter=_delimiter(file))
        line = 1
        for fields in reader:
            if fields:  # Arrow skips empty lines, too
                yield line, fields
            line = reader.line_num + 1
