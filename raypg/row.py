"""Rows: what ``fetch`` returns. As asyncpg's ``Record``, but picklable."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["Row", "row_type"]


class Row(tuple):  # type: ignore[type-arg]
    """One row of a result: a tuple whose values are also found by column name.

    Behaves as :class:`asyncpg.Record`: ``row[0]``, ``row["id"]``, ``row["id":]`` is not supported, slices of
    positions are; ``len(row)`` counts columns; iteration yields values; ``"id" in row`` asks for a *column*;
    ``dict(row)`` works. If two columns have the same name, the name finds the last of them. Pickled, it costs little
    more than the values: the column names are stored once for all rows of a result.
    """

    __slots__ = ()
    _names: tuple[str, ...] = ()
    _index: dict[str, int] = {}  # noqa: RUF012 - replaced per shape, never changed

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            try:
                return tuple.__getitem__(self, self._index[key])
            except KeyError:
                raise KeyError(key) from None
        return tuple.__getitem__(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self._index

    def get(self, key: str, default: Any = None) -> Any:
        """Value of column *key*, or *default* if there is no such column."""
        position = self._index.get(key)
        return default if position is None else tuple.__getitem__(self, position)

    def keys(self) -> Iterator[str]:
        """The column names, in order."""
        return iter(self._names)

    def values(self) -> Iterator[Any]:
        """The values, in order."""
        return iter(self)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Pairs of column name and value, in order."""
        return zip(self._names, self, strict=True)

    def __repr__(self) -> str:
        return f"<Row {' '.join(f'{name}={value!r}' for name, value in self.items())}>" if self else "<Row>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._names, tuple(self))


_MOST_TYPES = 1024
_types: dict[tuple[str, ...], type[Row]] = {}


def row_type(names: tuple[str, ...]) -> type[Row]:
    """The :class:`Row` class for columns *names*; ``row_type(names)(values)`` makes a row.

    One class per shape keeps the names out of the rows: a row takes as much memory as its tuple.
    """
    found = _types.get(names)
    if found is None:
        if len(_types) >= _MOST_TYPES:
            # Generated column names could otherwise make classes without end; rows in use keep theirs alive.
            _types.clear()
        index = {name: position for position, name in enumerate(names)}
        found = _types[names] = type("Row", (Row,), {"__slots__": (), "_names": names, "_index": index})
    return found


def _rebuild(names: tuple[str, ...], values: tuple[Any, ...]) -> Row:
    return row_type(names)(values)
