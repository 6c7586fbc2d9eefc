"""The folder of runs: may it be written, do renames and locks hold, is it fast enough.

What is enough follows from what a run does; docs/performance.md has the figures.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from agrivision.doctor.disks import kind, nearest, own_folder
from agrivision.doctor.finding import Finding, Topic
from agrivision.doctor.speed import safe_write_seconds, small_files, write_rate
from agrivision.errors import AgrivisionError
from agrivision.locks import FileLock

CHECKPOINT = 497e6  # bytes of a UNet with 64 base channels, AdamW and an average of the weights

_MB, _GB = 1e6, 1e9
_KEPT = 5  # checkpoints at once: the last three, the best, and the one that is being written
_SAVE_SECONDS = 15.0  # half of what Slurm leaves after SIGTERM
_LONGEST_SAVE = 90.0  # half of the warning before the end of a job
_SMALL_FILES, _FEW_FILES = 100, 10  # a second; a save makes a dozen
_SAFE_SECONDS, _SLOW_SAFE = 0.1, 1.0
_INODES = 10_000
_SKEW, _FAR_SKEW = 5.0, 300.0  # seconds; munge refuses what is five minutes off
_RENAMES = 100


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
    yield from kind(topic, place, shared=shared)
    try:
        with own_folder(place) as own:
            free = yield from room(topic, place)
            rate = yield from _writing(topic, own, free)
            yield from _promises(topic, own)
            return rate
    except (OSError, AgrivisionError) as error:
        yield _refused(topic, place, error)
        return None


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
