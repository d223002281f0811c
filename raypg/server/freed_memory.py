"""Memory that a process keeps for itself when it has freed it."""

from __future__ import annotations

import ctypes

BYTES = 32 * 1024 * 1024
"""The most that glibc takes for its threshold, on 64 bits."""

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep() -> bool:
    """Keep up to 32 MB of what is freed, instead of giving it back to the system at once.

    glibc gives it back by default when 128 kB of it lie together, up to twice the size of the largest object so far. A
    batch with a batch id has its bytes in memory until they are sent, some megabytes: for each batch the system had to
    clear pages anew, a fifth of a worker's time (mallopt(3): M_MMAP_THRESHOLD, M_TRIM_THRESHOLD).

    Returns:
        Whether that could be done: with another C library it cannot.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, BYTES) and mallopt(_M_TRIM_THRESHOLD, BYTES))
