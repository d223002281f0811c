"""Ray Data reads PostgreSQL through a pool: ``PostgresDatasource("main_pool", table=…).dataset()``."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import ray
from ray.data import Dataset, Datasource, ReadTask
from ray.data.block import BlockMetadata

from raypg import background
from raypg.arrow_stream import BATCH_BYTES
from raypg.checks import check_statement
from raypg.core.copy_text import check_query, without_semicolon
from raypg.core.nearest import did_you_mean
from raypg.core.shards import blocks, integer_bounds, key_ranges, page_shards, parts, sensible
from raypg.core.sql_text import quoted_name
from raypg.errors import ConfigError
from raypg.lease import LeasedConnection
from raypg.pool import WorkflowConnectionPool, get_pool
from raypg.pushdown import split
from raypg.row import Row
from raypg.shard import Shard
from raypg.snapshot import Snapshot

if TYPE_CHECKING:
    from ray.data.context import DataContext

__all__ = ["PostgresDatasource"]

T = TypeVar("T")

TID_RANGES = 140_000
"""Version since which PostgreSQL reads a range of pages without reading all others."""

AGAIN_AFTER = 1.0
"""Seconds after which a plan is made anew, and the snapshot is asked for."""

_INTEGERS = {20, 21, 23}

_TABLE = """
SELECT format('%I.%I', n.nspname, c.relname) AS name, c.relkind::text AS kind,
       current_setting('server_version_num')::int AS version,
       pg_catalog.pg_relation_size(c.oid) / current_setting('block_size')::int AS pages,
       pg_catalog.pg_relation_size(c.oid) AS paged,
       coalesce(pg_catalog.pg_relation_size(nullif(c.reltoastrelid, 0)), 0) AS toasted,
       EXISTS (SELECT FROM pg_catalog.pg_inherits i WHERE i.inhparent = c.oid) AS parent,
       nullif(c.reltuples, -1) * (
           SELECT sum(s.avg_width + CASE WHEN a.attlen < 0 THEN 4 ELSE 0 END)
           FROM pg_catalog.pg_stats s
           JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attname = s.attname
           WHERE s.schemaname = n.nspname AND s.tablename = c.relname
       ) AS values
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = to_regclass($1)
"""

_DECIMALS = """
SELECT attname::text AS name, (atttypmod - 4) >> 16 & 65535 AS precision, (atttypmod - 4) & 2047 AS scale
FROM pg_catalog.pg_attribute
WHERE attrelid = to_regclass($1) AND atttypid = 1700 AND atttypmod > 4 AND attnum > 0 AND NOT attisdropped
"""


@dataclass(frozen=True)
class _Source:
    """What is known of a table or query.

    Attributes:
        stored: bytes of a table that is read by ranges of its pages.
        size: bytes of its rows as Arrow, about.
    """

    text: str
    columns: dict[str, int]
    schema: pa.Schema
    decimals: dict[str, tuple[int, int]]
    stored: int | None = None
    size: int | None = None

    @property
    def by_pages(self) -> bool:
        """Whether it is divided by its pages."""
        return self.stored is not None


@dataclass
class _View:
    """The snapshot that all plans of one dataset share, and what was found out in it."""

    snapshot: Snapshot | None = None
    source: _Source | None = None
    shards: dict[int, list[list[str]]] = field(default_factory=dict)
    planned_at: float = -math.inf
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __reduce__(self) -> tuple[Any, ...]:
        return _View, ()


class PostgresDatasource(Datasource):  # type: ignore[misc]
    """Reads a table or a query into a Dataset, in shards, through the pool and within its cap.

    Tables are divided by their pages, which needs no key; anything else by ranges of *key*. Rows come by COPY and
    become Arrow in the read tasks. Columns that are not wanted, and filters (``ds.filter(expr=…)``) that PostgreSQL
    understands in the same way, are left to the server. All shards see the database as it was when the read was first
    planned.

    Args:
        pool: a running pool, or its name.
        table: name of a table, as in SQL; may have a schema.
        query: or one SELECT, VALUES, TABLE or WITH, without parameters. It runs without parallel workers; let it order
            its rows by something unique, and use no volatile function, since Ray makes a block that it has lost by
            running its task again.
        columns: those to read; all by default.
        filter: a condition in SQL.
        key: a column by whose ranges to divide a query, view or partitioned table; without it one task reads these.
        shards: how many to make, at most: one read task each. By default as many as Ray Data wants, but no more than
            one for each 96 MB of a table, or 8 of what is divided by *key*; Ray Data divides their blocks further if it
            wants more. Of a table, a task reads the next pages ahead over a second connection while the pool has one.
        consistent: read one snapshot. It takes one connection, and holds up VACUUM, until the dataset is dropped or
            ``close()`` is called, for at most *timeout* seconds. Without, each shard sees what is committed when it
            begins, and reads over one connection.
        batch_bytes: bytes that are fetched at a time, about; Ray Data makes larger blocks of them.
        timeout: seconds for which a shard may wait for its connection, and read; and for which the snapshot is held.

    Raises:
        ConfigError: not one of *table* and *query*, no such table or column …
        SnapshotLostError: from the read, when the snapshot has ended before a shard began, or what it reads was
            emptied, written anew or exchanged.
    """

    def __init__(
        self,
        pool: WorkflowConnectionPool | str,
        *,
        table: str | None = None,
        query: str | None = None,
        columns: Sequence[str] | None = None,
        filter: str | None = None,
        key: str | None = None,
        shards: int | None = None,
        consistent: bool = True,
        batch_bytes: int = BATCH_BYTES,
        timeout: float = 3600.0,
    ) -> None:
        super().__init__()
        if (table is None) == (query is None):
            raise ConfigError("give one of table= and query=")
        if shards is not None and (isinstance(shards, bool) or not isinstance(shards, int) or shards < 1):
            raise ConfigError(f"shards={shards!r}: must be a whole number greater than zero")
        if isinstance(columns, str) or (columns is not None and not columns):
            raise ConfigError(f"columns={columns!r}: must be a list of names")
        for text in (table, query, filter, key):
            if text is not None:
                check_statement(text)
        if query is not None:
            check_query(query)
        self._projection_map: dict[str, str] | None = None
        self._pool = pool if isinstance(pool, WorkflowConnectionPool) else get_pool(pool)
        self._table = table
        self._query = query
        self._columns = None if columns is None else list(columns)
        self._filter = filter
        self._key = key
        self._shards = shards
        self._consistent = consistent
        self._batch_bytes = batch_bytes
        self._timeout = timeout
        self._view = _View()

    def __repr__(self) -> str:
        what = f"table {self._table!r}" if self._table is not None else "a query"
        return f"<PostgresDatasource of {what} in pool {self._pool.name!r}>"

    # --- what Ray Data asks ---

    def supports_projection_pushdown(self) -> bool:
        """Yes."""
        return True

    def supports_predicate_pushdown(self) -> bool:
        """Yes: what PostgreSQL cannot do in the same way is done in the read task."""
        return True

    def estimate_inmemory_data_size(self) -> int | None:
        """Bytes of the table's values as ANALYZE has found them, or else of its pages; ``None`` for a query."""
        return _blocking(self._described).size

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """One task for each shard."""
        source, shards = _blocking(functools.partial(self._plan, parallelism))
        snapshot = self._view.snapshot
        pushed, rest = split(self._predicate_expr, source.columns)
        wanted = self._wanted(source)
        read = list(source.columns) if rest else wanted  # what is left to filter by may not be wanted
        schema = pa.schema([source.schema.field(name) for name in wanted])
        size = None if source.size is None else source.size // len(shards)
        select = f"SELECT {', '.join(map(quoted_name, read))} FROM {source.text}"
        conditions = (*pushed, *([self._filter] if self._filter else []))
        tasks = []
        for ranges in shards:
            shard = Shard(
                self._pool.name,
                select,
                tuple(ranges),
                conditions,
                snapshot,
                source.decimals,
                schema,
                tuple(rest),
                source.by_pages,
                self._batch_bytes,
                per_task_row_limit,
                self._timeout,
            )
            metadata = BlockMetadata(num_rows=None, size_bytes=size, input_files=None, exec_stats=None)
            tasks.append(ReadTask(shard, metadata, schema=schema, per_task_row_limit=per_task_row_limit))
        return tasks

    # --- for the user ---

    def dataset(self, **options: Any) -> Dataset:
        """What it reads as a Dataset, in as many blocks as the cluster's processors have use for.

        ``ray.data.read_datasource`` by itself divides what it reads into 200, of 1 MB at least
        (``DataContext.read_op_min_num_blocks``), and needs some milliseconds for each, one after the other: a good part
        of the time of a read.

        Args:
            options: of ``ray.data.read_datasource``, such as ``concurrency``; ``override_num_blocks`` is for another
                number of blocks.

        Raises:
            ConfigError: there is nothing such to be read.
            UnavailableError, asyncpg.PostgresError: the database could not be asked.
        """
        if options.get("override_num_blocks") is None:
            source = _blocking(self._described)
            processors = int(ray.cluster_resources().get("CPU", 0))
            stored = source.stored if self._shards is None else None
            options["override_num_blocks"] = max(self._shards or 0, blocks(processors, source.size, stored))
        return ray.data.read_datasource(self, **options)

    def close(self) -> None:
        """Give the snapshot's connection back. What was not read until now fails; a new read takes a new snapshot."""
        snapshot, self._view.snapshot, self._view.shards = self._view.snapshot, None, {}
        if snapshot is not None:
            _blocking(snapshot.end)

    # --- inside ---

    def _wanted(self, source: _Source) -> list[str]:
        names = self._columns or list(source.columns)
        if self._projection_map is None:
            return names
        wanted = [name for name in self._projection_map if name in names]
        # Rows are counted, say: a block without columns would have none.
        return wanted or names[:1]

    def _where(self) -> str:
        return f" WHERE ({self._filter}\n)" if self._filter else ""

    async def _described(self) -> _Source:
        async with self._view.lock:
            if self._view.source is None:
                self._view.source = await self._describe()
            return self._view.source

    async def _describe(self) -> _Source:
        """Find out what there is to read.

        Raises:
            ConfigError: no such table or column.
            asyncpg.PostgresError: the server does not understand the query or the filter.
        """
        pool, known, decimals = self._pool, None, {}
        if self._table is None:
            text = f"(\n{without_semicolon(str(self._query))}\n) AS q"
        else:
            known, numerics = await asyncio.gather(
                pool.fetchrow(_TABLE, self._table), pool.fetch(_DECIMALS, self._table)
            )
            if known is None:
                raise ConfigError(f"table={self._table!r}: there is no such table in the database of {pool!r}")
            text = known["name"]
            decimals = {name: (precision, scale) for name, precision, scale in numerics}
        stream = pool.stream(f"SELECT * FROM {text}{self._where()} LIMIT 0", decimals=decimals)
        async with stream:
            schema, described = stream.schema, stream.columns
        columns = {column.name: column.oid for column in described}
        if len(columns) < len(described):
            raise ConfigError("two columns of the query have the same name: give them others with AS")
        for name in [*(self._columns or ()), *([self._key] if self._key else [])]:
            if name not in columns:
                raise ConfigError(f"there is no column {name!r}{did_you_mean(name, columns)}")
        if known is None or known["kind"] not in ("r", "m") or known["parent"]:
            return _Source(text, columns, schema, decimals)
        size = int(min(known["paged"], known["values"] or math.inf)) + known["toasted"]
        by_pages = self._key is None and known["version"] >= TID_RANGES
        return _Source(text, columns, schema, decimals, _stored(known) if by_pages else None, size)

    async def _plan(self, parallelism: int) -> tuple[_Source, list[list[str]]]:
        """What to read, and the conditions of the ranges of each shard, seen in the snapshot."""
        source, view = await self._described(), self._view
        async with view.lock:
            now = time.monotonic()
            if now > view.planned_at + AGAIN_AFTER:
                view.shards, view.planned_at = {}, now
            if parallelism not in view.shards:  # Ray Data plans one read several times over
                most = self._shards
                shards = sensible(parallelism, source.stored) if most is None else max(1, min(parallelism, most))
                async with contextlib.AsyncExitStack() as stack:
                    where: LeasedConnection | WorkflowConnectionPool = self._pool
                    if self._consistent:
                        snapshot = await self._snapshot(source)
                        where = await stack.enter_async_context(snapshot.questions())
                    found = await self._conditions(source, shards, where)
                view.shards[parallelism] = found
            return source, view.shards[parallelism]

    async def _snapshot(self, source: _Source) -> Snapshot:
        """The snapshot of this read, a new one if need be."""
        view = self._view
        if view.snapshot is not None:
            if await view.snapshot.is_good():
                return view.snapshot
            await view.snapshot.end()
        if (await self._pool._dispatcher()).config.max_connections < 2:
            raise ConfigError(
                f"pool {self._pool.name!r} has one connection, which the snapshot would take: give the pool more, or "
                "consistent=False"
            )
        query = f"SELECT * FROM {source.text}{self._where()}"
        view.snapshot, view.shards = await Snapshot.take(self._pool, self._timeout, query), {}
        return view.snapshot

    async def _conditions(
        self, source: _Source, shards: int, where: LeasedConnection | WorkflowConnectionPool
    ) -> list[list[str]]:
        if source.by_pages:
            row = await where.fetchrow(_TABLE, self._table)
            return [["true"]] if row is None else page_shards(row["pages"], shards, parts(_stored(row), shards))
        if self._key is None or shards == 1:
            return [["true"]]
        key = quoted_name(self._key)
        condition = self._where()
        if source.columns[self._key] in _INTEGERS:
            row = await where.fetchrow(f"SELECT min({key}), max({key}) FROM {source.text}{condition}")
            if row is None or row[0] is None:
                return [["true"]]
            bounds = integer_bounds(row[0], row[1], shards)
        else:
            places = [number / shards for number in range(1, shards)]
            ranked = f"percentile_disc($1::float8[]) WITHIN GROUP (ORDER BY {key})"
            found = await where.fetchval(f"SELECT ({ranked})::text[] FROM {source.text}{condition}", places)
            bounds = [bound for bound in found or () if bound is not None]
        kind = await where.fetchval(f"SELECT pg_typeof((SELECT {key} FROM {source.text} LIMIT 1))::text")
        return [[condition] for condition in key_ranges(key, bounds, kind)]


def _stored(table: Row) -> int:
    return int(table["paged"] + table["toasted"])


def _blocking(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Do *work* on the background loop. Ray Data plans in whatever thread asks for rows, and blocks it anyhow: also one
    that runs an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return background.run(work)
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(background.run(work))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="raypg-planning")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]
