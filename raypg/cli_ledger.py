"""``raypg ledger``: the ledger of written batches."""

from __future__ import annotations

import asyncio

from rich.console import Console

from raypg import ledger
from raypg.cli_pools import connect
from raypg.pool import get_pool


def prune(name: str, pipeline: str | None, older_than: str | None, before: str | None, address: str) -> None:
    """Forget old batches, and say how many."""
    age = None if older_than is None else ledger.parse_age(older_than)
    connect(address)
    forgotten = asyncio.run(ledger.prune(get_pool(name), pipeline=pipeline, older_than=age, before=before))
    Console().print(f"{name}: {forgotten} batches forgotten", highlight=False)
