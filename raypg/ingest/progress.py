"""A bar on the terminal that shows how far a write has come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from raypg.ingest.inputs import Piece
from raypg.ingest.writing import Writer, WriteResult

DRAW_EVERY = 0.1
"""Seconds between two pictures."""


async def with_bar(writer: Writer, pieces: AsyncGenerator[Piece, None], total: int | None, name: str) -> WriteResult:
    """Run *writer* under a bar of *total* rows; raises as :meth:`Writer.run`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as screen:
        bar = screen.add_task(name, total=total)
        work = asyncio.ensure_future(writer.run(pieces))
        try:
            while not work.done():
                await asyncio.wait((work,), timeout=DRAW_EVERY)
                done = writer.result
                screen.update(bar, completed=done.rows + done.duplicates + done.quarantined + done.known_rows)
        finally:
            if not work.done():
                work.cancel()
        return await work
