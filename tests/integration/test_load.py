"""`raypg load`: files into tables, each row once, also when it is killed half way."""

from __future__ import annotations

import datetime
import decimal
import os
import pty
import re
import select
import signal
import subprocess
from pathlib import Path

import asyncpg
import pyarrow as pa
import pyarrow.parquet
import pytest
from commands import RAYPG, run, variables_of
from pools import unique_name
from waiting import eventually

from raypg import ConfigError, WorkflowConnectionPool
from raypg.cli_load import batch_id, batches, found, load_files
from raypg.demo_cluster import LocalCluster
from raypg.embedded import EmbeddedServer

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
    with pytest.raises(asyncpg.CheckViolationError):
        await load(pool, [tmp_path / "rows.parquet"], table, batch_rows=400)
    told = await load(pool, [tmp_path / "rows.parquet"], table, batch_rows=400, on_bad_rows="quarantine")
    assert "1 in raypg.quarantine" in told
    assert await direct.fetchval(f"select count(*) from {table}") == 999


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
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(ConfigError, match=r"bad\.parquet"):
        list(batches(tmp_path / "bad.parquet", pa.schema([]), 10))
    before = batch_id(tmp_path / "b.csv")
    (tmp_path / "b.csv").write_text("id\n2\n3\n")
    assert batch_id(tmp_path / "b.csv") != before


async def test_killed_and_started_again_it_goes_on(
    command_cluster: LocalCluster, pg18: EmbeddedServer, direct: asyncpg.Connection, tmp_path: Path
) -> None:
    rows, name = 400_000, unique_name("load").replace("-", "_")
    (tmp_path / "rows.csv").write_text("id,label\n" + "".join(f"{n},row number {n}\n" for n in range(rows)))
    (tmp_path / "raypg.toml").write_text("[pools.loading]\nmax_connections = 3\n")
    environment = {**command_cluster.environment(), **variables_of(pg18)}
    await direct.execute(f"create table public.{name} (id int primary key, label text)")
    into = ("--into", f"public.{name}", "--pool", "loading", "--mode", "upsert", "--key", "id")
    command = (RAYPG, "load", "*.csv", *into, "--batch-rows", "10000")
    count = f"select count(*) from public.{name}"
    terminal, end = pty.openpty()
    try:
        assert run(RAYPG, "up", environment=environment, cwd=tmp_path).returncode == 0
        first = subprocess.Popen(  # noqa: ASYNC220
            command, env={**environment, "TERM": "xterm"}, cwd=tmp_path, stdout=end
        )
        shown = ""

        async def some() -> bool:
            nonlocal shown
            assert first.poll() is None, "it was over before it could be killed"
            while select.select([terminal], [], [], 0)[0]:
                shown += os.read(terminal, 65536).decode()
            return bool(await direct.fetchval(count)) and re.search(r"[1-9]\d*/\?", shown) is not None

        await eventually(some, timeout=60)  # rows are there, and the bar shows some
        first.send_signal(signal.SIGKILL)
        first.wait()
        done = run(*command, environment=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "loaded before" in done.stdout
        assert await direct.fetchrow(f"{count[:16]}, sum(id) from public.{name}") == (rows, rows * (rows - 1) // 2)
        await prunes(environment, tmp_path, direct, f"{(tmp_path / 'rows.csv').resolve()}:%")
        bad = run(RAYPG, "load", "no.csv", "--into", "t", environment=environment, cwd=tmp_path)
        assert (bad.returncode, bad.stderr) == (1, "raypg: no.csv: there is no such file\n")
    finally:
        os.close(terminal)
        os.close(end)
        run(RAYPG, "down", "loading", environment=environment)
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
