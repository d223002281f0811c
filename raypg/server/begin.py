"""The text that begins a transaction with settings of its own."""

from __future__ import annotations

from raypg import naming
from raypg.core.sql_text import quoted


def begin_with(settings: tuple[tuple[str, str], ...], application_name: str) -> str:
    """Text that begins a transaction with these settings in force until its end."""
    calls = []
    for name, value in settings:
        if name == "application_name":
            value = naming.application_name(application_name, value)  # ours stays in front: we count and reap by it
        calls.append(f"pg_catalog.set_config({quoted(name)}, {quoted(value)}, true)")
    return f"BEGIN; SELECT {', '.join(calls)}"
