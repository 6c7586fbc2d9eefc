"""Whose a file is: what is obeyed here belongs to the user who runs this, or to root.

On a machine that others use, whoever may write into a run directory decides which job is cancelled and
which code a requeued job runs. Root may do so anyway. A symbolic link counts as what it leads to, and
must have a good owner itself: in an open folder anybody can put one where a name is expected.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
from contextlib import suppress
from pathlib import Path

from agrivision.errors import Untrusted
from agrivision.reading import open_plain

_ROOT = 0
_OTHERS_MAY_WRITE = 0o022


def require_own(path: Path) -> None:
    """Refuse a path that somebody else made or may write; one that is missing is nobody's.

    Raises:
        Untrusted: it is such a one; the line says whose, and what to do.
        OSError: it cannot be looked at.
    """
    try:
        link, status = path.lstat(), path.stat()
    except FileNotFoundError:
        return
    if stat.S_ISLNK(link.st_mode):
        _require_owner(path, link)
    _require(path, status)


def require_owner(path: Path) -> None:
    """Refuse a path that somebody else made, whoever may write it; one that is missing is nobody's.

    A link counts itself, whatever it leads to.

    Raises:
        Untrusted: it is such a one.
        OSError: it cannot be looked at.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        _require_owner(path, path.lstat())


def require_own_tree(folder: Path, depth: int) -> None:
    """Refuse a folder, and what is in it, that somebody else made; what is missing is nobody's.

    Args:
        folder: as `require_owner` takes it.
        depth: levels of folders that are looked into, the folder itself included.

    Raises:
        Untrusted: it, or something in it, is such a one.
        OSError: something cannot be looked at.
    """
    require_owner(folder)
    with suppress(FileNotFoundError, NotADirectoryError):  # removed or renamed by who is at work there
        require_own_entries(folder, depth)


def open_own(path: Path) -> int:
    """Open a file of one's own to read and to append, made for its owner alone where missing.

    In a folder that others write, somebody may have put a link there, or a file of theirs. Who may
    write it is not asked: on some disks everybody may write everything.

    Returns:
        The descriptor.

    Raises:
        Untrusted: it is a link, or somebody else made it.
        OSError: it cannot be opened.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise Untrusted(f"{path} is a link where a file belongs: remove it") from None
    try:
        _require_owner(path, os.fstat(descriptor))
    except Untrusted:
        os.close(descriptor)
        raise
    return descriptor


def read_own(path: Path) -> bytes:
    """The content of a file that nobody else made or may write.

    Raises:
        Untrusted: somebody did, or may.
        OSError: it cannot be read, or is no plain file.
    """
    link = path.lstat()
    if stat.S_ISLNK(link.st_mode):
        _require_owner(path, link)
    with open_plain(path) as file:
        _require(path, os.fstat(file.fileno()))  # of what is read, whatever the name leads to by now
        return file.read()


def require_own_entries(folder: Path, depth: int = 1) -> None:
    """Refuse a folder with an entry that somebody else made: of when it was open, or by a copy.

    Args:
        folder: itself this user's; so who may write an entry does not matter, nobody else gets there.
        depth: levels of folders that are looked into.

    Raises:
        Untrusted: there is such an entry.
        OSError: one cannot be looked at.
    """
    for path in list(folder.iterdir()):
        with suppress(FileNotFoundError):  # removed meanwhile by whoever is at work there
            status = path.lstat()
            _require_owner(path, status)
            if depth > 1 and stat.S_ISDIR(status.st_mode):
                require_own_entries(path, depth - 1)


def _require(path: Path, status: os.stat_result) -> None:
    _require_owner(path, status)
    if status.st_mode & _OTHERS_MAY_WRITE:
        raise Untrusted(
            f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):o}): see that nobody"
            f" has, and then chmod go-w {path}"
        )


def _require_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (os.geteuid(), _ROOT):
        raise Untrusted(
            f"{path} belongs to {_name(status.st_uid)}, and this is {_name(os.geteuid())}: choose"
            f" another, make a copy of your own, or have it given to you (chown)"
        )


def _name(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (user {uid})"
    except KeyError:
        return f"user {uid}"
