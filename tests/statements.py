"""The labelled statements of ``tests/corpus``, by which classification is measured."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

CORPUS = Path(__file__).parent / "corpus"


class Labelled(NamedTuple):
    """A statement, where it belongs, and what is run before it in the same transaction."""

    label: str
    sql: str
    before: str


def corpus() -> list[Labelled]:
    """All of them."""
    found = []
    for line in (CORPUS / "statements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            label, _, text = line.partition(" ")
            sql, _, before = text.strip().partition("   <after> ")
            found.append(Labelled(label, sql, before))
    return found


def schema() -> str:
    """The script that makes all that they name."""
    return (CORPUS / "schema.sql").read_text()
