"""What all errors of raypg are."""

from __future__ import annotations

__all__ = ["RaypgError"]


class RaypgError(Exception):
    """Base class of everything that raypg itself raises."""
