"""Finished blocks of a scene, in files or in memory, until the map is put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zstandard
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from agrivision.errors import StorageError
from agrivision.inference.journal import make_folder
from agrivision.storage import write_atomically

_LEVEL = 1


class Store(Protocol):
    """Arrays by block and name."""

    def has(self, number: int) -> bool:
        """Whether a block is finished, as far as can be told at a glance."""

    def put(self, number: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep what a finished block gave."""

    def get(self, number: int, name: str, dtype: str, shape: Sequence[int]) -> NDArray[Any]:
        """An array of a finished block."""


class BlockFolder:
    """Blocks in files that appear whole, so that any process may go on where another was killed.

    Args:
        folder: made with the first block.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, number: int) -> bool:
        """See `Store`."""
        return self._path(number).is_file()

    def is_whole(self, number: int) -> bool:
        """Whether a block is finished and undamaged: all of it is read."""
        try:
            with safe_open(self._path(number), framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    _check(file.get_tensor(name).tobytes())
        except (OSError, SafetensorError, zstandard.ZstdError):
            return False
        return True

    def put(self, number: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """See `Store`.

        Raises:
            StorageError, NotWritable: the disk refused.
        """
        make_folder(self.folder)  # another process may have put the map together, and tidied up
        compress = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress
        packed = {
            name: np.frombuffer(compress(np.ascontiguousarray(array).data), np.uint8)
            for name, array in arrays.items()
        }
        write_atomically(self._path(number), save(packed))

    def get(self, number: int, name: str, dtype: str, shape: Sequence[int]) -> NDArray[Any]:
        """See `Store`.

        Raises:
            StorageError: the file is damaged; it is removed, so that the same command makes it anew.
        """
        path, size = self._path(number), int(np.prod(shape)) * np.dtype(dtype).itemsize
        try:
            with safe_open(path, framework="numpy") as file:
                packed = file.get_tensor(name)
            content = zstandard.ZstdDecompressor().decompress(packed.tobytes(), max_output_size=size)
            return np.frombuffer(content, dtype).reshape(shape)
        except (OSError, SafetensorError, zstandard.ZstdError, ValueError) as error:
            with suppress(OSError):
                path.unlink()
            raise StorageError(
                f"{path} is damaged and was removed: the same command makes it anew ({error})"
            ) from None

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.block"


def _check(packed: bytes) -> None:
    """Read compressed bytes to their end, where their checksum stands."""
    for _ in zstandard.ZstdDecompressor().read_to_iter(packed):
        pass


class Memory:
    """Blocks in memory."""

    def __init__(self) -> None:
        self._blocks: dict[int, Mapping[str, NDArray[Any]]] = {}

    def has(self, number: int) -> bool:
        """See `Store`."""
        return number in self._blocks

    def put(self, number: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """See `Store`."""
        self._blocks[number] = arrays

    def get(self, number: int, name: str, dtype: str, shape: Sequence[int]) -> NDArray[Any]:  # noqa: ARG002
        """See `Store`."""
        return self._blocks[number][name]
