"""`raypg load`: files into tables, each row once, also when it is killed half way."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import os
import pty
import re
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pyarrow as pa
import pyarrow.parquet
import pytest
from commands import RAYPG, run, variables_of
from pools import own_pool, unique_name
from waiting import eventually

from raypg import ConfigError, WorkflowConnectionPool
from raypg.cli_load import LoadError, load_files
from raypg.demo_cluster import LocalCluster
from raypg.embedded import EmbeddedServer
from raypg.load_ledger import file_id
from raypg.row_files import batches, found

KINDS = """create table {} (id int primary key, label text, price numeric(8,2), ok boolean, at timestamptz, day date,
           code uuid, tags text[], ratio float8)"""


async def load(pool: WorkflowConnectionPool, files: list[Path], into: str, **how: object) -> str:
    """What is told of a load."""
    told: list[str] = []
    await load_files(pool, files, into, told.append, **how)  # type: ignore[arg-type]
    return "\n".join(told)


async def test_csv_fields_become_the_types_of_their_columns(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str, tmp_path: Path
) -> None:
    await direct.execute(KINDS.format(f"{schema}.kinds"))
    file = tmp_path / "rows.csv"
    file.write_text(
        "price,id,label,ok,at,day,code,tags,ratio\n"
        '1.50,1,"a ""quoted"", text\nof two lines",true,2020-01-01 12:00:00+02,2020-02-29,'
        '6ba7b810-9dad-11d1-80b4-00c04fd430c8,"{a,""b c""}",0.1\n'
        ',2,"",f,,,,,\n'
        "7,3,,no,2020-06-01T00:00:00Z,2020-03-01,,{},NaN\n"
    )
    assert "3 rows in" in await load(pool, [file], f"{schema}.kinds")
    first, second, third = await direct.fetch("select * from kinds order by id")
    assert first["label"] == 'a "quoted", text\nof two lines'
    assert (first["price"], first["ok"], first["tags"]) == (decimal.Decimal("1.50"), True, ["a", "b c"])
    assert first["at"] == datetime.datetime(2020, 1, 1, 10, tzinfo=datetime.UTC)
    assert (first["day"], str(first["code"])[:8], first["ratio"]) == (datetime.date(2020, 2, 29), "6ba7b810", 0.1)
    assert tuple(second)[1:5] == ("", None, False, None)
    assert (third["label"], third["ok"], third["tags"]) == (None, False, [])
    assert "3 loaded before" in await load(pool, [file], f"{schema}.kinds")
    assert "3 left out as duplicates" in await load(
        pool, [file], f"{schema}.kinds", mode="ignore", key=["id"], again=True
    )
    file.write_text("id,label\n1,changed\n9,new\n")
    await load(pool, [file], f"{schema}.kinds", mode="upsert", key=["id"])
    assert [row["label"] for row in await direct.fetch("select label from kinds order by id")][::3] == [
        "changed",
        "new",
    ]


async def test_parquet_and_bad_rows(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, table: str, tmp_path: Path
) -> None:
    data = pa.table({"id": range(1000), "label": ["x"] * 1000, "amount": [-1 if n == 500 else n for n in range(1000)]})
    pyarrow.parquet.write_table(data, tmp_path / "rows.parquet")
    with pytest.raises(
        LoadError, match=r"rows\.parquet, row 500, counted from 0: .*\[id=500, label=x, amount=-1\]"
    ) as bad:
        await load(pool, [tmp_path / "rows.parquet"], table, batch_rows=400)
    assert isinstance(bad.value.__cause__, asyncpg.CheckViolationError)
    told = await load(pool, [tmp_path / "rows.parquet"], table, batch_rows=400, on_bad_rows="quarantine")
    assert "1 in raypg.quarantine" in told
    assert await direct.fetchval(f"select count(*) from {table}") == 999


BAD = {
    "one": ("int2", "7", "abc", "22P02"),
    "two": ("int8", "-8", "1.5", "22P02"),
    "three": ("float4", "0.5", "1e40", "22003"),
    "four": ("float8", "NaN", "much", "22P02"),
    "five": ("numeric(6,2)", "1.50", "1,5", "22P02"),
    "six": ("date", "2024-02-29", "2023-02-29", "22008"),
    "seven": ("timestamptz", "2024-01-01 00:00+01", "yesteryear", "22007"),
    "eight": ("bool", "yes", "perhaps", "22P02"),
    "nine": ("uuid", "6ba7b810-9dad-11d1-80b4-00c04fd430c8", "6ba7", "22P02"),
    "ten": ("jsonb", "{}", "{", "22P02"),
    "eleven": ("{schema}.small", "1", "0", "23514"),
}
"""Columns: their type, a good text for it, a bad one, and the SQLSTATE of that."""


async def test_fields_that_cannot_be_read_are_quarantined(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str, tmp_path: Path
) -> None:
    await direct.execute(f"create domain {schema}.small as int check (value > 0)")
    columns = ", ".join(f"{name} {kind}".format(schema=schema) for name, (kind, *_) in BAD.items())
    await direct.execute(f"create table {schema}.kinds (id int, {columns})")
    file, good = tmp_path / "rows.csv", [f'"{text}"' for _, text, *_ in BAD.values()]
    lines = [",".join(["id", *BAD])]
    for number in range(40):
        fields = list(good)
        if number % 3 == 1 and number // 3 < len(BAD):
            fields[number // 3] = f'"{list(BAD.values())[number // 3][2]}"'
        lines.append(",".join([str(number), *fields]))
    file.write_text("\n".join(lines))
    into, batches_of = f"{schema}.kinds", {"batch_rows": 10}
    with pytest.raises(LoadError, match="counted from 0") as failed:
        await load(pool, [file], into, **batches_of)
    before = await direct.fetchval("select count(*) from kinds")
    assert f"{before:,} rows of this file are committed" * bool(before) in str(failed.value)
    told = await load(pool, [file], into, **batches_of, on_bad_rows="quarantine")
    assert "11 in raypg.quarantine" in told
    assert (f"{before:,} loaded before" in told) == bool(before)
    bad = "select row, sqlstate, data from raypg.quarantine where target = $1 order by row"
    stored = await direct.fetch(bad, f'"{schema}"."kinds"')
    assert [tuple(row)[:2] for row in stored] == [(3 * n + 1, case[3]) for n, case in enumerate(BAD.values())]
    assert json.loads(stored[0]["data"])["one"] == "abc"
    assert await direct.fetchrow("select count(*), count(distinct id), sum(one) from kinds") == (29, 29, 7 * 29)


async def test_a_failed_load_says_where_and_what_is_committed(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, table: str, tmp_path: Path
) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('label,id\n"of two\nlines",1\n\nb,2\nc,0x1F\nd,abc\ne,5\n')
    with pytest.raises(LoadError) as failed:
        await load(pool, [file], table, batch_rows=2)
    assert f"{file}, line 7 (row 3, counted from 0), column id: invalid input syntax for type integer" in str(
        failed.value
    )
    assert "[label=d, id=abc]" in str(failed.value)
    rows = await direct.fetchval(f"select count(*) from {table}")
    assert f"{rows} rows of this file are committed; the same command loads only what is missing" in str(failed.value)
    assert "before you load it mended, delete the rows that are committed" in str(failed.value)
    await load(pool, [file], table, batch_rows=2, on_bad_rows="quarantine")
    assert [row["id"] for row in await direct.fetch(f"select id from {table} order by id")] == [1, 2, 5, 31]
    file.write_text("id,label\n7,x\n8,y,z\n")
    with pytest.raises(LoadError, match=r"rows\.csv, line 3: CSV parse error.*\nno row of it is committed"):
        await load(pool, [file], table, on_bad_rows="quarantine")
    file.write_bytes(b"id,label\n7,\xff\n")
    with pytest.raises(LoadError, match=r"rows\.csv, line 2 \(files must be UTF-8\)"):
        await load(pool, [file], table)


async def test_one_file_into_two_tables_and_by_other_ways(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, table: str, schema: str, tmp_path: Path
) -> None:
    await direct.execute(f'create table "a:b" as table {table}')
    file, into = tmp_path / "rows.csv", f'{schema}."a:b"'
    file.write_text("id,amount\n" + "".join(f"{n},{n}\n" for n in range(9)) + "9,-1\n")
    with pytest.raises(LoadError, match="violates check constraint"):
        await load(pool, [file], table, batch_rows=3)
    assert "10 rows in" in await load(pool, [file], into, batch_rows=3)
    # What was begun in batches of three goes on so: in other batches its rows would be there twice.
    told = await load(pool, [file], into, batch_rows=4)
    assert "10 loaded before, in batches of 3 rows, as it was begun" in told
    assert await direct.fetchval(f"select count(*) from {into}") == 10
    with pytest.raises(ConfigError, match="with --mode append, and with --mode ignore its rows would be there twice"):
        await load(pool, [file], into, mode="ignore")
    told = await load(pool, [file], table, mode="upsert", key=["id"], on_bad_rows="quarantine", batch_rows=4)
    assert told.startswith(f"{file}: 9 rows in")
    assert "1 in raypg.quarantine" in told
    told = await load(pool, [file], table, mode="ignore", on_bad_rows="quarantine")
    assert "9 left out as duplicates" in told
    with pytest.raises(ConfigError, match=r"with --mode (ignore|upsert --key id), and with --mode append"):
        await load(pool, [file], table, on_bad_rows="quarantine")
    assert await direct.fetchval(f"select count(*) from {table}") == 9
    # The same size and time of change, but other rows.
    changed = file.read_text().replace("7,7", "7,8")
    at = file.stat()
    file.write_text(changed)
    os.utime(file, ns=(at.st_atime_ns, at.st_mtime_ns))
    with pytest.raises(LoadError, match="when it had other rows"):
        await load(pool, [file], into)


async def test_without_a_line_of_names_columns_are_those_of_the_table(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str, tmp_path: Path
) -> None:
    await direct.execute(
        "create table t (a text, n int generated always as identity, b int, c int generated always as (b * 2) stored)"
    )
    file = tmp_path / "rows.tsv"
    file.write_text('x\t1\n\n"two\n""lines"""\tb\ny,z\t3\n')
    with pytest.raises(LoadError, match=r'rows\.tsv, line 3 \(row 1, .*\), column b: .*: "b"'):
        await load(pool, [file], f"{schema}.t", header=False)
    assert "2 rows in" in await load(pool, [file], f"{schema}.t", header=False, on_bad_rows="quarantine")
    assert [tuple(row) for row in await direct.fetch("select a, b, c from t order by b")] == [
        ("x", 1, 2),
        ("y,z", 3, 6),
    ]
    file.write_text("x\t1\t2\n")
    with pytest.raises(ConfigError, match=r"rows\.tsv, line 1: 3 fields, and there are 2 columns: a, b"):
        await load(pool, [file], f"{schema}.t", header=False)


async def test_what_is_wrong_is_said_before_anything_is_loaded(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, table: str, tmp_path: Path
) -> None:
    good, bad = tmp_path / "a.csv", tmp_path / "b.csv"
    good.write_text("id\n1\n")
    bad.write_text("id,lable\n2,x\n")
    pyarrow.parquet.write_table(pa.table({"id": [3], "amuont": [1]}), tmp_path / "c.parquet")
    for files, how, message in [
        ([good, bad], {}, r"b\.csv: .*item has no column 'lable' \(did you mean 'label'\?\)"),
        ([good, tmp_path / "c.parquet"], {}, r"c\.parquet: .* no column 'amuont' \(did you mean 'amount'\?\)"),
        ([good], {"mode": "upsert", "key": ["idd"]}, r"the key: .* no column 'idd' \(did you mean 'id'\?\)"),
        ([good], {"mode": "upsrt"}, r"mode='upsrt' is unknown \(did you mean 'upsert'\?\)"),
        ([good], {"on_bad_rows": "quarantaine"}, r"did you mean 'quarantine'\?"),
        ([good], {"key": ["id"]}, "did you mean 'ignore' or 'upsert'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            await load(pool, files, table, **how)
    with pytest.raises(ConfigError, match=rf"no such table \(did you mean '{table}'\?\)"):
        await load(pool, [good], table[:-1])
    assert await direct.fetchval(f"select count(*) from {table}") == 0


async def test_insert_is_the_only_privilege_that_is_needed(
    pg: EmbeddedServer, pool: WorkflowConnectionPool, direct: asyncpg.Connection, table: str, tmp_path: Path
) -> None:
    role, file = f"loader_{table[:14]}", tmp_path / "rows.csv.gz"
    file.write_bytes(gzip.compress(b"id,label\n1,x\n2,y\n"))
    assert "2 rows in" in await load(pool, [file], table)  # the ledger is there
    await direct.execute(f"truncate {table}; create role {role} login password 'x'")
    try:
        await direct.execute(
            f"grant usage on schema {table.split('.')[0]}, raypg to {role}; grant insert on {table} to {role};"
            f"grant select, insert, update, delete on raypg.batches, raypg.quarantine to {role}"
        )
        async with own_pool(pg, user=role, password="x", max_connections=2) as own:
            assert "2 rows in" in await load(own, [file], table, again=True)
    finally:
        await direct.execute(f"drop owned by {role}; drop role {role}")
    assert [tuple(row) for row in await direct.fetch(f"select id, label from {table} order by id")] == [
        (1, "x"),
        (2, "y"),
    ]


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("id\n1\n")
    (tmp_path / "a.CSV").write_text("id\n1\n")
    (tmp_path / "[x].csv").write_text("id\n1\n")
    (tmp_path / "c.txt").touch()
    assert [file.name for file in found([f"{tmp_path}/*.csv", f"{tmp_path}/b.csv", f"{tmp_path}/a.CSV"])] == [
        "[x].csv",
        "b.csv",
        "a.CSV",
    ]
    assert [file.name for file in found([f"{tmp_path}/[x].csv"])] == ["[x].csv"]
    with pytest.raises(ConfigError, match="there is no such file"):
        found([f"{tmp_path}/*.parquet"])
    with pytest.raises(ConfigError, match=r"c\.txt: must be one of"):
        found([f"{tmp_path}/c.txt"])
    with pytest.raises(ConfigError, match=r"c\.cvs: there is no such file"):
        found([f"{tmp_path}/c.cvs"])
    with pytest.raises(ConfigError, match=r"b\.cvs: there is no such file \(did you mean '.*/b\.csv'\?\)"):
        found([f"{tmp_path}/b.cvs"])
    with pytest.raises(ConfigError, match=r"is a folder; give the files in it, as '.*/\*\.csv'"):
        found([f"{tmp_path}"])
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(ConfigError, match=r"bad\.parquet"):
        list(batches(tmp_path / "bad.parquet", {}, 10))
    before = file_id(tmp_path / "b.csv", "t")
    (tmp_path / "b.csv").write_text("id\n2\n3\n")
    assert file_id(tmp_path / "b.csv", "t") != before


@pytest.fixture(scope="module")
def loading(
    command_cluster: LocalCluster, pg18: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """The environment of commands, in which a pool `loading` of one worker runs."""
    directory = tmp_path_factory.mktemp("loading")
    (directory / "raypg.toml").write_text("[pools.loading]\nmax_connections = 3\n")
    environment = {**command_cluster.environment(), **variables_of(pg18)}
    assert run(RAYPG, "up", environment=environment, cwd=directory).returncode == 0
    yield environment
    run(RAYPG, "down", "loading", environment=environment)


async def killed(
    command: tuple[str, ...], how: dict[str, Any], pg: EmbeddedServer, table: str, ids: tuple[int, int], shown: int
) -> None:
    """Run a load until it has both its batches that hold *ids* under way, and kill it then. Somebody else is about to
    insert these rows, so that they wait for him. *shown*: a terminal, whose bar must have shown some rows; 0 for none.
    """
    in_the_way, direct = await asyncpg.connect(**pg.parameters), await asyncpg.connect(**pg.parameters)
    waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and strpos(query, $1) > 0"
    text = ""
    try:
        await in_the_way.execute("begin")
        await in_the_way.execute(f"insert into {table} (id) select unnest($1::int[])", list(ids))
        first = subprocess.Popen(command, **how)  # noqa: ASYNC220

        async def half_way() -> bool:
            nonlocal text
            assert first.poll() is None, "it was over before it could be killed"
            while shown and select.select([shown], [], [], 0)[0]:
                text += os.read(shown, 65536).decode()
            bar = re.search(r"[1-9]\d*/\?", text) is not None
            return await direct.fetchval(waiting, table.partition(".")[2]) == 2 and (bar or not shown)

        try:
            await eventually(half_way, timeout=60)
        finally:
            first.send_signal(signal.SIGKILL)
            first.wait()
    finally:
        in_the_way.terminate()
        direct.terminate()


async def test_killed_and_started_again_it_goes_on(
    loading: dict[str, str], pg18: EmbeddedServer, direct: asyncpg.Connection, tmp_path: Path
) -> None:
    rows, name = 4_000, unique_name("load").replace("-", "_")
    (tmp_path / "rows.csv").write_text("id,label\n" + "".join(f"{n},row number {n}\n" for n in range(rows)))
    await direct.execute(f"create table public.{name} (id int primary key, label text)")
    into = ("--into", f"public.{name}", "--pool", "loading", "--mode", "upsert", "--key", "id")
    command = (RAYPG, "load", "*.csv", *into, "--batch-rows", "100")
    terminal, end = pty.openpty()
    try:
        how = {"env": {**loading, "TERM": "xterm"}, "cwd": tmp_path, "stdout": end}
        await killed(command, how, pg18, f"public.{name}", (1000, 1100), terminal)
        done = run(*command, environment=loading, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert re.search(r"csv: 2,[789]00 rows in .*, 1,[123]00 loaded before\n", done.stdout), done.stdout
        sums = f"select count(*), sum(id), count(label) from public.{name}"
        assert await direct.fetchrow(sums) == (rows, rows * (rows - 1) // 2, rows)
        await prunes(loading, tmp_path, direct, f"{(tmp_path / 'rows.csv').resolve()}:%")
        bad = run(RAYPG, "load", "no.csv", "--into", "t", environment=loading, cwd=tmp_path)
        assert (bad.returncode, bad.stderr) == (
            1,
            "raypg: no.csv: there is no such file (did you mean 'rows.csv'?)\n",
        )
    finally:
        os.close(terminal)
        os.close(end)
        await direct.execute(f"drop table public.{name}")


async def test_killed_in_one_of_many_files_it_goes_on(
    loading: dict[str, str], pg18: EmbeddedServer, direct: asyncpg.Connection, tmp_path: Path
) -> None:
    """TSV and Parquet, by a pattern; appended, so that a row that were written twice would be refused."""
    name = unique_name("load").replace("-", "_")
    (tmp_path / "a.tsv").write_text("label\tid\n" + "".join(f'"x, {n}"\t{n}\n' for n in range(1_000)))
    for file, first in (("b.parquet", 1_000), ("c.parquet", 2_000)):
        data = pa.table({"id": range(first, first + 1_000), "label": [f"x, {n}" for n in range(first, first + 1_000)]})
        pyarrow.parquet.write_table(data, tmp_path / file, row_group_size=150)
    await direct.execute(f"create table public.{name} (id int primary key, label text)")
    command = (RAYPG, "load", "*.*", "--into", f"public.{name}", "--pool", "loading", "--batch-rows", "100")
    try:
        how = {"env": loading, "cwd": tmp_path, "stdout": subprocess.DEVNULL}
        await killed(command, how, pg18, f"public.{name}", (2_333, 2_444), 0)
        done = run(*command, environment=loading, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        told = done.stdout.splitlines()
        assert [re.sub(r"[\d.]+ s,", "…", line) for line in told[:2]] == [
            "a.tsv: 0 rows in … 1,000 loaded before",
            "b.parquet: 0 rows in … 1,000 loaded before",
        ]
        assert re.match(r"c\.parquet: [567]00 rows in .*, [345]00 loaded before$", told[2]), told
        assert await direct.fetchval(f"select count(*) from public.{name} where label = 'x, ' || id") == 3_000
    finally:
        await direct.execute(f"drop table public.{name}")


async def prunes(environment: dict[str, str], directory: Path, direct: asyncpg.Connection, batch: str) -> None:
    """`raypg ledger prune` forgets what is old enough, or was there before a batch, and nothing else."""
    known = "select count(*) from raypg.batches where pipeline = 'load' and batch_id like $1"
    assert await direct.fetchval(known, batch) == 40
    old = "update raypg.batches set committed_at = committed_at - interval '3 days' where batch_id like $1"
    await direct.execute(old, batch[:-1] + "%/1_")
    prune = (RAYPG, "ledger", "prune", "loading", "--pipeline", "load")
    done = run(*prune, "--older-than", "2d", environment=environment, cwd=directory)
    assert (done.returncode, done.stdout) == (0, "loading: 10 batches forgotten\n"), done.stderr
    assert await direct.fetchval(known, batch) == 30
    marks = "select batch_id, committed_at from raypg.batches where pipeline = 'load' and batch_id like $1 order by 2"
    batches = await direct.fetch(marks, batch)
    watermark, moment = batches[12]
    earlier = sum(at < moment for _, at in batches)
    others = "select count(*) from raypg.batches where pipeline = 'load' and committed_at < $1"
    forgotten = await direct.fetchval(others, moment)  # of other files too
    done = run(*prune, "--before", watermark, environment=environment, cwd=directory)
    assert (done.returncode, done.stdout) == (0, f"loading: {forgotten} batches forgotten\n"), done.stderr
    assert await direct.fetchval(known, batch) == 30 - earlier
    unknown = run(*prune, "--before", "no batch", environment=environment, cwd=directory)
    assert (unknown.returncode, unknown.stderr) == (1, "raypg: the ledger has no batch 'no batch' of pipeline 'load'\n")
    wrong = run(*prune, "--older-than", "2 fortnights", environment=environment, cwd=directory)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "give a number and one of s, m, h, d, w, for instance 30d" in wrong.stderr
