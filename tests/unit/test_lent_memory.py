"""Memory that is lent to another process: what it holds, and that nothing else is taken for it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest

from raypg.lent_memory import LentMemory, Place, borrow, here

READ = """
import sys
from raypg.lent_memory import Place, borrow, here
place = Place(*map(int, sys.argv[1:]))
print(here())
print(bytes(borrow(place)[: place.size]).decode())
"""


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_another_process_reads_it() -> None:
    memory = LentMemory(1 << 20)
    memory.bytes[:5] = b"hello"
    place = memory.place(5)
    read = subprocess.run([sys.executable, "-c", READ, *map(str, place)], capture_output=True, text=True, check=True)
    assert read.stdout.splitlines() == [str(here()), "hello"]


def test_it_is_seen_as_it_changes_and_stays_when_its_owner_has_gone() -> None:
    memory = LentMemory(100_000)
    seen = borrow(memory.place(10))
    memory.bytes[:3] = b"one"
    assert bytes(seen[:3]) == b"one"
    with pytest.raises(TypeError):
        seen[:3] = b"two"
    del memory
    gc.collect()
    assert bytes(seen[:3]) == b"one"


def test_nothing_else_is_taken_for_it() -> None:
    memory = LentMemory(1000)
    place = memory.place(1000)
    with pytest.raises(OSError, match="is gone"):
        borrow(place._replace(inode=place.inode + 1))
    with pytest.raises(OSError, match="is gone"):
        borrow(place._replace(size=1001))
    with open(os.devnull) as other, pytest.raises(OSError, match="is gone"):
        borrow(place._replace(fd=other.fileno()))
    del memory
    with pytest.raises(OSError, match=r"No such file|is gone"):
        borrow(place)
    with pytest.raises(OSError, match="No such"):
        borrow(Place(2**22 + 1, 0, 0, 0))


def test_no_files_are_left_open() -> None:
    before = open_files()
    for _ in range(20):
        memory = LentMemory(1000)
        assert len(borrow(memory.place(1000))) == 1000
    del memory
    gc.collect()
    assert open_files() == before
