"""Every example is run, as its first lines say; and what README.md shows runs too."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import asyncpg
import pytest
from commands import RAY, RAYPG, run

from raypg.address import free_port
from raypg.demo_cluster import LocalCluster
from raypg.embedded import EmbeddedServer

ROOT = Path(__file__).parents[2]


def submit(cluster: LocalCluster, example: str, *arguments: str) -> str:
    """The output of an example, submitted as a Ray job."""
    command = (RAY, "job", "submit", "--", sys.executable, str(ROOT / "examples" / example), *arguments)
    done = run(*command, environment=cluster.environment(), timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


async def test_load_from_ray_job(command_cluster: LocalCluster, direct: asyncpg.Connection) -> None:
    try:
        assert "20000 rows of 8 sensors are there, 0 were refused" in submit(command_cluster, "load_from_ray_job.py")
        row = await direct.fetchrow("select count(*) as rows, sum(value) as total from public.readings")
        assert (row["rows"], row["total"]) == (20_000, 8 * sum(number * 0.5 for number in range(2_500)))
    finally:
        await direct.execute("drop table if exists public.readings")


async def test_share_between_jobs(command_cluster: LocalCluster, direct: asyncpg.Connection) -> None:
    try:
        assert "started the pool" in submit(command_cluster, "share_between_jobs.py")
        assert "found the pool that another job started" in submit(command_cluster, "share_between_jobs.py")
        visits = await direct.fetch("select job, backend from public.visits")
        # Two jobs, one connection: the cap of that pool is 1.
        assert len({visit["job"] for visit in visits}) == 2
        assert len({visit["backend"] for visit in visits}) == 1
        done = run(RAYPG, "down", "shared", environment=command_cluster.environment())
        assert done.stdout == "shared: ended\n"
    finally:
        await direct.execute("drop table if exists public.visits")


def test_query_over_http(command_cluster: LocalCluster) -> None:
    port = free_port("127.0.0.1", 0, "try again")
    said = submit(command_cluster, "query_over_http.py", str(port))
    assert "200 [{'word': 'hello', 'price': '12.50'}] by the primary" in said
    assert "422 division by zero" in said
    assert "403 statements of kind DDL are not run here" in said


async def test_ray_data_roundtrip(command_cluster: LocalCluster, direct: asyncpg.Connection) -> None:
    try:
        shown = submit(command_cluster, "ray_data_roundtrip.py")
        assert "50000 of 100000 temperatures are in °C, the lowest is 23.9" in shown
        row = await direct.fetchrow("select count(*) as rows, count(distinct id) as ids from public.converted")
        assert (row["rows"], row["ids"]) == (50_000, 50_000)
    finally:
        await direct.execute("drop table if exists public.temperatures, public.converted")


def test_each_example_is_named_here() -> None:
    tests = Path(__file__).read_text()
    assert [file.name for file in (ROOT / "examples").glob("*.py") if f'"{file.name}"' not in tests] == []


def test_the_quick_start_of_the_readme(command_cluster: LocalCluster, tmp_path: Path) -> None:
    """Copied out of README.md, and nothing else is needed."""
    (code,) = re.findall(r"<!-- quick start -->\n+```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(code.splitlines()) <= 20
    file = tmp_path / "quick_start.py"
    file.write_text(code)
    done = run(sys.executable, str(file), environment=command_cluster.environment(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "<Row name='Grace' born=1906> 1000 of 1000 succeeded"


async def test_the_raypg_toml_of_the_readme(
    command_cluster: LocalCluster, pg18: EmbeddedServer, direct: asyncpg.Connection, tmp_path: Path
) -> None:
    """Every key in it is right, and it starts the pool it says: but for the host, which is ours."""
    (text,) = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "raypg.toml").write_text(text.replace("db.internal", "127.0.0.1").replace("5432", str(pg18.port)))
    await direct.execute(f"create role app login password '{pg18.password}'")
    await direct.execute("create database main owner app")
    try:
        up = run(RAYPG, "up", environment=command_cluster.environment(), cwd=tmp_path)
        assert (up.stdout, up.stderr) == ("main_pool: started, at most 20 connections\n", "")
        down = run(RAYPG, "down", "main_pool", environment=command_cluster.environment())
        assert down.stdout == "main_pool: ended\n"
    finally:
        await direct.execute("drop database main with (force)")
        await direct.execute("drop role app")


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_the_commands_of_the_readme_exist() -> None:
    shown = run("make", "help", environment={"PATH": "/usr/bin:/bin"}, cwd=ROOT).stdout
    for target in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.M):
        assert re.search(rf"make {target}\b", shown)
