"""Where bytes lie: in Ray's object store, or in memory of the process's own."""

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
