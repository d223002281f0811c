"""Where the command ``raypg`` begins, and ``python -m raypg``."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

__all__ = ["ctrl_c_ends", "main"]


@contextlib.contextmanager
def ctrl_c_ends() -> Iterator[None]:
    """Let Ctrl-C end this process at once, while it imports what it needs.

    As a KeyboardInterrupt it may be lost then: Python ignores what is raised in the callbacks of its import locks
    ("Exception ignored in: <function _get_module_lock …").
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # nohup, say
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


def main() -> None:
    """Run the command line."""
    with ctrl_c_ends():
        from raypg.cli import main as run
    run()


if __name__ == "__main__":
    main()
