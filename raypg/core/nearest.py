"""Guess which known word a misspelt one was meant to be, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean", "nearest"]


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The word of ``known`` most like ``word``, or None when none is near. Ignores case, ``-`` and ``_``."""
    by_folded = {_fold(candidate): candidate for candidate in known}
    matches = difflib.get_close_matches(_fold(word), by_folded, n=1, cutoff=0.6)
    return by_folded[matches[0]] if matches else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A clause to append to an error: ``" (did you mean 'x'?)"``, or all known words when none is near."""
    words = sorted(known)
    guess = nearest(word, words)
    if guess is not None:
        return f" (did you mean {guess!r}?)"
    return f" (known: {', '.join(words)})" if words else ""


def _fold(word: str) -> str:
    return word.lower().replace("-", "_")
