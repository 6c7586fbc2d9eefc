"""How fast a folder's disk is: bounded in bytes and seconds, around the page cache, without a trace.

Whatever is written is either a file without a name or lies in a folder that is removed again.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from agrivision.monitor.appended import write_all
from agrivision.storage import write_atomically

_BLOCK = 16 << 20
_MOST_BYTES = 256 << 20
_SECONDS = 3.0
_SHARE = 10  # of what is free, no more than a tenth is written
_SMALL = 4096
_MOST_SMALL, _MOST_SAFE = 256, 20
_PIECE = 1 << 20
_MOST_OF_FILE = 8 << 20  # a scene may have gigabytes
_READERS = 4  # as many as stage a data set; a loader has two or more for each rank


@dataclass(frozen=True)
class Rate:
    """So much in so many seconds.

    Attributes:
        amount: bytes, or files.
        seconds: that it took.
    """

    amount: int
    seconds: float

    @property
    def per_second(self) -> float:
        """How much in one second."""
        return self.amount / max(self.seconds, 1e-9)


def write_rate(folder: Path, free: int, *, most: int = _MOST_BYTES, seconds: float = _SECONDS) -> Rate:
    """Write, with an fsync after each block, as a checkpoint does at its end.

    Args:
        folder: to write in.
        free: bytes that are free there.
        most: bytes to write, however much is free.
        seconds: after which it is enough.

    Raises:
        OSError: the disk refused.
    """
    most = min(most, free // _SHARE)
    # Not zeros: some file systems do not write what they can shorten.
    block = os.urandom(max(1, min(_BLOCK, most)))
    done = 0
    with _nameless(folder) as file:
        begin = time.perf_counter()
        while done + len(block) <= most and time.perf_counter() - begin < seconds:
            write_all(file, block)
            os.fsync(file)
            done += len(block)
        return Rate(done, time.perf_counter() - begin)


@contextmanager
def _nameless(folder: Path) -> Iterator[int]:
    """A file that is gone with this process, however that ends."""
    try:
        file = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as error:
        # Network file systems have no such files, and say so in different ways.
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            raise
        path = folder / f".agrivision-doctor.{os.getpid()}"
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        path.unlink()
    try:
        yield file
    finally:
        os.close(file)


def small_files(folder: Path, *, most: int = _MOST_SMALL, seconds: float = _SECONDS) -> Rate:
    """Create, look up, read and remove files of 4 KiB; the rate is that of all four together.

    Args:
        folder: one's own, which is removed afterwards.
        most: files.
        seconds: after which it is enough.

    Raises:
        OSError: the disk refused.
    """
    content = os.urandom(_SMALL)
    begin = time.perf_counter()
    paths: list[Path] = []
    for number in range(most):
        if time.perf_counter() - begin > seconds / 2:
            break
        paths.append(folder / f"small-{number}")
        paths[-1].write_bytes(content)
    for path in paths:
        path.stat()
        path.read_bytes()
        path.unlink()
    return Rate(len(paths), time.perf_counter() - begin)


def safe_write_seconds(folder: Path, *, most: int = _MOST_SAFE, seconds: float = _SECONDS) -> float:
    """Seconds for a small file that is fsynced and takes an older one's place, on the average.

    Args:
        folder: one's own, which is removed afterwards.
        most: files.
        seconds: after which it is enough.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    begin = time.perf_counter()
    done = 0
    while done < most and (not done or time.perf_counter() - begin < seconds):
        write_atomically(folder / "safe", os.urandom(64))
        done += 1
    return (time.perf_counter() - begin) / done


def sequential_rate(
    files: Iterable[Path], *, most: int = _MOST_BYTES, seconds: float = _SECONDS
) -> Rate:
    """Read files one after the other, from the disk.

    Args:
        files: to read.
        most: bytes.
        seconds: after which it is enough.

    Raises:
        OSError: a file cannot be read.
    """
    done, took = 0, 0.0
    for path in files:
        forget(path)
        with path.open("rb", buffering=0) as file:
            begin = time.perf_counter()
            while done < most and took + time.perf_counter() - begin < seconds:
                content = file.read(_BLOCK // 2)
                if not content:
                    break
                done += len(content)
            took += time.perf_counter() - begin
        if done >= most or took >= seconds:
            break
    return Rate(done, took)


def reading_rate(
    items: Sequence[int],
    read: Callable[[int, float], int],
    *,
    seconds: float = _SECONDS,
    readers: int = _READERS,
) -> tuple[Rate, int]:
    """Read items with several threads at once, as a loader does.

    Args:
        items: to read, in this order.
        read: reads one, or what can be read of it until a time (of `perf_counter`), and returns its
            bytes.
        seconds: after which no more is begun.
        readers: threads.

    Returns:
        The rate in bytes, and the number of items.
    """
    begin = time.perf_counter()
    end = begin + seconds
    waiting = iter(items)

    def work(_: int) -> list[int]:
        sizes: list[int] = []
        for item in waiting:  # one iterator for all: each item goes to one of them
            if time.perf_counter() > end:
                break
            sizes.append(read(item, end))
        return sizes

    with ThreadPoolExecutor(readers) as pool:
        sizes = [size for part in pool.map(work, range(readers)) for size in part]
    return Rate(sum(sizes), time.perf_counter() - begin), len(sizes)


def read_beginning(path: Path, end: float, *, most: int = _MOST_OF_FILE) -> int:
    """Read a file piece by piece: the whole of a small one, the beginning of a large one.

    Args:
        path: of the file.
        end: no piece is begun after that, seconds of `perf_counter`.
        most: bytes.

    Returns:
        Bytes that were read.

    Raises:
        OSError: it cannot be read.
    """
    done = 0
    with path.open("rb", buffering=0) as file:
        while done < most and time.perf_counter() < end:
            content = file.read(min(_PIECE, most - done))
            if not content:
                break
            done += len(content)
    return done


def forget(path: Path) -> None:
    """Let the next reader see the disk, and not what the kernel remembers of it."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
