"""Where bytes lie: in memory that processes share, or of a process's own; and how much of it a process takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa


def is_shared(data: Any) -> bool:
    """Whether *data* (anything that lets its bytes be looked at) lies in a mapping that is shared between processes."""
    address = pa.py_buffer(data).address
    for line in Path("/proc/self/maps").read_text().splitlines():
        extent, flags, *_ = line.split()
        begin, end = (int(edge, 16) for edge in extent.split("-"))
        if begin <= address < end:
            return flags.endswith("s")
    raise AssertionError("it lies nowhere")


def are_shared(table: pa.Table | pa.RecordBatch) -> bool:
    """Whether all values of *table* do."""
    arrays = [array for column in table.columns for array in (column.chunks if hasattr(column, "chunks") else [column])]
    return all(is_shared(buffer) for array in arrays for buffer in array.buffers() if buffer is not None)


def memory_of(pid: int) -> int:
    """Bytes of a process that are in memory: its own, and what it lends to others or has borrowed, which counts for
    both. What it maps of the object store is none of its own."""
    found = 0
    lends = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            lends = "memfd:raypg" in line  # the head of a mapping
        elif words[0] == "Anonymous:" or (words[0] == "Rss:" and lends):
            found += int(words[1]) * 1024
    return found
