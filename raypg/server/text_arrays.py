"""Arrays whose elements asyncpg reads as text: decoded here, because asyncpg's own decoder is not safe.

asyncpg 0.32 skips an empty element of such an array (``'{a,"",b}'::tsvector[]``): those behind it move up, and the end
of the list stays a null pointer, at which the process dies when it looks there. One user's query would end everybody's
connections. It concerns every type without a binary codec: tsvector, tsquery, refcursor, types of extensions (citext,
ltree …), domains over them, and types with a codec by name. tests/contract pins the fault and the way around it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import asyncpg

from raypg.core import array_text

_BINARY: Final = 1  # asyncpg's ServerDataFormat

Codec = tuple[Callable[[Any], str], Callable[[str], Any]]
"""(encoder, decoder) of a type whose values travel as text."""


class SafeConnection(asyncpg.Connection):  # type: ignore[misc]
    """A connection that decodes arrays of texts itself. Costs nothing until the first statement that has one.

    asyncpg asks the server about a type when a statement first uses it; what it learns passes here.
    """

    __slots__ = ("_codecs", "_guarded", "_learned")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._codecs: dict[tuple[str, str], Codec] = {}  # by (schema, name)
        self._learned: dict[int, asyncpg.Record] = {}  # by OID, each behind those that it is made of
        self._guarded: dict[int, asyncpg.Record] = {}

    async def set_type_codec(
        self, typename: str, *, schema: str = "public", encoder: Any, decoder: Any, format: str = "text"
    ) -> None:
        """As asyncpg's."""
        await super().set_type_codec(typename, schema=schema, encoder=encoder, decoder=decoder, format=format)
        if format == "text":
            self._codecs[schema, typename] = (encoder, decoder)
        self._drop_local_type_cache()  # arrays of it too are learned anew

    async def _introspect_types(self, typeoids: Any, timeout: float | None) -> Any:
        types, statement = await super()._introspect_types(typeoids, timeout)
        settings = self._protocol.get_settings()
        for info in types:  # what a type is made of comes before it
            settings.register_data_types([info])
            self._learned[info["oid"]] = info
            if info["elemdelim"] and settings.get_data_codec(info["oid"], _BINARY) is None:
                self._guard(settings, info)
        return types, statement

    def _guard(self, settings: Any, info: asyncpg.Record) -> None:
        oid, schema, name, delimiter = info["oid"], info["ns"], info["name"], info["elemdelim"].decode()
        if oid in self._guarded:
            return
        encode, decode = self._codec_of(info["elemtype"])
        settings.add_python_codec(
            oid,
            f"{name.removeprefix('_')}[]",
            schema,
            [],
            "array",
            functools.partial(array_text.render, encode=encode, delimiter=delimiter),
            functools.partial(array_text.parse, decode=decode, delimiter=delimiter),
            "text",
        )
        self._guarded[oid] = info
        # That made asyncpg forget all types that it had learned; anonymous records need them still.
        settings.register_data_types(self._learned.values())

    def _codec_of(self, element: int) -> Codec | tuple[None, None]:
        """The codec of an element's type, or of what it is a domain over; (None, None) if it is plain text."""
        info = self._learned.get(element)
        while info is not None:
            found = self._codecs.get((info["ns"], info["name"]))
            if found is not None:
                return found
            info = self._learned.get(info["basetype"]) if info["basetype"] else None
        return None, None

    def _drop_local_type_cache(self) -> None:
        settings = self._protocol.get_settings()
        for oid, info in self._guarded.items():
            settings.remove_python_codec(oid, info["name"], info["ns"])
        self._guarded.clear()
        self._learned.clear()
        super()._drop_local_type_cache()
