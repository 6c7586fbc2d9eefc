"""Files that grow by whole pieces, on disks that may be full for a while.

A piece that the disk refuses is kept in memory, written with the next one, and never left half in the
file as far as the disk lets it be cut off. What was written is kept until a flush has brought it onto
the disk: a network file system takes bytes that it has no room for, says so once, at fsync, and has
forgotten them by then.
"""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from pathlib import Path

from agrivision.errors import AgrivisionError
from agrivision.storage import storage_error

_MOST_BYTES = 64 << 20  # kept in memory; then the disk has refused for too long
_FLUSH_BYTES = 16 << 20  # and so much is flushed without being asked

logger = logging.getLogger(__name__)


class Appended:
    """Appends pieces to a file, each with one unbuffered write; threads may share it.

    Args:
        path: of the file; its folder must exist.
        new: whether the file must not exist yet.

    Raises:
        StorageError, NotWritable: the disk refused to open it.
    """

    def __init__(self, path: Path, *, new: bool = False) -> None:
        self.path = path
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | (os.O_EXCL if new else 0)
        try:
            self._file = os.open(path, flags, 0o666)
            self._size = os.fstat(self._file).st_size  # of what stands in the file, in whole pieces
        except OSError as error:
            raise storage_error(path, error) from error
        self._safe = self._size  # so much of it survives a power cut
        self._pieces: list[bytes] = []  # after that, in order
        self._kept = 0  # their bytes
        self._sent = 0  # how many of them stand in the file
        self._torn = False  # the file may be longer than `_size`
        self._refusing = False
        self._lock = threading.Lock()
        self._flushing = threading.Lock()

    def append(self, piece: bytes) -> None:
        """Add a piece, now or as soon as the disk takes it; its first refusal is logged.

        Raises:
            StorageError, NotWritable: the disk has refused for so long that memory runs out.
        """
        refusal: AgrivisionError | None = None
        with self._lock:
            self._pieces.append(piece)
            self._kept += len(piece)
            try:
                self._send()
            except OSError as error:
                refusal = storage_error(self.path, error)
        if refusal is None and self._kept > _FLUSH_BYTES:
            try:
                self.flush()
            except AgrivisionError as error:
                refusal = error
        if refusal is not None:
            self._say(refusal)

    def flush(self) -> None:
        """Bring all pieces onto the disk, where they survive a power cut.

        Raises:
            StorageError, NotWritable: the disk refused; nothing is lost yet, and the next call tries
                again.
        """
        with self._flushing:
            try:
                with self._lock:
                    self._send()
                    count, size = self._sent, self._size
                os.fsync(self._file)  # takes seconds on some disks: meanwhile pieces may be added
                with self._lock:
                    self._forget(count)
                    self._safe = size
            except OSError as error:
                with self._lock, suppress(OSError):
                    # Linux says it once: a second fsync would pass over pages that are lost.
                    self._sent, self._size, self._torn = 0, self._safe, True
                    self._mend()
                raise storage_error(self.path, error) from error

    def close(self) -> None:
        """Flush and close; a second call does nothing.

        Raises:
            StorageError, NotWritable: the disk refused, and what it did not take is lost.
        """
        if self._file < 0:
            return
        try:
            self.flush()
        finally:
            file, self._file = self._file, -1
            try:
                os.close(file)
            except OSError as error:  # network file systems report a full quota here
                raise storage_error(self.path, error) from error

    def _send(self) -> None:
        """Write what is not in the file yet."""
        try:
            self._mend()
            while self._sent < len(self._pieces):
                piece = self._pieces[self._sent]
                self._torn = True
                write_all(self._file, piece)
                self._torn = False
                self._sent += 1
                self._size += len(piece)
        except OSError:
            with suppress(OSError):
                self._mend()
            raise
        if self._refusing:
            self._refusing = False
            logger.warning("%s can be written again; nothing is missing in it", self.path)

    def _mend(self) -> None:
        """Cut off what was not taken whole; a full disk allows that."""
        if self._torn:
            if os.fstat(self._file).st_size != self._size:
                os.ftruncate(self._file, self._size)
            self._torn = False

    def _forget(self, count: int) -> None:
        """These pieces are safe on the disk."""
        self._kept -= sum(map(len, self._pieces[:count]))
        del self._pieces[:count]
        self._sent -= count

    def _say(self, refusal: AgrivisionError) -> None:
        if self._kept > _MOST_BYTES:
            raise refusal
        if not self._refusing:
            self._refusing = True
            logger.warning("%s; what belongs there is kept in memory and tried again", refusal)


def close_after(file: Appended, error: BaseException | None) -> None:
    """Close a file at the end of a block; what the block raised says why the work ends, and counts.

    Args:
        file: to close.
        error: that the block raised.

    Raises:
        StorageError, NotWritable: the disk refused, and the block had raised nothing.
    """
    try:
        file.close()
    except AgrivisionError as second:
        if error is None:
            raise
        logger.warning("%s", second)


def write_all(file: int, content: bytes) -> None:
    """Write to a descriptor; an unbuffered write may take only a part, on a disk that is nearly full.

    Raises:
        OSError: the disk refused; some of the content may be there.
    """
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]
