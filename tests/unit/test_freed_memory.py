"""Memory that is used again is not cleared by the system each time."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

ROUNDS = """
import resource
from raypg.server import freed_memory

def faults(work):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def batches():
    for _ in range(10):
        kept = [b"x" * 500_000 for _ in range(8)]
        del kept

batches()
without = faults(batches)
assert freed_memory.keep()
batches()
print(without, faults(batches))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_is_freed_is_kept_for_the_next_batch() -> None:
    done = subprocess.run([sys.executable, "-c", ROUNDS], capture_output=True, text=True, check=True)
    without, kept = map(int, done.stdout.split())
    print(f"page faults of 10 batches: {without}, with what was freed kept {kept}")
    assert kept < without / 10
