"""Folders on disks: which one is there, on what kind of disk, and one of one's own to try things in."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agrivision.data.staging import file_system
from agrivision.doctor.finding import Finding, Topic
from agrivision.storage import make_private

_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs", "ramfs"}
_MEMORY = {"tmpfs", "ramfs"}
_MOUNTS = Path("/proc/self/mountinfo")


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


def kind(topic: Topic, place: Path, *, shared: bool) -> Iterator[Finding]:
    """What kind of file system a folder is on, and whether other nodes can see it.

    Args:
        topic: of the finding.
        place: folder that is there.
        shared: whether there are other nodes that should see it.
    """
    name = file_system(place.resolve(), _MOUNTS.read_text(errors="surrogateescape"))
    if name in _MEMORY:
        yield topic.careful(
            f"{name}: memory, not a disk", "what is here is lost when the node restarts"
        )
    elif shared and name in _LOCAL:
        yield topic.careful(
            f"{name}: a disk of this machine alone, as it seems",
            "jobs on other nodes may not see it: choose a shared folder; --node tries it",
        )
    else:
        yield topic.good(f"file system {name or 'of unknown type'}")
