"""Opening files that somebody else may have made: of a pipe or a device nothing is read.

Whoever opens a pipe waits until somebody writes into it, for good if need be; a device may never end.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


def plain_descriptor(path: Path | str, *, follow: bool = True) -> int:
    """Open a plain file for reading.

    Args:
        path: of it.
        follow: also what a symbolic link leads to.

    Returns:
        The descriptor.

    Raises:
        OSError: it cannot be opened, or is no plain file.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is no plain file", str(path))
        return descriptor
    except BaseException:
        os.close(descriptor)
        raise


def open_plain(path: Path | str, *, follow: bool = True) -> BufferedReader:
    """The same, as a file of bytes."""
    return os.fdopen(plain_descriptor(path, follow=follow), "rb")


def read_plain(path: Path | str, most: int) -> bytes:
    """The content of a plain file.

    Args:
        path: of it.
        most: bytes that it may have; known to have no more before memory is taken.

    Raises:
        OSError: it cannot be read, or is no plain file.
        ValueError: it is larger.
    """
    # A tile is many files, and a file object costs as much as all of these together.
    descriptor = plain_descriptor(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > most:
            raise ValueError(f"it has {size} bytes where {most} are the most")
        content = os.read(descriptor, size)
    finally:
        os.close(descriptor)
    if len(content) == size:
        return content
    with open_plain(path) as file:  # the system reads at most 2 GiB at once
        return file.read(size)
