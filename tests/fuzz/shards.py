"""Indexes below their digest, and records below nothing: what is read is what stands there."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash

from agrivision.data.schema import ShardInfo
from agrivision.data.shards import Record, Shard, write_shard
from agrivision.data.tile import is_key
from tests.fuzz.harness import REFUSED, Target, answer

_EXTENSIONS = ("rgb.jpg", "nir.jpg", "labels.zst")
_CLASSES = 3


def _records() -> list[Record]:
    rng = np.random.default_rng(0)
    return [
        Record(
            key=f"AB{number}_0-0-8-8",
            field=f"AB{number}"[: number + 2],
            files={name: rng.bytes(int(rng.integers(1, 900))) for name in _EXTENSIONS},
            pixels=[number, 2, 3],
        )
        for number in range(3)
    ]


def _write(folder: Path) -> tuple[ShardInfo, bytes, bytes]:
    info = write_shard(folder, "00000", _records())
    assert info is not None
    return info, (folder / "00000.tar").read_bytes(), (folder / "00000.index.npy").read_bytes()


def index(folder: Path) -> Target:
    """The index of a shard; its digest in dataset.json fits: who can write one can write both."""
    info, tar, good = _write(folder)
    path = folder / "00000.index.npy"
    more = np.load(path)
    other_types = [("key", "O"), *((name, more.dtype[name]) for name in more.dtype.names[1:])]
    seeds = [good, _npy(more[:1]), _npy(more[::-1]), _npy(more.astype(other_types), pickles=True)]
    seeds += [_npy(np.asfortranarray(np.zeros((2, 3), "<u8"))), _npy(more["offsets"])]

    def run(data: bytes) -> None:
        path.write_bytes(data)
        if data != good:
            assert answer(lambda: Shard(folder, info, len(_EXTENSIONS)), path) is REFUSED
        fitting = dataclasses.replace(info, index=xxhash.xxh3_128_hexdigest(data))
        shard = answer(lambda: Shard(folder, fitting, len(_EXTENSIONS)), folder)
        if shard is not REFUSED:
            _check(shard, tar, info.tiles)

    return Target(seeds=tuple(seeds), run=run)


def _npy(array: np.ndarray, *, pickles: bool = False) -> bytes:
    import io

    file = io.BytesIO()
    np.save(file, array, allow_pickle=pickles)
    return file.getvalue()


def _check(shard: Shard, tar: bytes, tiles: int) -> None:
    """Each record that is read is what slicing the file by Python's own numbers gives."""
    assert len(shard.index) == tiles
    for row in range(tiles):
        assert is_key(shard.key(row))
        shard.announce(row)
        files = answer(lambda row=row: shard.read(row), shard.path)
        if files is REFUSED:
            continue
        entry = shard.index[row]
        ends = [
            (int(start), int(start) + int(size))
            for start, size in zip(entry["offsets"].tolist(), entry["sizes"].tolist(), strict=True)
        ]
        assert all(0 <= start <= end <= len(tar) for start, end in ends)
        assert all(end <= start for (_, end), (start, _) in pairwise(ends))
        assert [bytes(file) for file in files] == [tar[start:end] for start, end in ends]
        whole = b"".join(tar[start:end] for start, end in ends)
        assert xxhash.xxh3_64_intdigest(whole) == int(entry["checksum"])
        assert entry["pixels"].shape == (_CLASSES,)


def records(folder: Path) -> Target:
    """The tar file of a shard, cut, longer, or with other bytes: a record is as it was, or refused."""
    info, good, _ = _write(folder)
    path = folder / "00000.tar"
    originals = [tuple(record.files.values()) for record in _records()]
    cut_while_read = Shard(folder, info, len(_EXTENSIONS))

    def run(data: bytes) -> None:
        with path.open("r+b") as file:  # the same file, which `cut_while_read` has open
            file.write(data)
            file.truncate()
        shard = answer(lambda: Shard(folder, info, len(_EXTENSIONS)), path)
        assert (shard is REFUSED) == (len(data) != info.bytes)
        for row, original in enumerate(originals):
            files = answer(lambda row=row: cut_while_read.read(row), path)
            entry = cut_while_read.index[row]
            spans = zip(entry["offsets"].tolist(), entry["sizes"].tolist(), strict=True)
            unchanged = tuple(data[start : start + size] for start, size in spans) == original
            assert (files is not REFUSED) == unchanged
            assert files is REFUSED or tuple(map(bytes, files)) == original

    return Target(seeds=(good,), run=run)
