"""What a prediction has done so far, in OUT/.predict, so that an interrupted one goes on.

A journal is a file to which records are appended, each with its length and checksum, under a digest of
everything that the results depend on: what another checkpoint or other options left counts for nothing.
A record that was cut or damaged ends what is read; the journal goes on from there.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Container, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import torch
import xxhash

from agrivision import __version__
from agrivision.errors import NotWritable
from agrivision.inference.trained import TrainedModel
from agrivision.locks import FileLock, Patience
from agrivision.ownership import require_own_tree
from agrivision.part import Stop, never
from agrivision.storage import storage_error

FOLDER = ".predict"
_DEPTH = 2  # .predict/scenes/STEM/DIGEST/7.block
_HALF = re.compile(r"\.(.+)\.[0-9]+\.part(?:\.[a-z]+)*", re.DOTALL)
_FRAME = struct.Struct("<IQ")  # length and XXH3-64 of what follows


def fingerprint(trained: TrainedModel, *how: object) -> str:
    """Digest of the network, its weights, the program's version and how it is used."""
    digest = xxhash.xxh3_128()
    about = (__version__, trained.module, trained.description, trained.step, how)
    digest.update(repr(about).encode())
    for name, tensor in trained.module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def stamp(path: Path) -> str:
    """The place, size and time of a file, or that it is missing."""
    try:
        status = path.stat()
    except OSError:
        return f"{path.absolute()}|missing"
    return f"{path.absolute()}|{status.st_size}|{status.st_mtime_ns}"


def remove_leftovers(folder: Path, names: Container[str]) -> None:
    """Remove what killed processes left half written beside files of these names.

    To be called by the process that alone may write them.

    Args:
        folder: of the files.
        names: of the files, or their stems where the suffix comes last.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    try:
        for path in folder.glob(".*.part*"):
            match = _HALF.fullmatch(path.name)
            if match is not None and match[1] in names:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; one that is there already is left as it is.

    Raises:
        StorageError, NotWritable: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotWritable(f"cannot write into {folder}: it is no folder") from None
    except OSError as error:
        raise storage_error(folder, error) from error


def require_own_state(*paths: Path) -> None:
    """Refuse what somebody else left as done: it would be taken for part of the result.

    Args:
        paths: of files, and of folders with what is in them.

    Raises:
        Untrusted: there is such a thing.
        StorageError, NotWritable: it cannot be looked at.
    """
    for path in paths:
        try:
            require_own_tree(path, _DEPTH)
        except OSError as error:
            raise storage_error(path, error) from error


class Journal:
    """A journal that this process alone may write; to be used in a `with` statement.

    Args:
        path: of the file, made where missing.
        digest: of what the results depend on; a journal under another one is begun anew.
        what: is done here, for the message that somebody else does it.
        stop: whether to stop waiting for somebody else.

    Raises:
        Busy: another process has it, and keeps it.
        Interrupted: asked to stop while another process had it.
        StorageError, NotWritable: the disk refused.
    """

    def __init__(self, path: Path, digest: str, what: str, stop: Stop = never) -> None:
        self.path, self._digest = path, digest
        patience = Patience(f"another process predicts {what}", stop)
        self._file = FileLock(path)
        while not (taken := self._file.take(alone=True)) or not self._file.in_place:
            self._file.close()
            if not taken:
                patience.wait()
            self._file = FileLock(path)  # whoever had it may have finished and removed it
        self.count, end = 0, 0
        for _, end in _records(path, digest):  # noqa: B007 - the last one is meant
            self.count += 1
        self._file.cut(end)

    def append(self, content: bytes) -> None:
        """Add a record.

        Raises:
            StorageError, NotWritable: the disk refused.
        """
        head = b"" if self.count else _head(self._digest)
        frame = _FRAME.pack(len(content), xxhash.xxh3_64_intdigest(content))
        self._file.append(head + frame + content)
        self.count += 1

    def records(self) -> Iterator[bytes]:
        """All records in order, those of earlier processes first."""
        return read_records(self.path, self._digest)

    def sync(self) -> None:
        """Let other nodes see the records."""
        self._file.sync()

    def remove(self) -> None:
        """The work is done: nothing needs the records any more."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.count:  # leave nothing where nothing was done
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
                self.path.parent.rmdir()
                self.path.parent.parent.rmdir()
        self._file.close()


def read_records(path: Path, digest: str) -> Iterator[bytes]:
    """The whole records of a journal under this digest; none where it has another or is missing."""
    for content, _ in _records(path, digest):
        yield content


def _records(path: Path, digest: str) -> Iterator[tuple[bytes, int]]:
    """Each record, and where in the file it ends."""
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        if file.read(len(_head(digest))) != _head(digest):
            return
        while (content := _next(file)) is not None:
            yield content, file.tell()


def _next(file: IO[bytes]) -> bytes | None:
    frame = file.read(_FRAME.size)
    if len(frame) < _FRAME.size:
        return None
    size, checksum = _FRAME.unpack(frame)
    if size > os.fstat(file.fileno()).st_size - file.tell():  # asked for, memory would be taken first
        return None
    content = file.read(size)
    return content if xxhash.xxh3_64_intdigest(content) == checksum and len(content) == size else None


def _head(digest: str) -> bytes:
    return f"agrivision {digest}\n".encode()
