"""Other users of the machine, for tests: only root can be them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

STRANGER = 54_321  # a user that no machine knows

as_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can give a file away, or act as somebody else"
)


def give_away(path: Path) -> None:
    """Make a file, a folder or a link somebody else's."""
    os.chown(path, STRANGER, STRANGER, follow_symlinks=False)


def as_stranger(act: Callable[[], object]) -> str:
    """Do something as somebody else, in a process of its own.

    Returns:
        The name of the error that it met, or an empty text.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            os.setgroups([])
            os.setresgid(STRANGER, STRANGER, STRANGER)
            os.setresuid(STRANGER, STRANGER, STRANGER)
            act()
        except BaseException as error:
            os.write(writing, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as said:
        word = said.read().decode()
    os.waitpid(child, 0)
    return word
