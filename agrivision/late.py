"""Views of a shared folder that are late: what another node has just written is not there yet.

A client of NFS remembers what a folder holds, and what it does not hold, for up to a minute. So rank 0
decides what there is, and the other ranks, which know that it must come, wait for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from agrivision.phase import moved

SECONDS = 75.0  # NFS's acdirmax is 60
_POLL_SECONDS = 0.5

_T = TypeVar("_T")


def await_seen(look: Callable[[], _T], passes: Callable[[Exception], bool], seconds: float) -> _T:
    """What a look gives, repeated while it fails, for as long as a view may be late.

    Args:
        look: at what must be there.
        passes: whether an error may be that of a late view.
        seconds: to wait at most.

    Raises:
        Whatever the last look raised.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            return look()
        except Exception as error:
            if not passes(error) or time.monotonic() >= end:
                raise
        moved()
        time.sleep(_POLL_SECONDS)


def is_late(error: Exception) -> bool:
    """Whether it may come of a late view: what is there is missing, or cannot be told from a file."""
    return isinstance(error.__cause__ or error, FileNotFoundError | FileExistsError)


def refresh(folder: Path) -> None:
    """Let this node ask the server what a folder holds; on a local disk it does nothing of use.

    A client that changes a folder itself gives up what it remembers of it.
    """
    mark = folder / f".look.{os.getpid()}.part"
    with suppress(OSError):
        mark.touch()
        mark.unlink()
