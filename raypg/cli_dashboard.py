"""``raypg dashboard`` and ``raypg token``."""

from __future__ import annotations

import asyncio

from rich.console import Console

from raypg import access_token, monitoring
from raypg.cli_pools import connect, quiet_serve


def start(host: str, port: int, address: str) -> None:
    """Start the dashboard on this node, and say where it is."""
    connect(address)
    quiet_serve()
    answer = asyncio.run(monitoring.start(monitoring.COMMAND, host, port))
    word = "started" if answer["status"] == "started" else "runs already"
    Console().print(f"dashboard: {answer['dashboard_url']} ({word})", highlight=False)


def stop(address: str) -> None:
    """End all dashboards."""
    connect(address)
    quiet_serve()
    ended = asyncio.run(monitoring.stop_all())
    for url in ended:
        Console().print(f"dashboard: {url}: ended", highlight=False)
    if not ended:
        Console().print("no dashboard runs in this Ray cluster", highlight=False)


def token(address: str) -> None:
    """Print the token, and nothing else."""
    connect(address)
    print(access_token.token())
