"""How this package calls actors: on behalf of the process, never of the task of Ray that happens to run.

``ray.cancel`` of a task cancels all calls that the task has sent, too, and in an async actor what it sends is told by a
context variable, which goes with callbacks and tasks of asyncio. One message carries the statements of many callers, so
it would be cancelled for all of them when one is. (Ray 2.60: a call from an empty context is nobody's child.)
"""

from __future__ import annotations

import contextvars
from typing import Any

from raypg import background


def send(method: Any, *arguments: Any) -> Any:
    """Call *method* of an actor's handle, as nobody's child; what ``method.remote`` returns."""
    return contextvars.Context().run(method.remote, *arguments)


def tell(method: Any, *arguments: Any) -> None:
    """Call *method* of an actor's handle, though the task that runs has been cancelled. Later; nothing comes back.

    In the main thread of a plain task every call is the task's child, in whatever context, so another thread calls.
    """
    background.loop().call_soon_threadsafe(send, method, *arguments)
