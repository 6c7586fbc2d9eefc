"""Rows of numbers as JSON lines, and how a resumed run keeps each step in them exactly once."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from agrivision.json_values import parse
from agrivision.monitor.appended import Appended, close_after
from agrivision.reading import open_plain
from agrivision.storage import replacing, storage_error

_COPY_BYTES = 1 << 20


class MetricsLog:
    """Appends rows to a JSON-lines file: `metrics.jsonl`, `log/samples-RANK.jsonl`.

    Each row leaves the process with one unbuffered write, so that a killed process loses nothing and
    tears at most the last row. A row that the disk refuses is kept and written later (see `Appended`).
    Whoever resumes calls `keep_steps` before opening the file.
    """

    def __init__(self, path: Path) -> None:
        """Open `path` for appending; its folder must exist.

        Raises:
            StorageError, NotWritable: the disk refused.
        """
        self._file = Appended(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        close_after(self._file, error)

    def append(self, row: Mapping[str, object]) -> None:
        """Write one row, now or as soon as the disk takes it.

        Args:
            row: `step` and anything else JSON knows, NumPy's scalars too; what is not finite becomes
                null, because JSON has no NaN.

        Raises:
            StorageError, NotWritable: the disk has refused for so long that memory runs out.
        """
        line = json.dumps(_strict(dict(row)), allow_nan=False, ensure_ascii=False)
        self._file.append(f"{line}\n".encode())

    def flush(self) -> None:
        """Bring the rows onto the disk, where they survive a power cut.

        Raises:
            StorageError, NotWritable: the disk refused; the next call tries again.
        """
        self._file.flush()

    def close(self) -> None:
        """Flush and close the file.

        Raises:
            StorageError, NotWritable: the disk refused.
        """
        self._file.close()


def _strict(value: Any) -> Any:
    """The same value as strict JSON can hold it."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    return value


def keep_steps(path: Path, last_step: int) -> int:
    """Drop the rows after a step, and rows that a kill left torn, from a JSON-lines file.

    The file is streamed, and not written at all where nothing is to be dropped.

    Args:
        path: the file; it need not exist.
        last_step: rows with a greater `step` go.

    Returns:
        How many rows went.

    Raises:
        StorageError, NotWritable: the disk refused; the file is then as it was.
    """
    try:
        start = _first_to_drop(path, last_step)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise storage_error(path, error) from error
    return 0 if start is None else _drop(path, last_step, start)


def _first_to_drop(path: Path, last_step: int) -> int | None:
    """Where in the file the first row to drop begins, in bytes; None where there is none."""
    position = 0
    with open_plain(path) as file:
        for line in file:
            if not _stays(line, last_step):
                return position
            position += len(line)
    return None


def _drop(path: Path, last_step: int, start: int) -> int:
    dropped = 0
    with path.open("rb") as old, replacing(path) as new:
        _copy(old, new, start)
        for line in old:
            if _stays(line, last_step):
                new.write(line)
            else:
                dropped += 1
    return dropped


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    """Copy the next `size` bytes."""
    whole, rest = divmod(size, _COPY_BYTES)
    for _ in range(whole):
        target.write(source.read(_COPY_BYTES))
    target.write(source.read(rest))


def _stays(line: bytes, last_step: int) -> bool:
    """Whether this is a whole row with a step up to `last_step`."""
    if not line.endswith(b"\n"):
        return False
    try:
        row = parse(line)
    except ValueError:
        return False
    step = row.get("step") if isinstance(row, dict) else None
    return type(step) is int and step <= last_step
