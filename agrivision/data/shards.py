"""The shard format: a plain tar file in the WebDataset convention, and an index beside it.

`SPLIT/00000.tar` holds for each tile its image files and `KEY.labels.zst`, one after the other.
`SPLIT/00000.index.npy` is a structured numpy array, one row a tile: key, field, where its files
begin and how long they are, an XXH3-64 checksum over their bytes, and the tile's valid pixels by
class. Any tile is one `pread` away, and every read compares the checksum.

Records are read with `pread` rather than through a memory map: the copy costs little beside decoding,
and a file that is truncated while it is read gives an error instead of killing the process (SIGBUS).
"""

from __future__ import annotations

import io
import os
import tarfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from agrivision.data.schema import Schema, ShardInfo
from agrivision.errors import DatasetError
from agrivision.storage import replacing

LABELS = "labels.zst"
_BLOCK = tarfile.BLOCKSIZE
_OPEN_FILES = 64  # a limit of 1,024 descriptors a process is common on clusters


@dataclass(frozen=True, kw_only=True)
class Record:
    """One tile as it goes into a shard.

    Attributes:
        key: unique in the data set; letters, digits, `_` and `-`, since WebDataset cuts at a dot.
        field: the group that splits keep together: the field, or the scene.
        files: content by extension, image files first and `labels.zst` last.
        pixels: valid pixels by class id, shape (classes,).
    """

    key: str
    field: str
    files: Mapping[str, bytes]
    pixels: Sequence[int]


def write_shard(folder: Path, name: str, records: Sequence[Record]) -> ShardInfo:
    """Write `NAME.tar` and `NAME.index.npy`; the same records always give the same bytes.

    Args:
        folder: the split's folder; it exists.
        name: file name without suffix.
        records: in order, at least one, all with the same extensions and number of classes.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    offsets: list[list[int]] = []
    tar_path = folder / f"{name}.tar"
    with replacing(tar_path) as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for record in records:
                offsets.append([])
                for extension, content in record.files.items():
                    member = tarfile.TarInfo(f"{record.key}.{extension}")  # mtime, uid, gid: 0
                    member.size = len(content)
                    offsets[-1].append(tar.offset + _BLOCK)
                    tar.addfile(member, io.BytesIO(content))
        size = file.tell()
    index = np.array(
        [_row(record, starts) for record, starts in zip(records, offsets, strict=True)],
        dtype=_index_type(records),
    )
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    with replacing(folder / f"{name}.index.npy") as file:
        file.write(buffer.getbuffer())
    return ShardInfo(
        name=name,
        tiles=len(records),
        bytes=size,
        index=xxhash.xxh3_128_hexdigest(buffer.getbuffer()),
    )


def _row(record: Record, starts: list[int]) -> tuple[Any, ...]:
    checksum = xxhash.xxh3_64()
    for content in record.files.values():
        checksum.update(content)
    sizes = [len(content) for content in record.files.values()]
    key, field = record.key.encode(), record.field.encode()
    return key, field, checksum.intdigest(), starts, sizes, record.pixels


def _index_type(records: Sequence[Record]) -> np.dtype[np.void]:
    files, classes = len(records[0].files), len(records[0].pixels)
    return np.dtype(
        [
            ("key", f"S{max(len(record.key.encode()) for record in records)}"),
            ("field", f"S{max(len(record.field.encode()) for record in records) or 1}"),
            ("checksum", "<u8"),
            ("offsets", "<u8", (files,)),
            ("sizes", "<u4", (files,)),
            ("pixels", "<u4", (classes,)),
        ]
    )


class Shard:
    """A shard opened for reading; safe to read from several threads.

    Args:
        folder: the split's folder.
        info: the shard's entry in dataset.json.
        files: number of files of each record.

    Raises:
        DatasetError: a file is missing, or not as long or not the one that dataset.json knows.
    """

    def __init__(self, folder: Path, info: ShardInfo, files: int) -> None:
        self.path = folder / f"{info.name}.tar"
        index_path = folder / f"{info.name}.index.npy"
        self.index = _read_index(index_path, info, files)
        try:
            # Unbuffered, only for its descriptor, which is closed with the last reference.
            self._file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise DatasetError(f"cannot open {self.path}: {error.strerror}") from None
        size = os.fstat(self._file.fileno()).st_size
        if size != info.bytes:
            raise DatasetError(f"{self.path} has {size} bytes instead of {info.bytes}: copy it again")

    def key(self, row: int) -> str:
        """Key of the tile in this row."""
        return bytes(self.index["key"][row]).decode()

    def read(self, row: int) -> list[memoryview]:
        """The files of one tile, image files first and labels last.

        Raises:
            DatasetError: the file cannot be read, ends early or the checksum differs; the line names
                shard and tile.
        """
        entry = self.index[row]
        offsets, sizes = entry["offsets"].tolist(), entry["sizes"].tolist()
        start, end = offsets[0], offsets[-1] + sizes[-1]
        try:
            content = memoryview(os.pread(self._file.fileno(), end - start, start))
        except OSError as error:  # a bad disk, a file that went away on its server
            raise DatasetError(
                f"cannot read tile {self.key(row)} in {self.path}: {error.strerror}"
            ) from None
        if len(content) != end - start:
            raise DatasetError(f"{self.path} ends inside of tile {self.key(row)}: copy it again")
        files = [
            content[offset - start : offset - start + size]
            for offset, size in zip(offsets, sizes, strict=True)
        ]
        checksum = xxhash.xxh3_64()
        for file in files:
            checksum.update(file)
        if checksum.intdigest() != int(entry["checksum"]):
            raise DatasetError(
                f"tile {self.key(row)} in {self.path} is damaged: its checksum differs; copy it again"
            )
        return files


def _read_index(path: Path, info: ShardInfo, files: int) -> NDArray[np.void]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"cannot open {path}: {error.strerror}") from None
    if xxhash.xxh3_128_hexdigest(content) != info.index:
        raise DatasetError(f"{path} is damaged: its checksum differs; copy it again")
    index: NDArray[np.void] = np.load(io.BytesIO(content), allow_pickle=False)
    if len(index) != info.tiles or index["offsets"].shape[1:] != (files,):
        raise DatasetError(f"{path} does not describe {info.tiles} tiles of {files} files")
    return index


class SplitReader:
    """All tiles of a split by number, 0 … len - 1; shards are opened when first needed.

    Args:
        folder: the data set's folder.
        schema: its dataset.json.
        name: the split.

    Raises:
        DatasetError: there is no such split, or it is empty.
    """

    def __init__(self, folder: Path, schema: Schema, name: str) -> None:
        self.schema, self.name = schema, name
        self.split = schema.split(name)
        self._folder = folder / name
        self._lock = threading.Lock()
        self._open: dict[int, Shard] = {}

    def __len__(self) -> int:
        return self.split.tiles

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([shard.tiles for shard in self.split.shards], dtype=np.int64)

    def locate(self, tile: int) -> tuple[Shard, int]:
        """The shard that holds a tile, and the tile's row in it.

        Raises:
            DatasetError: the shard cannot be opened.
        """
        number = int(np.searchsorted(self._ends, tile, side="right"))
        info = self.split.shards[number]
        return self._shard(number), tile - int(self._ends[number]) + info.tiles

    def _shard(self, number: int) -> Shard:
        with self._lock:
            shard = self._open.pop(number, None)
            if shard is None:
                files = len(self.schema.parts) + 1
                shard = Shard(self._folder, self.split.shards[number], files)
                if len(self._open) >= _OPEN_FILES:
                    # The least recently used; a thread that still reads it keeps it open.
                    del self._open[next(iter(self._open))]
            self._open[number] = shard
            return shard

    def key(self, tile: int) -> str:
        """Key of a tile."""
        shard, row = self.locate(tile)
        return shard.key(row)

    def read(self, tile: int) -> list[memoryview]:
        """The files of a tile, image files first and labels last, checksum compared.

        Raises:
            DatasetError: the record is damaged or the shard cannot be read.
        """
        shard, row = self.locate(tile)
        return shard.read(row)

    def shards(self) -> Iterator[Shard]:
        """Every shard in order.

        Raises:
            DatasetError: one cannot be opened.
        """
        for number in range(len(self.split.shards)):
            yield self._shard(number)
