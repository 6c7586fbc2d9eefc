"""Locks on files that processes share, on one node or on several.

The lock is the kernel's (flock): it ends with the process, however that ends. Some cluster file systems
have none (Lustre without `-o flock`, NFS without its lock service): there everyone passes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from agrivision.errors import Busy, Interrupted
from agrivision.ownership import open_own
from agrivision.part import Stop
from agrivision.storage import storage_error

# How long an attempt that Slurm has given up may take to notice, and NFS to give its lock away.
_PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.2
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class FileLock:
    """A file and the lock on it; the file is made where missing, its folder too.

    Attributes:
        path: of the file.
        known: False once the file system has said that it has no locks.

    Raises:
        StorageError, NotWritable: the disk refused.
        Untrusted: there is a link, or a file that somebody else made.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.known = path, True
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # For reading and writing: on NFS a lock needs both, since it is a lock on bytes there.
            self._file = os.fdopen(open_own(path), "ab+", buffering=0)
        except OSError as error:
            raise storage_error(path, error) from error

    def take(self, *, alone: bool) -> bool:
        """Take the lock, alone or beside others that do not want it alone; False where it is taken.

        Raises:
            StorageError, NotWritable: the disk refused.
        """
        kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        try:
            fcntl.flock(self._file.fileno(), kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.ESTALE:  # removed by another node; `in_place` says so too
                return False
            if error.errno not in _NO_LOCKS:
                raise storage_error(self.path, error) from error
            self.known = False
        return True

    def free(self) -> None:
        """Let others have the lock."""
        if self.known:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_UN)

    @property
    def in_place(self) -> bool:
        """Whether the file still has its name: whoever had the lock before may have removed it."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except OSError:
            return False

    def read(self) -> bytes:
        """The file's content."""
        try:
            self._file.seek(0)
            return self._file.read()
        except OSError as error:
            raise storage_error(self.path, error) from error

    def append(self, content: bytes) -> None:
        """Write at the end of the file.

        Raises:
            StorageError, NotWritable: the disk refused; some of the content may be there.
        """
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            raise storage_error(self.path, error) from error

    def cut(self, size: int) -> None:
        """Keep only so many bytes."""
        try:
            self._file.truncate(size)
        except OSError as error:
            raise storage_error(self.path, error) from error

    def sync(self) -> None:
        """Make what was written survive a power cut, and visible to other nodes."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise storage_error(self.path, error) from error

    def close(self) -> None:
        """Close the file, which frees the lock."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Patience:
    """Waits for a lock that another process has, but not for ever.

    A job that comes back after its node was lost meets its own earlier process, which may live on.

    Args:
        what: the other process does, for messages.
        stop: whether this one was asked to stop.
    """

    def __init__(self, what: str, stop: Stop) -> None:
        self._what, self._stop = what, stop
        self._end = time.monotonic() + _PATIENCE_SECONDS

    def wait(self) -> None:
        """Wait a moment; to be called each time that the lock was found taken.

        Raises:
            Interrupted: asked to stop.
            Busy: that is enough.
        """
        if self._stop():
            raise Interrupted(f"stopped while {self._what}: the same command goes on")
        if time.monotonic() >= self._end:
            raise Busy(f"{self._what}: wait for it, or end it")
        time.sleep(_POLL_SECONDS)
