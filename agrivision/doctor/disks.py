"""The folders of runs and data: may they be written, do renames and locks hold, are they fast enough.

What is enough follows from what a run does; docs/performance.md has the figures.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from agrivision.data.schema import FILE_NAME, Schema
from agrivision.data.shards import Scratch, SplitReader
from agrivision.data.staging import automatic_place, file_system
from agrivision.doctor.finding import Finding, Topic
from agrivision.doctor.speed import (
    forget,
    reading_rate,
    safe_write_seconds,
    sequential_rate,
    small_files,
    write_rate,
)
from agrivision.errors import AgrivisionError, DatasetError
from agrivision.locks import FileLock
from agrivision.storage import make_private

CHECKPOINT = 497e6  # bytes of a UNet with 64 base channels, AdamW and an average of the weights

_MB, _GB = 1e6, 1e9
_KEPT = 5  # checkpoints at once: the last three, the best, and the one that is being written
_SAVE_SECONDS, _LONGEST_SAVE = (
    15.0,
    90.0,
)  # half of what Slurm leaves after SIGTERM; half of the warning
_SMALL_FILES, _FEW_FILES = 100, 10  # a second; a save makes a dozen
_SAFE_SECONDS, _SLOW_SAFE = 0.1, 1.0
_INODES = 10_000
_SKEW, _FAR_SKEW = 5.0, 300.0  # seconds; munge refuses what is five minutes off
# One GPU trains 340 images of 512 x 512 a second (a UNet of 64 base channels, 40 % of 989 TFLOP/s).
_IMAGES, _SIDE = 340.0, 512
_WAITING = 10  # a GPU that waits for nine tenths of its images is not worth having
_FILES_OF_TILE = 13  # of Agriculture-Vision: two images, nine masks or ten, a boundary
_PER_FILE = 1000.0
_MOST_FILES, _MOST_TILES, _MOST_SHARDS = 2000, 4000, 64
_RENAMES = 100
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs", "ramfs"}
_MEMORY = {"tmpfs", "ramfs"}
_MOUNTS = Path("/proc/self/mountinfo")


def examine_run_folder(folder: Path, *, shared: bool) -> Generator[Finding, None, float | None]:
    """Whether runs can live in a folder.

    Args:
        folder: of a run, or of runs; it need not be there yet.
        shared: whether there are other nodes that should see it.

    Returns:
        Bytes that it takes in a second; None where that is not known.
    """
    topic = Topic(f"Run folder {folder}")
    place = nearest(folder)
    yield from _kind(topic, place, shared=shared)
    try:
        with own_folder(place) as own:
            free = yield from room(topic, place)
            rate = yield from _writing(topic, own, free)
            yield from _promises(topic, own)
            return rate
    except (OSError, AgrivisionError) as error:
        yield _refused(topic, place, error)
        return None


def nearest(folder: Path) -> Path:
    """A folder, or where it is not there yet the one in which it will be made."""
    folder = folder.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


@contextmanager
def own_folder(place: Path) -> Iterator[Path]:
    """A new folder of one's own, which is gone afterwards.

    Raises:
        OSError: it cannot be made.
        Untrusted: it cannot be closed to others.
    """
    folder = Path(tempfile.mkdtemp(prefix=".agrivision-doctor-", dir=place))
    try:
        make_private(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refused(topic: Topic, place: Path, error: Exception) -> Finding:
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.EROFS:
        return topic.bad(f"{place} is read-only", "choose another folder, or ask why it is mounted so")
    if code in (errno.EACCES, errno.EPERM):
        return topic.bad(
            f"{place} may not be written by you", "choose another folder, or ask its owner"
        )
    if code in (errno.ENOSPC, errno.EDQUOT):
        return topic.bad(f"{place} is full: {error}", "make room, or ask for a larger quota")
    return topic.bad(f"{place} cannot be written: {error}", "choose another folder")


def _kind(topic: Topic, place: Path, *, shared: bool) -> Iterator[Finding]:
    kind = file_system(place.resolve(), _MOUNTS.read_text(errors="surrogateescape"))
    if kind in _MEMORY:
        yield topic.careful(
            f"{kind}: memory, not a disk", "what is here is lost when the node restarts"
        )
    elif shared and kind in _LOCAL:
        yield topic.careful(
            f"{kind}: a disk of this machine alone, as it seems",
            "jobs on other nodes may not see it: choose a shared folder; --node tries it",
        )
    else:
        yield topic.good(f"file system {kind or 'of unknown type'}")


def room(topic: Topic, place: Path) -> Generator[Finding, None, int]:
    """Whether there is room for a run's checkpoints.

    Args:
        topic: of the finding.
        place: folder that is there.

    Returns:
        Bytes that are free.
    """
    found = os.statvfs(place)
    free = found.f_bavail * found.f_frsize
    yield topic.graded(
        free,
        2 * _KEPT * CHECKPOINT,
        2 * CHECKPOINT,
        f"{free / _GB:.1f} GB free",
        f"a large run keeps {_KEPT} checkpoints of {CHECKPOINT / _GB:.1f} GB: make room",
    )
    if found.f_files and found.f_favail < _INODES:
        yield topic.graded(
            found.f_favail,
            _INODES,
            _INODES / 10,
            f"room for {found.f_favail} more files",
            "remove small files, or ask for more (inodes): a run needs some hundreds",
        )
    return free


def _writing(topic: Topic, own: Path, free: int) -> Generator[Finding, None, float | None]:
    rate = write_rate(own, free)
    if not rate.amount:
        yield topic.bad("no room to measure how fast it is written", "make room")
        return None
    seconds = CHECKPOINT / rate.per_second
    yield topic.graded(
        -seconds,
        -_SAVE_SECONDS,
        -_LONGEST_SAVE,
        f"written and fsynced at {rate.per_second / _MB:.0f} MB/s: {seconds:.1f} s a large checkpoint",
        "a save before the end of a job may not fit: a faster folder, or smaller networks",
    )
    files = small_files(own)
    yield topic.graded(
        files.per_second,
        _SMALL_FILES,
        _FEW_FILES,
        f"{files.per_second:.0f} small files a second, made, looked up, read and removed",
        "its server is slow or busy: saves and resumes take seconds longer each",
    )
    safe = safe_write_seconds(own)
    yield topic.graded(
        -safe,
        -_SAFE_SECONDS,
        -_SLOW_SAFE,
        f"{1000 * safe:.0f} ms for a small file with fsync and rename",
        "each save takes a dozen of these: save less often, or choose another folder",
    )
    return rate.per_second


def _promises(topic: Topic, own: Path) -> Iterator[Finding]:
    """What saving and resuming rely on."""
    if rename_is_atomic(own):
        yield topic.good("renames replace a file at once")
    else:
        yield topic.bad(
            "a file that is replaced by a rename is missing or torn for a moment",
            "a killed run may lose its checkpoint: choose another file system",
        )
    yield _locks(topic, own)
    yield clock(topic, own, time.time)


def rename_is_atomic(own: Path, replace: Callable[[Path, Path], object] = Path.replace) -> bool:
    """Whether a reader always finds a whole file under a name that is replaced again and again.

    Args:
        own: folder.
        replace: moves its first path to its second.
    """
    path, beside = own / "renamed", own / "beside"
    contents = [bytes([letter]) * 65_536 for letter in b"ab"]
    path.write_bytes(contents[0])
    over = threading.Event()
    torn: list[bool] = []

    def look() -> None:
        while not over.is_set() and not torn:
            try:
                content = path.read_bytes()
            except OSError:
                torn.append(True)
            else:
                torn.extend([True] if content not in contents else [])

    reader = threading.Thread(target=look, name="reader of renamed files")
    reader.start()
    try:
        for number in range(_RENAMES):
            beside.write_bytes(contents[number % 2])
            replace(beside, path)
    finally:
        over.set()
        reader.join()
    return not torn


def _locks(topic: Topic, own: Path) -> Finding:
    with FileLock(own / "lock") as first, FileLock(own / "lock") as second:
        taken = first.take(alone=True)
        again = second.take(alone=True)
    if not first.known:
        return topic.careful(
            "no locks (flock)", "never start two jobs on one run: nothing would stop the second"
        )
    if not taken or again:
        return topic.careful(
            "locks (flock) that two can hold",
            "never start two jobs on one run: nothing would stop the second",
        )
    return topic.good("locks (flock) hold")


def clock(topic: Topic, own: Path, now: Callable[[], float]) -> Finding:
    """Whether the file system's clock is this machine's.

    Args:
        topic: of the finding.
        own: folder.
        now: this machine's time.
    """
    path = own / "clock"
    path.write_bytes(b"now")
    skew = path.stat().st_mtime - now()
    return topic.graded(
        -abs(skew),
        -_SKEW,
        -_FAR_SKEW,
        f"its clock and this machine's are {abs(skew):.1f} s apart",
        "tell the admin that a clock is off (NTP): times in logs and tables mislead",
    )


def examine_data(folder: Path, *, gpus: int, shared: bool) -> Iterator[Finding]:
    """Whether a data set, or a folder of small files, is read fast enough.

    Args:
        folder: a prepared data set, or what is to become one.
        gpus: that it should feed; at least one is taken.
        shared: whether there are other nodes that should see it.
    """
    topic = Topic(f"Data folder {folder}")
    if not folder.is_dir():
        yield topic.bad("there is no such folder", "give a prepared data set, or a folder with images")
        return
    yield from _kind(topic, folder, shared=shared)
    try:
        if (folder / FILE_NAME).is_file():
            yield from _shards(topic, folder, max(1, gpus))
        else:
            yield from _files(topic, folder)
    except DatasetError as error:
        yield topic.bad(str(error), f"agrivision inspect {folder} --verify says what is whole")
    except OSError as error:
        yield topic.bad(
            f"cannot be read: {error}", "look at its permissions, and whether its disk is there"
        )
    yield _staging(topic, folder)


def _shards(topic: Topic, folder: Path, gpus: int) -> Iterator[Finding]:
    schema = Schema.read(folder)
    name = "train" if "train" in schema.splits else next(iter(schema.splits))
    split = schema.split(name)
    paths = [folder / name / f"{shard.name}.tar" for shard in split.shards]
    rate = sequential_rate(paths)
    yield topic.good(f"split {name} is read at {rate.per_second / _MB:.0f} MB/s, shard after shard")
    reader = SplitReader(folder, schema, name)
    generator = np.random.default_rng()
    # Neighbours share a shard, so that a large split does not have to be forgotten as a whole.
    some = generator.permutation(len(paths))[:_MOST_SHARDS]
    ends = np.cumsum([shard.tiles for shard in split.shards])
    tiles = np.concatenate(
        [np.arange(ends[at] - split.shards[at].tiles, ends[at]) for at in map(int, some)]
    )
    for at in map(int, some):
        forget(paths[at])
    wanted = generator.permutation(tiles)[:_MOST_TILES].tolist()
    found, read = reading_rate(wanted, lambda tile: sum(map(len, reader.read(tile, (), Scratch()))))
    tiles_per_second = read / max(found.seconds, 1e-9)
    needed = gpus * _IMAGES * (_SIDE / schema.tile) ** 2
    yield topic.graded(
        tiles_per_second,
        needed,
        needed / _WAITING,
        f"{tiles_per_second:.0f} tiles a second at random places, {found.per_second / _MB:.0f} MB/s;"
        f" {gpus} fast {'GPU takes' if gpus == 1 else 'GPUs take'} up to {needed:.0f}",
        "copy it to the node's disk (data.stage), or use data.shuffle_window; processors need far less",
    )


def _files(topic: Topic, folder: Path) -> Iterator[Finding]:
    paths = list(_some_files(folder))
    if not paths:
        yield topic.careful("no data set and no files", "prepare a data set, or name another folder")
        return
    for path in paths:
        forget(path)
    order = np.random.default_rng().permutation(len(paths)).tolist()
    found, read = reading_rate(order, lambda at: len(paths[at].read_bytes()))
    rate = read / max(found.seconds, 1e-9)
    yield topic.graded(
        rate,
        _PER_FILE,
        0,
        f"{rate:.0f} files a second, {found.per_second / _MB:.0f} MB/s: prepare would read"
        f" {rate / _FILES_OF_TILE:.0f} tiles of {_FILES_OF_TILE} files each a second",
        "small files are slow here: copy them to a disk of the node in one archive, and prepare there",
    )


def _some_files(folder: Path) -> Iterator[Path]:
    found = 0
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            if path.is_file():
                yield path
                found += 1
                if found == _MOST_FILES:
                    return


def _staging(topic: Topic, folder: Path) -> Finding:
    try:
        place = Path(automatic_place(folder))
        free = shutil.disk_usage(place).free
    except AgrivisionError as refusal:
        return topic.good(f"data.stage: auto would not copy it here: {refusal}")
    except OSError as error:
        return topic.careful(
            f"data.stage: auto would copy it to a folder that cannot be used: {error}",
            "unset SLURM_TMPDIR or TMPDIR, or name a path",
        )
    return topic.good(f"data.stage: auto would copy it to {place}, where {free / _GB:.1f} GB are free")
