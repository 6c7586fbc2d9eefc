"""The shard format: a plain tar file in the WebDataset convention, and an index beside it.

`SPLIT/00000.tar` holds for each tile its image files and `KEY.labels.zst`, one after the other; the
image files are the source's, or `KEY.image.raw`, the pixels as they are in memory.
`SPLIT/00000.index.npy` is a structured numpy array, one row a tile: key, field, where its files
begin and how long they are, an XXH3-64 checksum over their bytes, the tile's valid pixels by class and
altogether, and of each channel (the bands, then the indices of `agrivision.data.indices` that they
suffice for) the sum and the sum of squares over these. Any tile is one `pread` away, and every read
compares the checksum.

Records are read with `preadv` rather than through a memory map: the copy costs little beside decoding,
and a file that is truncated while it is read gives an error instead of killing the process (SIGBUS).
Uncompressed pixels are read straight to where they are wanted, all else into memory that a thread uses
again and again: fresh memory costs a page fault every 4 KiB.
"""

from __future__ import annotations

import errno
import io
import os
import resource
import tarfile
import threading
import tokenize
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import IO, Any, Generic, NamedTuple, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from agrivision.data.pages import paged
from agrivision.data.schema import Schema, ShardInfo
from agrivision.errors import DatasetError
from agrivision.reading import plain_descriptor
from agrivision.storage import replacing

LABELS = "labels.zst"
# `KEY.labels.zst` must fit into the 100 bytes of a tar header, and so does `KEY.place.json`.
MAX_KEY = 100 - len(f".{LABELS}")
_BLOCK = tarfile.BLOCKSIZE
_INDEX_BYTES = 32 << 20  # of the indexes that a reader keeps; a shard of 128 tiles takes some 25 kB
_MOST_INDEX_BYTES = 1 << 30  # of one index: four million tiles in one shard
_MOST_FIELD = 1 << 10  # bytes of a field's name
_MOST_RECORD_BYTES = 1 << 32  # that a record may take where nobody knows how large its tile is
_MOST_OPEN = 256  # shards that a reader keeps open, where the process may open that many

# numpy parses an array's header with `ast`, which in Python 3.11 fails now and then if two threads do
# it at once (SystemError: AST constructor recursion depth mismatch).
_HEADER = threading.Lock()
_LASTING = {
    errno.EINVAL,  # no plain file
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
}
_IN_KEYS = np.zeros(256, np.bool_)
_IN_KEYS[[*b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"]] = True
_COLUMNS = ("key", "field", "checksum", "offsets", "sizes", "pixels")
_MOMENTS = ("valid", "moments")
_V = TypeVar("_V")


class Refused(DatasetError):
    """The operating system refused to read, for a reason that may pass: a disk, a server, a network."""


def _refusal(line: str, error: OSError) -> DatasetError:
    noun = DatasetError if error.errno in _LASTING else Refused
    return noun(f"{line}: {error.strerror or error}")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One tile as it goes into a shard.

    Attributes:
        key: unique in the data set; letters, digits, `_` and `-`, since WebDataset cuts at a dot.
        field: the group that splits keep together: the field, or the scene.
        files: content by extension, image files first and `labels.zst` last.
        pixels: valid pixels by class id, shape (classes,).
        valid: valid pixels.
        moments: of each channel the sum and the sum of squares over them; empty where nobody asks:
            the index has no such columns then, as those of earlier versions.
    """

    key: str
    field: str
    files: Mapping[str, bytes]
    pixels: Sequence[int]
    valid: int = 0
    moments: Sequence[tuple[float, float]] = ()


def write_shard(folder: Path, name: str, records: Iterable[Record]) -> ShardInfo | None:
    """Write `NAME.tar` and `NAME.index.npy`; the same records always give the same bytes.

    Records are written as they come, and not kept.

    Args:
        folder: the split's folder; it exists.
        name: file name without suffix.
        records: in order, all with the same extensions and number of classes.

    Returns:
        What dataset.json holds of it; None, and no file, where there is no record.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    coming = iter(records)
    first = next(coming, None)
    if first is None:
        return None
    rows: list[tuple[Any, ...]] = []
    tar_path = folder / f"{name}.tar"
    with replacing(tar_path) as file:
        for record in chain([first], coming):
            offsets = []
            for extension, content in record.files.items():
                offsets.append(file.tell() + _BLOCK)
                _write_member(file, f"{record.key}.{extension}", content)
            rows.append(_row(record, offsets))
        size = -(-(file.tell() + 2 * _BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
        file.write(bytes(size - file.tell()))  # at least two empty blocks end a tar file
    index = np.array(rows, dtype=_index_type(rows))
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    with replacing(folder / f"{name}.index.npy") as file:
        file.write(buffer.getbuffer())
    return ShardInfo(
        name=name,
        tiles=len(rows),
        bytes=size,
        index=xxhash.xxh3_128_hexdigest(buffer.getbuffer()),
    )


def member_header(name: str, size: int) -> bytes:
    """What stands before the content of a member of a tar file; TarFile would write the same."""
    member = tarfile.TarInfo(name)  # mtime, uid, gid: 0
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT)


def _write_member(file: IO[bytes], name: str, content: bytes) -> None:
    """As TarFile would, without its copies."""
    file.write(member_header(name, len(content)))
    file.write(content)
    file.write(bytes(-len(content) % _BLOCK))


def _row(record: Record, starts: list[int]) -> tuple[Any, ...]:
    checksum = xxhash.xxh3_64()
    for content in record.files.values():
        checksum.update(content)
    sizes = [len(content) for content in record.files.values()]
    key, field = record.key.encode(), record.field.encode()
    row = (key, field, checksum.intdigest(), starts, sizes, record.pixels)
    return (*row, record.valid, record.moments) if record.moments else row


def _index_type(rows: Sequence[tuple[Any, ...]]) -> np.dtype[np.void]:
    keys, fields, _, offsets, _, pixels, *more = zip(*rows, strict=True)
    widths = max(map(len, keys)), max(map(len, fields)) or 1
    channels = len(more[1][0]) if more else 0
    return _type_of(*widths, files=len(offsets[0]), classes=len(pixels[0]), channels=channels)


def _type_of(key: int, field: int, *, files: int, classes: int, channels: int) -> np.dtype[np.void]:
    """Of an index: bytes of a key and of a field, and how many there are of the others."""
    columns: list[Any] = [
        ("key", f"S{key}"),
        ("field", f"S{field}"),
        ("checksum", "<u8"),
        ("offsets", "<u8", (files,)),
        ("sizes", "<u4", (files,)),
        ("pixels", "<u4", (classes,)),
    ]
    if channels:
        columns += [("valid", "<u4"), ("moments", "<f8", (channels, 2))]
    return np.dtype(columns)


class Scratch:
    """Memory for one thread's reads: what a read left there holds until the next."""

    def __init__(self) -> None:
        self._memory = memoryview(b"")

    def take(self, size: int) -> memoryview:
        """So many bytes, whatever they hold."""
        if size > len(self._memory):
            self._memory = paged(size + size // 4).data
        return self._memory[:size]


class _Opened(NamedTuple):
    """A tar file; its descriptor is closed with the last reference.

    Attributes:
        path: of the file.
        file: unbuffered, only for its descriptor.
    """

    path: Path
    file: IO[bytes]


class Shard:
    """A shard opened for reading; safe to read from several threads.

    Args:
        folder: the split's folder.
        info: the shard's entry in dataset.json.
        files: number of files of each record.
        most: bytes that a record may take.

    Attributes:
        path: of the tar file.
        index: a row for each tile; see the module.

    Raises:
        DatasetError: a file is missing, or not as long or not the one that dataset.json knows, or the
            index is not one of such records.
    """

    def __init__(
        self, folder: Path, info: ShardInfo, files: int, most: int = _MOST_RECORD_BYTES
    ) -> None:
        self.index = _read_index(folder, info, files, most)
        self.path, self._file = _open(folder, info)

    @classmethod
    def of(cls, index: NDArray[np.void], opened: _Opened) -> Shard:
        """A shard whose files were read and opened before."""
        shard = cls.__new__(cls)
        shard.index, (shard.path, shard._file) = index, opened
        return shard

    def key(self, row: int) -> str:
        """Key of the tile in this row."""
        return bytes(self.index["key"][row]).decode()

    @property
    def size(self) -> int:
        """Of the tar file in bytes."""
        return os.fstat(self._file.fileno()).st_size

    def between(self, start: int, stop: int) -> bytes:
        """Some of the tar file, as it is.

        Raises:
            DatasetError: it cannot be read.
        """
        try:
            return os.pread(self._file.fileno(), stop - start, start)
        except OSError as error:
            raise _refusal(f"cannot read {self.path}", error) from None

    def announce(self, row: int) -> None:
        """Let the disk begin to read a tile that is wanted soon; `read` tells what is wrong with it."""
        entry = self.index[row]
        start, end = int(entry["offsets"][0]), int(entry["offsets"][-1] + entry["sizes"][-1])
        with suppress(OSError):
            os.posix_fadvise(self._file.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)

    def read(
        self, row: int, into: Sequence[memoryview | None] = (), scratch: Scratch | None = None
    ) -> list[memoryview]:
        """The files of one tile, image files first and labels last, checksum compared.

        Args:
            row: of the tile.
            into: where files are wanted, in their order and as bytes; None or nothing for anywhere,
                which is also where a file of another size goes.
            scratch: for files that are wanted anywhere; fresh memory if absent.

        Raises:
            DatasetError: the file cannot be read, ends early or the checksum differs; the line names
                shard and tile.
        """
        entry = self.index[row]
        offsets, sizes = entry["offsets"].tolist(), entry["sizes"].tolist()
        pieces, files = _room(offsets, sizes, into, scratch or Scratch())
        try:
            count = os.preadv(self._file.fileno(), pieces, offsets[0])
        except OSError as error:  # a bad disk, a file that went away on its server
            raise _refusal(f"cannot read tile {self.key(row)} in {self.path}", error) from None
        if count != offsets[-1] + sizes[-1] - offsets[0]:
            raise DatasetError(f"{self.path} ends inside of tile {self.key(row)}: copy it again")
        checksum = xxhash.xxh3_64()
        for file in files:
            checksum.update(file)
        if checksum.intdigest() != int(entry["checksum"]):
            raise DatasetError(
                f"tile {self.key(row)} in {self.path} is damaged: its checksum differs; copy it again"
            )
        return files


def _room(
    offsets: Sequence[int], sizes: Sequence[int], into: Sequence[memoryview | None], scratch: Scratch
) -> tuple[list[memoryview], list[memoryview]]:
    """Memory for the bytes from the first file to the last one's end, and the files in it."""
    wanted = [*into, *[None] * (len(sizes) - len(into))]
    places = [
        place if place is not None and len(place) == size else None
        for place, size in zip(wanted, sizes, strict=True)
    ]
    given = sum(len(place) for place in places if place is not None)
    rest = scratch.take(offsets[-1] + sizes[-1] - offsets[0] - given)
    pieces, files = [], []
    position, used = offsets[0], 0
    for offset, size, place in zip(offsets, sizes, places, strict=True):
        gap = offset - position  # the tar header, and what fills up the block before it
        taken = gap if place is not None else gap + size
        pieces.append(rest[used : used + taken])
        used += taken
        if place is not None:
            pieces.append(place)
        files.append(place if place is not None else pieces[-1][gap:])
        position = offset + size
    return pieces, files


def _open(folder: Path, info: ShardInfo) -> _Opened:
    path = folder / f"{info.name}.tar"
    file = _open_file(path)
    size = os.fstat(file.fileno()).st_size
    if size != info.bytes:
        raise DatasetError(f"{path} has {size} bytes instead of {info.bytes}: copy it again")
    return _Opened(path, file)


def _open_file(path: Path) -> IO[bytes]:
    try:
        return os.fdopen(plain_descriptor(path), "rb", buffering=0)
    except OSError as error:
        raise _refusal(f"cannot open {path}", error) from None


def _read_index(folder: Path, info: ShardInfo, files: int, most: int) -> NDArray[np.void]:
    path = folder / f"{info.name}.index.npy"
    with _open_file(path) as file:
        if os.fstat(file.fileno()).st_size > _MOST_INDEX_BYTES:
            raise DatasetError(f"{path} is larger than any index")
        try:
            content = file.read()
        except OSError as error:
            raise _refusal(f"cannot read {path}", error) from None
    if xxhash.xxh3_128_hexdigest(content) != info.index:
        raise DatasetError(f"{path} is damaged: its checksum differs; copy it again")
    # Whoever can write an index can write its checksum as well.
    index = _parse_index(path, content)
    if index.shape != (info.tiles,) or index.dtype["offsets"].shape != (files,):
        raise DatasetError(f"{path} does not describe {info.tiles} tiles of {files} files")
    wrong = _what_is_wrong(index, info.bytes, most)
    if wrong:
        raise DatasetError(f"{path} is damaged: {wrong}; prepare the data set again")
    return index


def _parse_index(path: Path, content: bytes) -> NDArray[np.void]:
    """The array in an index file, whose memory is what the file has, whatever its header says."""
    try:
        with _HEADER:
            start, shape, fortran, dtype = _npy_header(content)
        count = (len(content) - start) // max(dtype.itemsize, 1)
        if fortran or shape != (count,) or len(content) != start + count * dtype.itemsize:
            raise ValueError("its header does not fit its size")
        _check_type(dtype)
        index: NDArray[np.void] = np.frombuffer(content, dtype, offset=start)
    except (ValueError, TypeError, KeyError, SyntaxError, tokenize.TokenError, RecursionError) as error:
        raise DatasetError(f"{path} is no index of a shard ({error})") from None
    return index


def _npy_header(content: bytes) -> tuple[int, tuple[int, ...], bool, np.dtype[Any]]:
    """Where the array begins, its shape, whether columns go first, and its type."""
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of the format")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    return file.tell(), shape, fortran, dtype


def _check_type(dtype: np.dtype[Any]) -> None:
    """Raise ValueError unless this is the type of an index, see `_index_type`."""
    if dtype.names not in (_COLUMNS, _COLUMNS + _MOMENTS):
        raise ValueError("other columns")
    files, classes = dtype["offsets"].shape, dtype["pixels"].shape
    if len(files) != 1 or len(classes) != 1 or files[0] < 1:
        raise ValueError("columns of another shape")
    channels = dtype["moments"].shape if _MOMENTS[-1] in dtype.names else (0, 2)
    if len(channels) != 2:
        raise ValueError("columns of another shape")
    widths = dtype["key"].itemsize, dtype["field"].itemsize
    if dtype != _type_of(*widths, files=files[0], classes=classes[0], channels=channels[0]):
        raise ValueError("columns of other types")
    if not (1 <= dtype["key"].itemsize <= MAX_KEY and 1 <= dtype["field"].itemsize <= _MOST_FIELD):
        raise ValueError("columns of another width")


def _what_is_wrong(index: NDArray[np.void], size: int, most: int) -> str:
    """What in an index cannot be; empty if nothing.

    The members of a tar file of `size` bytes stand one after the other, each behind its header, so all
    that is free about where they begin is how long they are.
    """
    if not _are_keys(index["key"]):
        return "it holds a key that is no plain name"
    offsets, sizes = index["offsets"].reshape(-1), index["sizes"].reshape(-1).astype(np.uint64)
    blocks = np.cumsum(-(-sizes.astype(np.int64) // _BLOCK) + 1)  # 32 bits each: no sum is too large
    starts = np.concatenate([[0], blocks[:-1]]) * _BLOCK + _BLOCK
    if not np.array_equal(offsets, starts.astype(np.uint64)):
        return "its files do not follow one another"
    if len(blocks) and int(blocks[-1]) * _BLOCK > size:
        return "its files end beyond the shard"
    if index["sizes"].sum(axis=1, dtype=np.uint64).max(initial=0) > most:
        return f"a record takes more than {most} bytes"
    names = index.dtype.names or ()
    if "moments" in names and not np.isfinite(index["moments"]).all():
        return "a tile's sums are not finite"
    return ""


def _are_keys(keys: NDArray[np.bytes_]) -> bool:
    """Whether each is one as `tile.is_key` has it, and no two are the same."""
    letters = np.ascontiguousarray(keys).view(np.uint8).reshape(len(keys), -1)
    there = letters != 0
    ends_once = there[:, :1].all() and not (there[:, 1:] & ~there[:, :-1]).any()
    return bool(ends_once and _IN_KEYS[letters[there]].all() and len(np.unique(keys)) == len(keys))


class _Recent(Generic[_V]):
    """What was used last, by number; loading happens beside the lock, so that no thread waits for it.

    Args:
        room: how much is kept; the latest is kept whatever its size.
        size: of a value, in the unit of `room`.
    """

    def __init__(self, room: int, size: Callable[[_V], int]) -> None:
        self._room, self._size = room, size
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, _V] = OrderedDict()
        self._used = 0

    def get(self, number: int, load: Callable[[], _V]) -> _V:
        """The value of a number, loaded where it is not kept."""
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
        value = load()  # two threads may load the same at once; one of the values is thrown away
        dropped: list[_V] = []  # and freed after the lock
        with self._lock:
            if number not in self._kept:
                self._kept[number] = value
                self._used += self._size(value)
            while self._used > self._room and len(self._kept) > 1:
                dropped.append(self._kept.popitem(last=False)[1])
                self._used -= self._size(dropped[-1])
        return value

    def drop(self, number: int) -> None:
        """Keep the value of a number no longer."""
        with self._lock:
            value = self._kept.pop(number, None)
            self._used -= self._size(value) if value is not None else 0


def _most_open() -> int:
    """How many shards a reader keeps open.

    A run reads two splits, each from two places where it is staged, and needs descriptors for more than
    shards; a limit of 1,024 a process is common on clusters.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_OPEN if limit == resource.RLIM_INFINITY else max(1, min(limit // 8, _MOST_OPEN))


class SplitReader:
    """All tiles of a split by number, 0 … len - 1; shards are opened when first needed.

    Indexes and descriptors are kept while there is room, those used last; a split may have any number
    of shards. Safe to read from several threads.

    Args:
        folder: the data set's folder.
        schema: its dataset.json.
        name: the split.

    Attributes:
        dataset: the data set's folder, as users know it.

    Raises:
        DatasetError: there is no such split, or it is empty.
    """

    def __init__(self, folder: Path, schema: Schema, name: str) -> None:
        self.schema, self.name = schema, name
        self.split = schema.split(name)
        self.dataset = folder
        self._folder = folder / name
        self._most = schema.most_record_bytes
        self._indexes = _Recent[NDArray[np.void]](_INDEX_BYTES, lambda index: index.nbytes)
        self._opened = _Recent[_Opened](_most_open(), lambda _: 1)

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
        number, row = self._place(tile)
        return self._shard(number), row

    def _place(self, tile: int) -> tuple[int, int]:
        """Number of the shard, and the row in it."""
        number = int(np.searchsorted(self._ends, tile, side="right"))
        return number, tile - int(self._ends[number]) + self.split.shards[number].tiles

    def where(self, tile: int) -> tuple[str, str | None]:
        """Where a tile stands, `SPLIT/NAME.tar`, and its key; None where the index cannot tell it."""
        number, row = self._place(tile)
        info = self.split.shards[number]
        shard = f"{self.name}/{info.name}.tar"
        try:
            index = self._index(number)
        except DatasetError:
            return shard, None
        return shard, bytes(index["key"][row]).decode()

    def reopen(self, tile: int) -> None:
        """Look at a tile's shard anew at the next read: a descriptor may be stale, a file replaced."""
        self._opened.drop(self._place(tile)[0])

    def _shard(self, number: int) -> Shard:
        info, index = self.split.shards[number], self._index(number)
        # A descriptor that is dropped stays open while a thread still reads from it.
        return Shard.of(index, self._opened.get(number, lambda: _open(self._folder, info)))

    def _index(self, number: int) -> NDArray[np.void]:
        info, files, most = self.split.shards[number], len(self.schema.parts) + 1, self._most
        return self._indexes.get(number, lambda: _read_index(self._folder, info, files, most))

    def indexes(self) -> Iterator[NDArray[np.void]]:
        """The index of every shard in order; see the module.

        Raises:
            DatasetError: one cannot be read.
        """
        for number in range(len(self.split.shards)):
            yield self._index(number)

    def key(self, tile: int) -> str:
        """Key of a tile."""
        shard, row = self.locate(tile)
        return shard.key(row)

    def read(
        self, tile: int, into: Sequence[memoryview | None] = (), scratch: Scratch | None = None
    ) -> list[memoryview]:
        """The files of a tile, image files first and labels last, checksum compared.

        Args:
            tile: its number.
            into: where files are wanted; see `Shard.read`.
            scratch: for the others.

        Raises:
            DatasetError: the record is damaged or the shard cannot be read.
        """
        shard, row = self.locate(tile)
        return shard.read(row, into, scratch)

    def announce(self, tiles: Iterable[int]) -> None:
        """Let the disk begin to read tiles that are wanted soon."""
        with suppress(DatasetError):  # told by `read`
            for tile in tiles:
                shard, row = self.locate(tile)
                shard.announce(row)

    def shards(self) -> Iterator[Shard]:
        """Every shard in order.

        Raises:
            DatasetError: one cannot be opened.
        """
        for number in range(len(self.split.shards)):
            yield self._shard(number)
