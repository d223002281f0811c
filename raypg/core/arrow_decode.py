"""Values of PostgreSQL's binary format as Arrow arrays: whole columns at a time, never a Python object for a value.

Source: the ``*_send`` functions of PostgreSQL, which write in network byte order; Arrow's columnar format.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

__all__ = [
    "EPOCH_DAYS",
    "EPOCH_MICROSECONDS",
    "Decoder",
    "NotInArrow",
    "Numbers",
    "Records",
    "Slices",
    "Values",
    "blobs",
    "booleans",
    "fixed",
    "gather",
    "intervals",
    "lists_of",
    "numbers_in",
    "overlapping",
    "since_1970",
    "uuids",
]

Numbers: TypeAlias = Any
"""A numpy array of one dimension, whose types mypy cannot follow through byte orders."""

EPOCH_DAYS = 10_957
"""From 1970-01-01, where Arrow counts from, to 2000-01-01, where PostgreSQL does."""

EPOCH_MICROSECONDS = EPOCH_DAYS * 86_400_000_000

FEW = 32
"""Arrays so few that they are walked one by one: numpy costs some microseconds for each step of all together."""

_LENGTH = Struct(">i")
_HEX = np.frombuffer(b"".join(b"%02x" % byte for byte in range(256)), np.uint8).reshape(256, 2)
_DASHES = (8, 13, 18, 23)
_DIGITS = tuple(place for place in range(36) if place not in _DASHES)


class NotInArrow(ValueError):
    """A value has no equal in the Arrow type of its column. ``args``: (what it is,)."""


class Values:
    """One column of some rows.

    Attributes:
        missing: which of them are NULL; ``None`` if none is.
    """

    __slots__ = ("missing",)

    def __init__(self, missing: Numbers | None) -> None:
        self.missing = missing

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def validity(self) -> pa.Buffer | None:
        """Arrow's bitmap of what is there; ``None`` if all is."""
        return None if self.missing is None else pa.py_buffer(np.packbits(~self.missing, bitorder="little"))

    def numbers(self, kind: str, offset: int = 0) -> Numbers:
        """The numbers of type *kind* at *offset* in each value; anything where there is none."""
        raise NotImplementedError

    def array(self, kind: pa.DataType, *buffers: Any) -> pa.Array:
        """An Arrow array of *kind* over these rows, from its buffers behind the validity."""
        return pa.Array.from_buffers(kind, len(self), [self.validity, *map(pa.py_buffer, buffers)])


class Slices(Values):
    """Values of any length, wherever they lie.

    Args:
        data: the bytes.
        starts: index of the first byte of each value.
        lengths: bytes of each value, -1 for NULL.
    """

    __slots__ = ("data", "lengths", "starts")

    def __init__(self, data: memoryview, starts: Numbers, lengths: Numbers) -> None:
        missing = lengths < 0
        super().__init__(missing if missing.any() else None)
        self.data = data
        self.starts = starts
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def ends(self) -> Numbers:
        """Index behind the last byte of each value."""
        return self.starts + (self.lengths if self.missing is None else np.maximum(self.lengths, 0))

    def numbers(self, kind: str, offset: int = 0) -> Numbers:
        """See :meth:`Values.numbers`."""
        places = self.starts + offset if offset else self.starts
        if self.missing is not None:
            places = np.minimum(places, len(self.data) - np.dtype(kind).itemsize)
        return gather(self.data, kind, places)


class Records(Values):
    """Values of a fixed width, at the same place in each of some records.

    Args:
        records: an array of type ``V``.
        place: index of the first byte of the value in a record.
        missing: which are NULL; ``None`` if none is.
    """

    __slots__ = ("_place", "_records")

    def __init__(self, records: Numbers, place: int, missing: Numbers | None) -> None:
        super().__init__(missing)
        self._records = records
        self._place = place

    def __len__(self) -> int:
        return len(self._records)

    def numbers(self, kind: str, offset: int = 0) -> Numbers:
        """See :meth:`Values.numbers`."""
        return numbers_in(self._records, kind, self._place + offset)


Decoder: TypeAlias = Callable[[Values, pa.DataType], pa.Array]


def gather(data: memoryview, kind: str, places: Numbers) -> Numbers:
    """The big-endian numbers of type *kind* that stand at *places* in *data*, however they are aligned.

    Raises:
        IndexError: some stand outside of it.
    """
    native = np.dtype(kind)
    return overlapping(data, f"V{native.itemsize}")[places].view(native.newbyteorder(">")).astype(native)


def overlapping(data: memoryview, kind: str) -> Numbers:
    """What begins at each byte of *data*, as far as there is enough for the type *kind*; nothing is copied."""
    return np.ndarray(max(len(data) - np.dtype(kind).itemsize + 1, 0), kind, data, 0, (1,))


def numbers_in(records: Numbers, kind: str, place: int) -> Numbers:
    """The big-endian numbers of type *kind* at *place* in each of *records*, an array of type ``V``."""
    native = np.dtype(kind)
    there: Numbers = np.ndarray(len(records), native.newbyteorder(">"), records, place, records.strides)
    return there.astype(native)


def fixed(kind: str, change: Callable[[Numbers, Values], Numbers] | None = None) -> Decoder:
    """Decodes values of a fixed width: numbers of type *kind*, which *change* makes Arrow's."""

    def decode(column: Values, arrow: pa.DataType) -> pa.Array:
        values = column.numbers(kind)
        return column.array(arrow, values if change is None else change(values, column))

    return decode


def since_1970(shift: int) -> Callable[[Numbers, Values], Numbers]:
    """Moves dates (days) or timestamps (microseconds) from PostgreSQL's epoch to Arrow's.

    Raises:
        NotInArrow: ``infinity``, or a time of the last years that PostgreSQL knows.
    """

    def change(values: Numbers, column: Values) -> Numbers:
        limits = np.iinfo(values.dtype)
        beyond = (values > limits.max - shift) | (values == limits.min)
        if column.missing is not None:
            beyond &= ~column.missing
        if beyond.any():
            ends = values[beyond]
            raise NotInArrow("infinity" if ends[0] in (limits.max, limits.min) else "a time after 294246")
        return values + values.dtype.type(shift)

    return change


def booleans(column: Values, arrow: pa.DataType) -> pa.Array:
    """bool: a byte each, a bit each in Arrow."""
    return column.array(arrow, np.packbits(column.numbers("u1") != 0, bitorder="little"))


def intervals(column: Values, arrow: pa.DataType) -> pa.Array:
    """interval: microseconds, days and months, in Arrow months, days and nanoseconds.

    Raises:
        NotInArrow: more than 292 years in microseconds, ``infinity`` too.
    """
    micros = column.numbers("i8")
    limit = np.iinfo(np.int64).max // 1000
    beyond = (micros > limit) | (micros < -limit)
    if column.missing is not None:
        beyond &= ~column.missing
    if beyond.any():
        raise NotInArrow("an interval of more than 292 years that is not in months and days")
    parts = np.empty(len(column), [("months", "i4"), ("days", "i4"), ("nanoseconds", "i8")])
    parts["months"], parts["days"], parts["nanoseconds"] = column.numbers("i4", 12), column.numbers("i4", 8), micros
    parts["nanoseconds"] *= 1000
    return column.array(arrow, parts)


def uuids(column: Values, arrow: pa.DataType) -> pa.Array:
    """uuid: 16 bytes, in Arrow its usual text."""
    digits = _HEX[np.stack([column.numbers("u1", place) for place in range(16)], axis=1)].reshape(-1, 32)
    written = np.full((len(column), 36), ord("-"), np.uint8)
    written[:, _DIGITS] = digits
    return column.array(arrow, np.arange(0, 36 * len(column) + 1, 36, dtype=np.int32), written)


def blobs(skip: int = 0) -> Decoder:
    """Decodes values of any length, without their first *skip* bytes (the version of a jsonb)."""

    def decode(slices: Values, arrow: pa.DataType) -> pa.Array:
        assert isinstance(slices, Slices), "values of any length"
        starts, ends = slices.starts, slices.ends
        if skip:
            starts = np.minimum(starts + skip, ends)
        # The whole of the data as values and what lies between them, all in turn; then every second one, copied by
        # Arrow into one piece: quicker than numpy can do it.
        edges = np.empty(2 * len(slices) + 1, np.int32)
        edges[:-1:2], edges[1::2] = starts, ends
        edges[-1] = edges[-2] if len(slices) else 0
        in_turn = pa.Array.from_buffers(
            pa.binary(), 2 * len(slices), [None, pa.py_buffer(edges), pa.py_buffer(slices.data)]
        )
        _, offsets, values = in_turn.take(pa.array(np.arange(0, 2 * len(slices), 2))).buffers()
        return pa.Array.from_buffers(arrow, len(slices), [slices.validity, offsets, values or pa.py_buffer(b"")])

    return decode


def lists_of(element: Decoder, width: int | None) -> Decoder:
    """Decodes arrays of one dimension.

    Args:
        element: decodes their elements.
        width: bytes of an element, if all have the same.

    Raises:
        NotInArrow: an array of more dimensions.
    """

    def decode(slices: Values, arrow: pa.DataType) -> pa.Array:
        assert isinstance(slices, Slices), "values of any length"
        dimensions = slices.numbers("i4")
        nulls = slices.numbers("i4", 4)
        if slices.missing is not None:
            dimensions[slices.missing] = 0
        if (dimensions > 1).any():
            raise NotInArrow(f"an array of {dimensions.max()} dimensions")
        filled = np.flatnonzero(dimensions == 1)
        counts = np.zeros(len(slices), np.int32)
        counts[filled] = gather(slices.data, "i4", slices.starts[filled] + 12)
        offsets = np.zeros(len(slices) + 1, np.int32)
        np.cumsum(counts, out=offsets[1:])
        first = slices.starts + 20
        if width is not None and not nulls[filled].any():
            within = np.arange(offsets[-1], dtype=np.int64) - np.repeat(offsets[:-1], counts)
            starts = np.repeat(first, counts) + within * (4 + width) + 4
            lengths = np.full(offsets[-1], width, np.int32)
        else:
            starts, lengths = _elements(slices.data, first, counts, offsets)
        values = element(Slices(slices.data, starts, lengths), arrow.value_type)
        return pa.Array.from_buffers(arrow, len(slices), [slices.validity, pa.py_buffer(offsets)], children=[values])

    return decode


def _elements(data: memoryview, first: Numbers, counts: Numbers, offsets: Numbers) -> tuple[Numbers, Numbers]:
    """Where the elements of arrays lie: the first of all arrays at once, then the second …, and the rest of the few
    longest ones one by one."""
    starts = np.zeros(offsets[-1], np.int64)
    lengths = np.zeros(offsets[-1], np.int32)
    places = first.astype(np.int64)
    done = 0
    active = np.flatnonzero(counts > 0)
    while len(active) >= FEW:
        sizes = gather(data, "i4", places[active])
        which = offsets[active] + done
        starts[which], lengths[which] = places[active] + 4, sizes
        places[active] += 4 + np.maximum(sizes, 0)
        done += 1
        active = active[counts[active] > done]
    for row in active.tolist():
        place = int(places[row])
        for which in range(int(offsets[row]) + done, int(offsets[row + 1])):
            (size,) = _LENGTH.unpack_from(data, place)
            starts[which], lengths[which] = place + 4, size
            place += 4 + max(size, 0)
    return starts, lengths
