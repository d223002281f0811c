"""Results as Arrow record batches for callers without an event loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from raypg import background, owner
from raypg.arrow_stream import ArrowStream

if TYPE_CHECKING:
    import pyarrow


class SyncStream:
    """What ``pool.sync.stream(…)`` returns: a plain iterator over record batches, decoded in the calling thread.

    Errors as :class:`raypg.arrow_stream.ArrowStream`.
    """

    def __init__(self, stream: ArrowStream) -> None:
        self._stream = stream

    def __repr__(self) -> str:
        return f"<Sync{repr(self._stream)[1:]}"

    @property
    def schema(self) -> pyarrow.Schema:
        """Names and types of the columns. Begins the stream, if that was not done yet."""
        with owner.named():
            background.run(self._stream.begin)
        return self._stream.schema

    def __iter__(self) -> Iterator[pyarrow.RecordBatch]:
        return self

    def __next__(self) -> pyarrow.RecordBatch:
        with owner.named():
            while (data := background.run(self._stream.next_piece)) is not None:
                try:
                    batch = self._stream.decode(data)
                except BaseException:
                    self.close()
                    raise
                if batch is not None:
                    return batch
        raise StopIteration

    def __enter__(self) -> SyncStream:
        with owner.named():
            background.run(self._stream.begin)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_all(self) -> pyarrow.Table:
        """All its rows as a table; it is at its end then."""
        import pyarrow

        with self:
            return pyarrow.Table.from_batches(list(self), schema=self.schema)

    def close(self) -> None:
        """End it, wherever it is. Twice does nothing."""
        background.run(self._stream.aclose)
