"""What the ledger calls the batches of files that `raypg load` loads, and what it knows of a file already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import asyncpg

from raypg import WorkflowConnectionPool
from raypg.errors import ConfigError

PIPELINE = "load"
"""Under whose name the ledger has the batches of files."""

# The scan is over all that was ever loaded, and only once for all files.
_BEGUN = """
SELECT DISTINCT pg_catalog.regexp_replace(batch_id, '/[0-9]+$', '') FROM raypg.batches
WHERE pipeline = $1
  AND pg_catalog.regexp_replace(batch_id, ':[^:]*:[0-9]+/[0-9]+$', '') IN (SELECT pg_catalog.unnest($2::text[]))
"""


class Begun(NamedTuple):
    """A load of a file that the ledger has batches of. ``how``: see :func:`how_of`."""

    how: str
    batch_rows: int


def how_of(mode: str, key: Sequence[str] | None, header: bool) -> str:
    """How a file is loaded, as options of the command, without a colon."""
    keys = [f"--key {quote(name, safe='')}" for name in sorted(key or ())]
    return " ".join(["--mode", mode, *keys, *([] if header else ["--no-header"])])


def file_id(file: Path, table: str) -> str:
    """A file in *table*: the same until it is changed."""
    status = file.stat()
    return f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}:{table}"


def batch_id(file: str, begun: Begun) -> str:
    """What the ledger calls the batches of the file with that id."""
    return f"{file}:{begun.how}:{begun.batch_rows}"


async def known(pool: WorkflowConnectionPool, files: Iterable[str]) -> dict[str, list[Begun]]:
    """Id of a file → its loads. Nothing of any where there is no ledger, or it is not for us: who writes is told so."""
    try:
        rows = await pool.fetch(_BEGUN, PIPELINE, list(files))
    except (asyncpg.UndefinedTableError, asyncpg.InsufficientPrivilegeError):
        return {}
    loads: dict[str, list[Begun]] = {}
    for (text,) in rows:
        file, how, batch_rows = text.rsplit(":", 2)
        loads.setdefault(file, []).append(Begun(how, int(batch_rows)))
    return loads


def go_on(
    files: Mapping[Path, str], loads: Mapping[str, Sequence[Begun]], wanted: Begun, twice: bool
) -> dict[Path, Begun]:
    """How to load each of *files* (with its id), if *loads* are known and *wanted* is asked for: what was begun goes on
    in batches of the same size, as other ones would have rows that are there already.

    Args:
        twice: rows that are there would be there twice.

    Raises:
        ConfigError: a file was loaded in another way, and rows would be there twice.
    """
    chosen = {}
    for file, id_ in files.items():
        same = sorted(load.batch_rows for load in loads.get(id_, ()) if load.how == wanted.how)
        other = sorted(load.how for load in loads.get(id_, ()) if load.how != wanted.how)
        if other and twice:
            raise ConfigError(
                f"{file}: it was loaded, or a part of it, with {other[0]}, and with {wanted.how} its rows would be "
                f"there twice; load what is missing with {other[0]}, or give --again to have them twice"
            )
        chosen[file] = Begun(wanted.how, same[0]) if same and wanted.batch_rows not in same else wanted
    return chosen
