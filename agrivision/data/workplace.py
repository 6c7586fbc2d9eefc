"""The folder in which a data set grows: OUT.partial, which becomes OUT in one step when it is whole.

`OUT.partial/.prepare` holds the lock, and a note on each finished shard. The lock is the kernel's
(flock), so that it ends with the process, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agrivision.data.schema import FILE_NAME, Schema
from agrivision.errors import DatasetError
from agrivision.storage import storage_error, sync_folder, sync_tree, write_atomically

_OWN = ".prepare"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass(frozen=True)
class Workplace:
    """A data set in the making.

    Attributes:
        out: the folder that it will be.
    """

    out: Path

    @property
    def folder(self) -> Path:
        """Where it grows."""
        return self.out.with_name(self.out.name + ".partial")

    def split(self, name: str) -> Path:
        """Folder of a split's shards."""
        return self.folder / name

    def note(self, split: str, shard: str) -> Any:
        """What was noted about a finished shard; None without a readable note."""
        try:
            return json.loads(self._note(split, shard).read_bytes())
        except (OSError, ValueError):
            return None

    def write_note(self, split: str, shard: str, content: Any) -> None:
        """Note that a shard is finished; to be done last.

        Raises:
            StorageError, NotWritable: the disk refused.
        """
        write_atomically(self._note(split, shard), json.dumps(content).encode())

    def _note(self, split: str, shard: str) -> Path:
        return self.folder / _OWN / split / f"{shard}.json"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Have the folder for this process alone; what is in it stays when the block fails.

        Raises:
            DatasetError: OUT exists already, or another process is at work on it.
            StorageError, NotWritable: the disk refused.
        """
        self.check_free()
        lock = self.folder / _OWN / "lock"
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("wb")
        except OSError as error:
            raise storage_error(self.folder, error) from error
        with file:
            self._lock(file.fileno())
            # Whoever had the lock may just have finished: then this file has no name any more.
            if not _same_file(file.fileno(), lock):
                raise DatasetError(f"another `prepare` has just finished {self.out}")
            self._check_out()
            yield

    def check_free(self) -> None:
        """Make sure that nothing stands where the data set is to grow and to be.

        Raises:
            DatasetError: something does.
        """
        self._check_out()
        ours = any((self.folder / name).exists() for name in (_OWN, FILE_NAME))
        if os.path.lexists(self.folder) and not ours:
            raise DatasetError(
                f"{self.folder} was not made by `prepare`, which needs the name: move it"
            )

    def _check_out(self) -> None:
        if os.path.lexists(self.out):
            raise DatasetError(f"{self.out} exists already: remove it, or name another folder")

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DatasetError(f"another `prepare` is at work on {self.out}") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:  # some cluster file systems have none: then do without
                raise storage_error(self.folder, error) from error

    def tidy(self, shards: dict[str, list[str]]) -> None:
        """Make the folders of the splits, and remove whatever an earlier attempt left besides.

        Args:
            shards: names of the shards by split.

        Raises:
            StorageError, NotWritable: the disk refused.
        """
        wanted = {self.folder / _OWN / "lock"}
        for split, names in shards.items():
            for name in names:
                wanted |= {self._note(split, name), *self.shard(split, name)}
        try:
            for path in sorted(self.folder.rglob("*"), reverse=True):
                if not path.is_dir() and path not in wanted:
                    path.unlink()
                elif path.is_dir() and not path.is_symlink():
                    with suppress(OSError):  # not empty
                        path.rmdir()
            for split in shards:
                self.split(split).mkdir(exist_ok=True)
                self._note(split, "").parent.mkdir(exist_ok=True)
        except OSError as error:
            raise storage_error(self.folder, error) from error

    def shard(self, split: str, name: str) -> tuple[Path, Path]:
        """The files of a shard."""
        folder = self.split(split)
        return folder / f"{name}.tar", folder / f"{name}.index.npy"

    def finish(self, schema: Schema) -> None:
        """Describe the data set, remove the notes and give the folder its name.

        Raises:
            DatasetError: OUT came into being meanwhile.
            StorageError, NotWritable: the disk refused.
        """
        schema.write(self.folder)
        own = self.folder / _OWN
        files = {self.folder / FILE_NAME}
        for split, info in schema.splits.items():
            files.update(*(self.shard(split, shard.name) for shard in info.shards))
        try:
            for path in self.folder.rglob("*"):  # shards of tiles that all turned out to be empty
                if path.is_file() and path not in files and not path.is_relative_to(own):
                    path.unlink()
            sync_tree(self.folder)
            shutil.rmtree(own)
            for path in self.folder.iterdir():
                if path.is_dir() and path.name not in schema.splits:
                    path.rmdir()
            sync_folder(self.folder)
            self._check_out()
            self.folder.rename(self.out)
            sync_folder(self.out.parent)
        except OSError as error:
            raise storage_error(self.out, error) from error


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
