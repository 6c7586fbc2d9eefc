"""What a file from elsewhere would do if anybody unpickled it."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self._mark),)


@contextmanager
def watched(mark: Path) -> Iterator[Path]:
    """What a payload leaves; the block ends with a look whether it is there."""
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.is_dir()  # it does what it says
    mark.rmdir()
    yield mark
    assert not mark.exists()


def as_torch(mark: Path) -> bytes:
    """What `torch.save` makes of it."""
    buffer = io.BytesIO()
    torch.save({"weight": Payload(mark)}, buffer)
    return buffer.getvalue()
