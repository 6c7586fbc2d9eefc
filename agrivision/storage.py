"""Writing files so that nothing good is ever damaged: write beside, fsync, rename."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from agrivision.errors import AgrivisionError, NotWritable, StorageError
from agrivision.ownership import require_own, require_owner


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """Open a new version of a file, which takes the old one's place when the block ends well.

    After an error or a kill the old version is untouched.

    Args:
        path: file to write; its folder must exist.
        mode: of the file, before the user's mask.

    Yields:
        A binary file opened for writing.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # Left by a killed process of this number; in a shared folder it may be somebody's link.
        beside.unlink(missing_ok=True)
        with open(beside, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        # A read-only file system refuses even to remove what is not there; what it said first counts.
        with suppress(OSError):
            beside.unlink()


def write_atomically(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a whole file, or leave the old one as it was.

    Args:
        path: file to write; its folder must exist.
        content: of it.
        mode: of the file, before the user's mask.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    with replacing(path, mode) as file:
        file.write(content)


def detach(path: Path, mode: int = 0o666) -> None:
    """Make a file anew with the same content, so that whoever still has it open writes to the old one.

    Args:
        path: of the file.
        mode: of the new one, before the user's mask.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    try:
        with path.open("rb") as old, replacing(path, mode) as new:
            shutil.copyfileobj(old, new)
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error(path, error) from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, as fsync does for the bytes of a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Fsync all files and folders below, and the folder itself."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync_folder(path)  # fsync works on a descriptor of either kind
    sync_folder(folder)


def make_private(folder: Path) -> None:
    """Make a folder that only its owner can open (0700); an existing one of ours becomes so.

    Raises:
        StorageError, NotWritable: it cannot be made.
        Untrusted: there is one that somebody else owns, or can write although it is ours now.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_owner(folder)  # before anything is done to what a link leads to
        status = folder.stat()
        if status.st_uid == os.geteuid() and status.st_mode & 0o077:
            folder.chmod(0o700)
        require_own(folder)
    except OSError as error:
        raise storage_error(folder, error) from error


def remove_tree(folder: Path) -> None:
    """Remove a folder by renaming it away first, so that no half of it is ever seen under its name."""
    gone = folder.with_name(f".{folder.name}.{os.getpid()}.gone")
    try:
        folder.rename(gone)
        shutil.rmtree(gone)
    except OSError as error:
        raise storage_error(folder, error) from error


_NOT_FOR_US = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,  # a file where a folder belongs
    errno.ENAMETOOLONG,
}


def storage_error(path: Path, error: OSError) -> AgrivisionError:
    """One line for an operating system's refusal to write `path`.

    Returns:
        NotWritable where somebody has to change something, StorageError where waiting may help.
    """
    noun = NotWritable if error.errno in _NOT_FOR_US else StorageError
    return noun(f"cannot write {path}: {error.strerror or error}")
