"""The folder in which a data set grows: OUT.partial, which becomes OUT in one step when it is whole.

`OUT.partial/.prepare` holds the lock, a note on each finished shard, and what the parts of a job array
need to know of one another (see `sharing.py`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from agrivision.data import recipe
from agrivision.data.schema import FILE_NAME, Schema
from agrivision.errors import DatasetError
from agrivision.json_values import entries, parse, text, whole
from agrivision.locks import FileLock, Patience
from agrivision.ownership import require_own_tree
from agrivision.part import Stop, never
from agrivision.storage import storage_error, sync_folder, sync_tree, write_atomically

_OWN = ".prepare"
_DEPTH = 3  # OUT.partial/.prepare/SPLIT
_AGREEMENT, _LOG = "parts.json", "log"


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
        """What was noted about a finished shard; None without a note that is as it was written."""
        try:
            content = entries(parse(self._note(split, shard).read_bytes()))
            checksum = content.pop("checksum")
        except (OSError, ValueError, KeyError):
            return None
        return content if checksum == _checksum(content) else None

    def write_note(self, split: str, shard: str, content: Mapping[str, Any]) -> None:
        """Note that a shard is finished; to be done last.

        Raises:
            StorageError, NotWritable: the disk refused.
        """
        complete = {**content, "checksum": _checksum(content)}
        write_atomically(self._note(split, shard), json.dumps(complete).encode())

    def _note(self, split: str, shard: str) -> Path:
        return self.folder / _OWN / split / f"{shard}.json"

    def own(self, name: str) -> Path:
        """A file about the work itself, which goes when the data set is finished."""
        return self.folder / _OWN / name

    @property
    def log(self) -> Path:
        """Which parts began, and which have made their shards."""
        return self.own(_LOG)

    def agreement(self) -> tuple[str, int] | None:
        """Digest of the plan that is at work here, and how many parts it has; None without any."""
        try:
            content = entries(parse(self.own(_AGREEMENT).read_bytes()))
            return text(content["plan"]), whole(content["parts"], least=1)
        except (OSError, ValueError, KeyError):
            return None

    def agree(self, plan: str, parts: int) -> None:
        """Set down what is at work here from now on, and forget what other parts did.

        Raises:
            StorageError, NotWritable: the disk refused.
        """
        try:
            self.log.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(self.log, error) from error
        content = json.dumps({"plan": plan, "parts": parts})
        write_atomically(self.own(_AGREEMENT), content.encode())

    @contextmanager
    def held(self, stop: Stop = never) -> Iterator[None]:
        """Have the folder for this process alone; what is in it stays when the block fails.

        Args:
            stop: whether to stop waiting for another process.

        Raises:
            DatasetError: OUT exists already, or another process has just finished it.
            Busy: another process is at work on it, and stays.
            Interrupted: asked to stop while another process was at work on it.
            StorageError, NotWritable: the disk refused.
        """
        self.check_free()
        with self.lock() as lock:
            patience = Patience(f"another `prepare` is at work on {self.out}", stop)
            while not lock.take(alone=True):
                patience.wait()
            # Whoever had the lock may just have finished: then this file has no name any more.
            if not lock.in_place:
                raise DatasetError(f"another `prepare` has just finished {self.out}")
            self._check_out()
            yield

    def lock(self) -> FileLock:
        """Held alone by a whole `prepare`, together by its parts.

        Raises:
            StorageError, NotWritable: the disk refused.
        """
        return FileLock(self.own("lock"))

    def check_free(self) -> None:
        """Make sure that nothing stands where the data set is to grow and to be.

        Raises:
            DatasetError: something does.
            Untrusted: it is somebody else's: what it says is finished would be taken for so.
            StorageError, NotWritable: it cannot be looked at.
        """
        self._check_out()
        try:
            require_own_tree(self.folder, _DEPTH)
        except OSError as error:
            raise storage_error(self.folder, error) from error
        if not self._is_ours():
            raise DatasetError(
                f"{self.folder} was not made by `prepare`, which needs the name: move it"
            )

    def _is_ours(self) -> bool:
        """Whether `prepare` made the folder, or may: an empty one may have been made this moment."""
        try:
            names = {path.name for path in self.folder.iterdir()}
        except FileNotFoundError:
            return not self.folder.is_symlink()
        except OSError:  # it is a file, or what it is to stand in is
            return not os.path.lexists(self.folder)
        return not names or _OWN in names or FILE_NAME in names

    def _check_out(self) -> None:
        if os.path.lexists(self.out):
            raise DatasetError(f"{self.out} exists already: remove it, or name another folder")

    def tidy(self, shards: Mapping[str, Collection[str]]) -> None:
        """Make the folders of the splits, and remove whatever an earlier attempt left besides.

        To be called by a process that is alone here.

        Args:
            shards: names of the shards by split.

        Raises:
            StorageError, NotWritable: the disk refused.
        """
        wanted = {path for path in (self.folder / _OWN).glob("*") if not path.name.startswith(".")}
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
        except OSError as error:
            raise storage_error(self.folder, error) from error
        self.make_folders(shards)

    def make_folders(self, splits: Collection[str]) -> None:
        """Make the folders of the splits, also beside others that do the same.

        Raises:
            StorageError, NotWritable: the disk refused.
        """
        try:
            for split in splits:
                self.split(split).mkdir(exist_ok=True)
                self._note(split, "").parent.mkdir(exist_ok=True)
        except OSError as error:
            raise storage_error(self.folder, error) from error

    def missing(self, shards: Mapping[str, Collection[str]]) -> int:
        """How many of these shards have no note yet.

        Args:
            shards: names by split.
        """
        # Listed and not asked for one by one: a network file system remembers what was not there.
        return sum(
            len(set(names) - {note.stem for note in self._note(split, "").parent.glob("*.json")})
            for split, names in shards.items()
        )

    def shard(self, split: str, name: str) -> tuple[Path, Path]:
        """The files of a shard."""
        folder = self.split(split)
        return folder / f"{name}.tar", folder / f"{name}.index.npy"

    def finish(self, schema: Schema, options: Mapping[str, Any]) -> None:
        """Describe the data set and give the folder its name; the notes go last.

        Args:
            schema: what is in it.
            options: what it was made with.

        Raises:
            DatasetError: OUT came into being meanwhile.
            StorageError, NotWritable: the disk refused.
        """
        schema.write(self.folder)
        recipe.write_recipe(self.folder, options, recipe.made_with(schema.parts))
        own = self.folder / _OWN
        files = {self.folder / FILE_NAME, self.folder / recipe.FILE_NAME}
        for split, info in schema.splits.items():
            files.update(*(self.shard(split, shard.name) for shard in info.shards))
        try:
            for path in self.folder.rglob("*"):  # shards of tiles that all turned out to be empty
                if path.is_file() and path not in files and not path.is_relative_to(own):
                    path.unlink()
            for path in self.folder.iterdir():
                if path.is_dir() and path.name not in schema.splits and path != own:
                    path.rmdir()
            sync_tree(self.folder)
            self._check_out()
            self.folder.rename(self.out)
            sync_folder(self.out.parent)
        except OSError as error:
            raise storage_error(self.out, error) from error

    def sweep(self) -> None:
        """Remove what is no part of a finished data set, as far as that can be done.

        To be called without a lock: NFS keeps a removed file that is open under another name.
        """
        if (self.out / FILE_NAME).is_file():
            shutil.rmtree(self.out / _OWN, ignore_errors=True)
            with suppress(OSError):  # what a part made that came too late: locks and nothing else
                for path in (self.folder / _OWN).iterdir():
                    path.unlink()
                (self.folder / _OWN).rmdir()
                self.folder.rmdir()


def _checksum(note: Mapping[str, Any]) -> str:
    """A flipped bit in a note would be a wrong statistic of the whole data set."""
    return xxhash.xxh3_128_hexdigest(json.dumps(note, sort_keys=True).encode())
