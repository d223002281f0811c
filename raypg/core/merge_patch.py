"""JSON merge patches (RFC 7386): what has changed between two states, and how to get from the one to the other.

In a patch, ``null`` deletes a key. So a key whose value is ``null`` and a key that is not there mean the same in these
states.
"""

from __future__ import annotations

from typing import Any

__all__ = ["apply", "difference"]


def difference(old: Any, new: Any) -> dict[str, Any]:
    """The patch that turns the object *old* into the object *new*; empty if nothing has changed. Lists are sent whole.

    Neither may be changed afterwards: parts of *new* are parts of the patch.
    """
    patch: dict[str, Any] = {}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            if changed := difference(before, value):
                patch[key] = changed
        elif type(value) is not type(before) or value != before:
            patch[key] = value
    for key, before in old.items():
        if key not in new and before is not None:
            patch[key] = None
    return patch


def apply(old: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """*old* with *patch* applied. *old* itself stays as it is."""
    result = dict(old)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            before = result.get(key)
            result[key] = apply(before if isinstance(before, dict) else {}, value)
        else:
            result[key] = value
    return result
