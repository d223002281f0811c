"""Memory that one process fills and another one on the same machine reads, without a copy or a message of its size.

It has no name, so that nothing is left behind by whoever dies. The reader opens it by ``/proc/<pid>/fd`` of the process
that lends it, which the kernel allows within one container to the same user.

Source: memfd_create(2), proc(5).
"""

from __future__ import annotations

import functools
import mmap
import os
from typing import NamedTuple

__all__ = ["LentMemory", "Place", "borrow", "here"]


class Place(NamedTuple):
    """Where another process finds what was lent to it; travels in a message.

    Attributes:
        pid, fd: the process that lends, and its file descriptor.
        inode: of the memory, so that nothing else is taken for it.
        size: bytes that are filled.
    """

    pid: int
    fd: int
    inode: int
    size: int


@functools.cache
def here() -> tuple[str, ...] | None:
    """Names what must be the same for two processes to lend each other memory: the running machine, the container and
    the user; ``None`` where the system does not know how."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip(), os.readlink("/proc/self/ns/pid"), str(os.getuid())
    except OSError:
        return None


class LentMemory:
    """Memory that can be lent.

    Args:
        size: bytes.

    Raises:
        OSError: there is none.
    """

    def __init__(self, size: int) -> None:
        self._file = os.memfd_create("raypg", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._file, size)
            self.bytes = memoryview(mmap.mmap(self._file, size))
        except BaseException:
            os.close(self._file)
            self._file = -1
            raise
        self._inode = os.fstat(self._file).st_ino

    def __len__(self) -> int:
        return len(self.bytes)

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)

    def place(self, size: int) -> Place:
        """Where its first *size* bytes are."""
        return Place(os.getpid(), self._file, self._inode, size)


def borrow(place: Place) -> memoryview:
    """All of the memory at *place*, to be read. It stays, whatever becomes of the process that lends it; what it holds
    is that one's business.

    Raises:
        OSError: it cannot be opened from here, or is something else by now.
    """
    file = os.open(f"/proc/{place.pid}/fd/{place.fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.fstat(file)
        if found.st_ino != place.inode or found.st_size < place.size:
            raise OSError("the memory that was lent is gone")
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        return memoryview(mmap.mmap(file, found.st_size, flags, mmap.PROT_READ))
    finally:
        os.close(file)
