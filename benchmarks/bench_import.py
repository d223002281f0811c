"""What `import raypg` costs a process that has Ray already: every task's worker process pays it once."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys

import uvloop
from measure import compare, report

ADDED = "raypg, after ray"
LIMIT = 0.3
"""Seconds that it may add."""


def seconds(before: str, imported: str) -> float:
    """Seconds that a fresh process takes to import *imported*, after *before*."""
    code = (
        f"{before}; import time; started = time.perf_counter(); import {imported}; print(time.perf_counter() - started)"
    )
    # -P: what lies in the current directory must not be found instead.
    command = [sys.executable, "-P", "-c", code]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


async def main() -> None:
    async def ray_alone() -> float:
        return await asyncio.to_thread(seconds, "pass", "ray")

    async def raypg_after_ray() -> float:
        return await asyncio.to_thread(seconds, "import ray", "raypg")

    async def both() -> float:
        return await asyncio.to_thread(seconds, "pass", "ray, raypg")

    figures = await compare({"ray": ray_alone, ADDED: raypg_after_ray, "both": both})
    added = statistics.median(figures[ADDED])
    difference = statistics.median(b - a for a, b in zip(figures["ray"], figures["both"], strict=True))
    report(
        "Importing raypg",
        "s",
        figures,
        [f"raypg adds {added:.3f} s (limit {LIMIT} s); as the difference of both and ray {difference:.3f} s"],
    )


if __name__ == "__main__":
    uvloop.run(main())
