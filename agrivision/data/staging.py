"""Shards on the node's own disk: copied once per node, compared with their checksums, read there.

STAGE/agrivision-FINGERPRINT/ (0700) becomes a data set of the splits that the run reads. A split is
copied into `.SPLIT.part`, every record of the copy is read and compared, and the split gets its name
by a rename; dataset.json, written last, says that all of it is whole. The ranks of a node take turns
by a lock (flock on STAGE/.agrivision-FINGERPRINT.lock, which stays there): the first copies, the
others find the copy. A killed copier leaves no lock, and the next one throws its part away.

Whatever goes wrong, the run reads the shared copy instead and says why: staging changes where bytes
come from, and nothing of what is computed. A copy that goes bad later is noticed when it is read,
since every read compares its record's checksum; that shard is then read from the shared copy.

Nothing here removes a whole copy. `$SLURM_TMPDIR` is emptied by the cluster when the job ends. In a
folder that the user names, copies stay for the next job, those of other data sets too: remove the
folders `agrivision-*` there when they are no longer wanted.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from agrivision.data.schema import FILE_NAME, Schema, ShardInfo
from agrivision.data.shards import Scratch, Shard, SplitReader
from agrivision.errors import (
    AgrivisionError,
    ConfigurationError,
    DatasetError,
    NotWritable,
    StorageError,
)
from agrivision.storage import (
    make_private,
    remove_tree,
    replacing,
    storage_error,
    sync_folder,
)
from agrivision.world import expand_variables

RESERVED_SHARE = 0.05  # of a disk: stays free for the node's other users

# tmpfs is missing: what lies there counts as the job's memory. So are all network file systems.
_DISKS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay"}
_MOUNTS = Path("/proc/self/mountinfo")
_THREADS = 4  # one stream does not fill a parallel file system's line
_COPY_BYTES = 8 << 20
_TURN_SECONDS = 0.2

_T = TypeVar("_T")

log = logging.getLogger(__name__)


class StagedSplit(SplitReader):
    """A split that is read from the node's copy, and shard by shard from the shared one instead.

    Args:
        copy: the staged data set.
        shared: the data set that it was copied from.
        schema: dataset.json of the shared one; its digests decide which copy is good.
        name: the split.

    Raises:
        DatasetError: there is no such split, or it is empty.
    """

    def __init__(self, copy: Path, shared: Path, schema: Schema, name: str) -> None:
        super().__init__(copy, schema, name)
        self.dataset = shared
        self._shared = SplitReader(shared, schema, name)
        self._given_up: set[str] = set()

    def where(self, tile: int) -> tuple[str, str | None]:
        """See SplitReader."""
        shard, key = super().where(tile)
        return (shard, key) if key is not None else self._shared.where(tile)

    def reopen(self, tile: int) -> None:
        """See SplitReader."""
        super().reopen(tile)
        self._shared.reopen(tile)

    def read(
        self, tile: int, into: Sequence[memoryview | None] = (), scratch: Scratch | None = None
    ) -> list[memoryview]:
        """The files of a tile, image files first and labels last, checksum compared.

        Args:
            tile: its number.
            into: where files are wanted; see `Shard.read`.
            scratch: for the others.

        Raises:
            DatasetError: the record is damaged, or cannot be read, in the shared copy too.
        """
        shard, row = self.locate(tile)
        try:
            return shard.read(row, into, scratch)
        except DatasetError as error:
            if shard.path.parent != self._folder:
                raise
            self._give_up(shard.path.stem, error)
        return self._shared.read(tile, into, scratch)

    def _index(self, number: int) -> NDArray[np.void]:
        return self._either(number, super()._index, self._shared._index)

    def _shard(self, number: int) -> Shard:
        return self._either(number, super()._shard, self._shared._shard)

    def _either(self, number: int, own: Callable[[int], _T], shared: Callable[[int], _T]) -> _T:
        """From the copy of a shard, or, once that was found damaged, from the shared one."""
        name = self.split.shards[number].name
        if name not in self._given_up:
            try:
                return own(number)
            except DatasetError as error:
                self._give_up(name, error)
        return shared(number)

    def _give_up(self, name: str, error: DatasetError) -> None:
        self._given_up.add(name)
        log.warning("%s; %s/%s.tar is read from the shared copy", error, self.name, name)


def stage(
    folder: Path,
    schema: Schema,
    splits: Sequence[str],
    where: str,
    *,
    stop: Callable[[], bool] = lambda: False,
    speaks: bool = True,
) -> Path | None:
    """Have some splits of a data set on this node's disk; every rank of the node calls it.

    Args:
        folder: the shared data set.
        schema: its dataset.json.
        splits: names of the splits that the run reads.
        where: as in the configuration: `auto`, or a path, in which `$NAME` is expanded.
        stop: asked between two pieces; True gives up.
        speaks: whether this rank warns; one of a node is enough.

    Returns:
        The copy, or None after one warning that says why the shared data set has to do.
    """
    begin = time.perf_counter()
    try:
        place = _place(where, folder)
        copy = place / f"agrivision-{schema.fingerprint}"
        with _turn(place, copy.name, stop):
            copied = _complete(copy, folder, schema, list(dict.fromkeys(splits)), stop)
    except AgrivisionError as refusal:
        level = logging.WARNING if speaks else logging.DEBUG
        log.log(level, "not staged, reading the shared copy in %s: %s", folder, refusal)
        return None
    seconds = time.perf_counter() - begin
    if copied:
        log.info("%s: %.1f MB staged in %s in %.1f s", folder, copied / 1e6, copy, seconds)
    else:
        log.info("%s: reading the copy in %s, which is whole", folder, copy)
    return copy


def _place(where: str, folder: Path) -> Path:
    """The folder STAGE, absolute."""
    place = Path(automatic_place(folder) if where == "auto" else expand_variables(where))
    if not place.is_absolute() or not str(place).isprintable():
        raise ConfigurationError(f"data.stage is {where}, here {str(place)!r}: not an absolute path")
    return place


def automatic_place(folder: Path) -> str:
    """`$SLURM_TMPDIR`, which is the job's own by what clusters mean with it; else a good `$TMPDIR`.

    Args:
        folder: the shared data set.

    Raises:
        StorageError: there is neither.
    """
    with suppress(ConfigurationError):
        return expand_variables("$SLURM_TMPDIR")
    try:
        text = expand_variables("$TMPDIR")
    except ConfigurationError:
        raise StorageError("data.stage is auto, but neither SLURM_TMPDIR nor TMPDIR is set") from None
    _check_local(Path(text), folder)
    return text


def _check_local(place: Path, folder: Path) -> None:
    """Refuse a TMPDIR that is no disk of this node, or the disk that the data set is on anyway."""
    try:
        kind = file_system(place.resolve(), _MOUNTS.read_text(errors="surrogateescape"))
        same = place.stat().st_dev == folder.stat().st_dev
    except OSError as error:
        raise StorageError(f"cannot look at TMPDIR {place}: {error.strerror}") from None
    if kind not in _DISKS:
        raise StorageError(
            f"data.stage is auto, but TMPDIR {place} is {kind or 'of an unknown type'}, not a disk"
            " of this node: name a path"
        )
    if same:
        raise StorageError(f"data.stage is auto, but TMPDIR {place} is on the data set's own disk")


def file_system(folder: Path, mounts: str) -> str:
    """Type of the file system that a folder is on, for example `ext4` or `nfs4`; empty if unknown.

    Args:
        folder: absolute, without symbolic links.
        mounts: content of /proc/self/mountinfo.
    """
    found, kind = "", ""
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split(" ")[4])
        # Of several mounts on one point the last is seen.
        if folder.is_relative_to(point) and len(point) >= len(found):
            found, kind = point, after.split(" ")[0]
    return kind


@contextmanager
def _turn(place: Path, name: str, stop: Callable[[], bool]) -> Iterator[None]:
    """Have STAGE to oneself; what made the block fail is told to those who wait meanwhile.

    The reason stands in the lock's file. Who did not wait starts anew: it may be another day.

    Raises:
        AgrivisionError: the block's own; or, after waiting, that of who had the turn before.
        StorageError, NotWritable: STAGE cannot be made or has no locks.
    """
    lock = place / f".{name}.lock"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Where everybody may write, a link of that name could lead to any file of ours.
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise storage_error(lock, error) from None
    try:
        # Somebody else could hold it for ever, and say what he likes.
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise NotWritable(f"{lock} is not a file of this user: remove it, or name another folder")
        try:
            said = _wait(descriptor, stop)
        except OSError as error:
            raise storage_error(lock, error) from None
        if said:
            raise StorageError(said)
        try:
            yield
        except AgrivisionError as refusal:
            with suppress(OSError):  # on a full disk the others find out by themselves
                os.pwrite(descriptor, str(refusal).encode(errors="replace"), 0)
            raise
    finally:
        os.close(descriptor)


def _wait(descriptor: int, stop: Callable[[], bool]) -> str:
    """Wait for the lock; returns what went wrong in the turn that was waited for."""
    waited = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:  # polled, since a blocked call would not hear of a stop
            _go_on_unless(stop)
            waited = True
            time.sleep(_TURN_SECONDS)
    if not waited:
        os.ftruncate(descriptor, 0)
    return os.read(descriptor, 65_536).decode(errors="replace")


def _go_on_unless(stop: Callable[[], bool]) -> None:
    if stop():
        raise StorageError("asked to stop before the copy was whole")


def _complete(
    copy: Path, folder: Path, schema: Schema, splits: Sequence[str], stop: Callable[[], bool]
) -> int:
    """Bring the splits that the copy lacks; returns the bytes copied, 0 where it was whole."""
    _check_ours(copy)
    try:
        _throw_away_parts(copy, schema)
        missing = [name for name in splits if not _is_whole(copy / name, schema, name)]
        if not missing:
            return 0
        for damaged in (copy / name for name in missing if (copy / name).exists()):
            remove_tree(damaged)
        sizes = _sizes(folder, schema, missing)
        _check_room(copy.parent, sum(sizes.values()))
        make_private(copy)
        _copy_splits(copy, folder, schema, missing, stop)
    except OSError as error:
        raise storage_error(copy, error) from None
    finally:
        with suppress(OSError, AgrivisionError):
            _throw_away_parts(copy, schema)
    return sum(sizes.values())


def _check_ours(copy: Path) -> None:
    """Where everybody may write, somebody else may have taken the name."""
    try:
        status = copy.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error(copy, error) from None
    ours = status.st_uid == os.geteuid() and not status.st_mode & 0o022
    if not ours or not stat.S_ISDIR(status.st_mode):
        raise NotWritable(f"{copy} is not a folder of this user, which others cannot write")


def _throw_away_parts(copy: Path, schema: Schema) -> None:
    """Remove what is half: all of a copy that was never finished, the parts in one that was."""
    if not copy.is_dir():
        return
    try:
        finished = Schema.read(copy).fingerprint == schema.fingerprint
    except DatasetError:
        finished = False
    if finished:
        for pattern in (".*.part", ".*.gone"):
            for part in copy.glob(pattern):
                shutil.rmtree(part)
    else:
        shutil.rmtree(copy)


def _is_whole(folder: Path, schema: Schema, split: str) -> bool:
    """Whether all shards are there with their sizes and indexes: cheap, no record is read."""
    try:
        for info in schema.split(split).shards:
            Shard(folder, info, len(schema.parts) + 1)
    except DatasetError:
        return False
    return True


def _sizes(folder: Path, schema: Schema, splits: Sequence[str]) -> dict[Path, int]:
    """Bytes by file of some splits, relative to the data set."""
    names = [
        Path(split, f"{info.name}{end}")
        for split in splits
        for info in schema.split(split).shards
        for end in (".tar", ".index.npy")
    ]
    for name in names:
        if len(name.parts) != 2 or ".." in name.parts:
            raise DatasetError(f"{folder / FILE_NAME} names a shard outside of its folder: {name}")
    try:
        return {name: (folder / name).stat().st_size for name in names}
    except OSError as error:
        raise DatasetError(f"cannot open {error.filename}: {error.strerror}") from None


def _check_room(place: Path, needed: int) -> None:
    """Refuse to fill the disk: a part of it stays free for the node's other users."""
    disk = os.statvfs(place)
    free, reserve = disk.f_bavail * disk.f_frsize, int(disk.f_blocks * disk.f_frsize * RESERVED_SHARE)
    if needed + reserve > free:
        raise StorageError(
            f"{place} has {free / 1e6:,.1f} MB free; the copy takes {needed / 1e6:,.1f} MB,"
            f" and {reserve / 1e6:,.1f} MB are left to others"
        )


def _copy_splits(
    copy: Path, folder: Path, schema: Schema, splits: Sequence[str], stop: Callable[[], bool]
) -> None:
    files = len(schema.parts) + 1
    work = [(split, info) for split in splits for info in schema.split(split).shards]
    for split in splits:
        _part(copy, split).mkdir(mode=0o700)

    def bring(item: tuple[str, ShardInfo]) -> None:
        split, info = item
        _copy_shard(folder / split, _part(copy, split), info, files, stop)

    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(bring, work):  # the first error takes the shards from the queue
            pass
    for split in splits:
        _part(copy, split).rename(copy / split)
    sync_folder(copy)
    schema.write(copy)


def _part(copy: Path, split: str) -> Path:
    return copy / f".{split}.part"


def _copy_shard(
    folder: Path, target: Path, info: ShardInfo, files: int, stop: Callable[[], bool]
) -> None:
    """Copy a shard and its index, and compare every record; a second time where one differs.

    Raises:
        DatasetError: the second copy is damaged too, or the shared files cannot be read.
        StorageError, NotWritable: the disk refused, or somebody asked to stop.
    """
    for last in (False, True):
        for name in (f"{info.name}.index.npy", f"{info.name}.tar"):
            _copy_file(folder / name, target / name, stop)
        try:
            _compare(Shard(target, info, files), stop)
            return
        except DatasetError as error:
            if last:
                raise DatasetError(
                    f"{folder / info.name}.tar was copied twice, and differs: {error}"
                ) from None


def _copy_file(source: Path, target: Path, stop: Callable[[], bool]) -> None:
    try:
        original = os.open(source, os.O_RDONLY)
    except OSError as error:
        raise DatasetError(f"cannot open {source}: {error.strerror}") from None
    try:
        with replacing(target) as file:
            while block := _read_block(original, source):
                _go_on_unless(stop)
                file.write(block)
    finally:
        os.close(original)
    _forget_cached(target)


def _read_block(descriptor: int, source: Path) -> bytes:
    try:
        return os.read(descriptor, _COPY_BYTES)
    except OSError as error:
        raise DatasetError(f"cannot read {source}: {error.strerror}") from None


def _forget_cached(path: Path) -> None:
    """Let the next reader see what the disk holds, not what was meant to go there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _compare(shard: Shard, stop: Callable[[], bool]) -> None:
    for row in range(len(shard.index)):
        _go_on_unless(stop)
        shard.read(row)
