"""What the page consists of: our own files, and the library of charts out of its Python package."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import importlib.util
import mimetypes
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

__all__ = ["PLOTLY", "STATIC", "Assets"]

STATIC = Path(__file__).parent / "static"

PLOTLY = "plotly.min.js"

_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class _Asset:
    content: bytes
    compressed: bytes
    kind: str
    tag: str
    caching: str


class Assets:
    """Files by name. Each is read and compressed when it is first asked for, and again when it has changed."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], _Asset] = {}

    async def respond(self, name: str, request: Request) -> Response | None:
        """The file *name*, or that it is what the browser has already; ``None`` if there is none."""
        file = plotly() if name == PLOTLY else STATIC / name
        # Nothing but what lies there: no way up, no links elsewhere, no hidden files.
        if file is None or (name != PLOTLY and not _is_ours(file)):
            return None
        key = name, file.stat().st_mtime_ns
        asset = self._known.get(key)
        if asset is None:
            asset = await asyncio.to_thread(_read, file, name == PLOTLY)
            self._known[key] = asset
        headers = {"ETag": asset.tag, "Cache-Control": asset.caching, "Vary": "Accept-Encoding"}
        if asset.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(asset.compressed, media_type=asset.kind, headers={**headers, "Content-Encoding": "gzip"})
        return Response(asset.content, media_type=asset.kind, headers=headers)


def plotly() -> Path | None:
    """plotly.js, as the package of that name brings it; without importing that, which takes a while."""
    found = importlib.util.find_spec("plotly")
    if found is None or found.origin is None:
        return None
    file = Path(found.origin).parent / "package_data" / PLOTLY
    return file if file.is_file() else None


def _is_ours(file: Path) -> bool:
    try:
        real = file.resolve()
        return real.is_relative_to(STATIC.resolve()) and real.is_file() and not real.name.startswith(".")
    except (OSError, ValueError):  # a name that can be none of a file
        return False


def _read(file: Path, of_a_package: bool) -> _Asset:
    content = file.read_bytes()
    kind = _TYPES.get(file.suffix) or mimetypes.guess_type(file.name)[0] or "application/octet-stream"
    return _Asset(
        content,
        gzip.compress(content, 6, mtime=0),
        kind,
        f'"{hashlib.sha256(content).hexdigest()[:32]}"',
        # Ours change with raypg under the same name.
        "public, max-age=86400" if of_a_package else "no-cache",
    )
