"""The data that the scripts read, made once: invented fields, the data set, every peer's own format.

All formats hold the same tiles: the same JPEG bytes, and, where they are not made of the 13 files, the
same labels, packed as `agrivision.data.labels` packs them. `truth.json` has a digest of each tile's
pixels and labels as Pillow reads them from the source, by which every contestant is checked.

    python -m benchmarks.data --folder FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from agrivision.cli import main as agrivision
from agrivision.data.labels import VALID_BIT, decompress_into
from agrivision.data.parts import decode_jpeg
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.storage import write_atomically
from benchmarks.common import fresh, missing, parser, say

SPLIT = "train"
PER_SHARD = 128  # tiles in a peer's shard, as in ours
COPIES = 8  # how often a peer's shards stand in its folder, by hard links: epochs are long enough
RAW_TILES = 512  # tiles of the peers' uncompressed formats: 0.8 GB each


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where everything is.

    Attributes:
        root: folder of what is made.
        source: Agriculture-Vision folder.
        dataset: the same, prepared.
    """

    root: Path
    source: Path
    dataset: Path

    @cached_property
    def schema(self) -> Schema:
        """Of the data set."""
        return Schema.read(self.dataset)

    @property
    def reader(self) -> SplitReader:
        """Of the training split."""
        return SplitReader(self.dataset, self.schema, SPLIT)

    @property
    def raw_reader(self) -> SplitReader:
        """Of the training split, uncompressed."""
        return SplitReader(self.root / "raw", Schema.read(self.root / "raw"), SPLIT)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of a tile."""
        return self.schema.tile, self.schema.tile

    @cached_property
    def masks(self) -> tuple[tuple[str, int], ...]:
        """Folders of class masks in the source, each with its bit in the labels."""
        bits = self.schema.label_bits
        return tuple((name, bit) for name, bit in bits.items() if 0 < bit < VALID_BIT)

    def files(self, key: str) -> dict[str, Path]:
        """The 13 files of a tile by what follows its key in a tar member's name."""
        split = self.source / SPLIT
        return {
            "rgb.jpg": split / "images" / "rgb" / f"{key}.jpg",
            "nir.jpg": split / "images" / "nir" / f"{key}.jpg",
            **{f"{name}.png": split / "labels" / name / f"{key}.png" for name, _ in self.masks},
            "boundary.png": split / "boundaries" / f"{key}.png",
            "mask.png": split / "masks" / f"{key}.png",
        }

    def tile_keys(self) -> list[str]:
        """Of the training tiles, in the data set's order."""
        reader = self.reader
        return [reader.key(tile) for tile in range(len(reader))]

    def truth(self) -> set[str]:
        """Digests of the training tiles, see `digest`."""
        return set(json.loads((self.root / "truth.json").read_text("utf-8")).values())


def digest(image: NDArray[np.uint8], labels: NDArray[np.uint16]) -> str:
    """Of one tile's pixels, shape (height, width, bands), and labels, shape (height, width)."""
    hasher = xxhash.xxh3_128(np.ascontiguousarray(image).data)
    hasher.update(np.ascontiguousarray(labels).data)
    return hasher.hexdigest()


def bits_of(masks: NDArray[np.uint8], data: Data) -> NDArray[np.uint16]:
    """Masks, shape (…, masks, height, width), in the order of `Data.files`, as label bits."""
    on = masks > 0
    labels = np.zeros(masks.shape[:-3] + masks.shape[-2:], np.uint16)
    for number, (_, bit) in enumerate(data.masks):
        labels |= on[..., number, :, :].astype(np.uint16) << np.uint16(bit)
    scored = np.uint16((1 << len(data.schema.classes)) - 1)
    labels |= ((labels & scored) == 0).astype(np.uint16)
    valid = on[..., -2, :, :] & on[..., -1, :, :]
    return labels | valid.astype(np.uint16) << np.uint16(VALID_BIT)


def _truth(out: Path, data: Data) -> None:
    """What Pillow sees in the source's files, without a line of the package's code."""
    digests = {}
    for key in data.tile_keys():
        rgb, nir, *masks = (np.asarray(Image.open(path)) for path in data.files(key).values())
        digests[key] = digest(np.dstack([rgb, nir]), bits_of(np.stack(masks), data))
    write_atomically(out, json.dumps(digests).encode())


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A tile as the packed formats hold it."""

    key: str
    rgb: bytes
    nir: bytes
    labels: bytes

    def arrays(self, data: Data) -> dict[str, NDArray[Any]]:
        """Uncompressed: `image` (height, width, 4) uint8, `labels` (height, width) uint16."""
        rgb = np.empty((*data.shape, 3), np.uint8)
        nir = np.empty((*data.shape, 1), np.uint8)
        labels = np.empty(data.shape, np.uint16)
        decode_jpeg(self.rgb, rgb)
        decode_jpeg(self.nir, nir)
        decompress_into(self.labels, labels)
        return {"image": np.dstack([rgb, nir]), "labels": labels}


def _packed(data: Data) -> Iterator[Packed]:
    reader = data.reader
    for tile in range(len(reader)):
        rgb, nir, labels = map(bytes, reader.read(tile))
        yield Packed(key=reader.key(tile), rgb=rgb, nir=nir, labels=labels)


def _tars(out: Path, data: Data) -> None:
    """The 13 files of each tile in tars, for webdataset."""
    out.mkdir()
    keys = data.tile_keys()
    for shard, first in enumerate(range(0, len(keys), PER_SHARD)):
        with tarfile.open(out / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for key in keys[first : first + PER_SHARD]:
                for extension, path in data.files(key).items():
                    content = path.read_bytes()
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def _raw(out: Path, data: Data) -> None:
    """Our own uncompressed shards."""
    code = _quietly(["prepare", str(data.source), str(out), "--raw"])
    if code:
        sys.exit(code)


def _mds_documented(out: Path, data: Data) -> None:
    """As mosaicml's documentation stores images: columns of the type jpeg, decoded by Pillow."""
    from streaming import MDSWriter

    columns = {"rgb": "jpeg", "nir": "jpeg", "labels": "bytes"}
    with MDSWriter(out=str(out), columns=columns) as writer:
        for tile in _packed(data):
            files = data.files(tile.key)
            rgb, nir = Image.open(files["rgb.jpg"]), Image.open(files["nir.jpg"])
            writer.write({"rgb": rgb, "nir": nir, "labels": tile.labels})
    _repeat_mds(out)


def _mds_tuned(out: Path, data: Data) -> None:
    """The same bytes as bytes, so that the reader chooses the decoder."""
    from streaming import MDSWriter

    with MDSWriter(out=str(out), columns=dict.fromkeys(("rgb", "nir", "labels"), "bytes")) as writer:
        for tile in _packed(data):
            writer.write({"rgb": tile.rgb, "nir": tile.nir, "labels": tile.labels})
    _repeat_mds(out)


def _mds_raw(out: Path, data: Data) -> None:
    from streaming import MDSWriter

    size = ",".join(map(str, data.shape))
    columns = {"image": f"ndarray:uint8:{size},4", "labels": f"ndarray:uint16:{size}"}
    with MDSWriter(out=str(out), columns=columns) as writer:
        for number, tile in enumerate(_packed(data)):
            if number < RAW_TILES:
                writer.write(tile.arrays(data))
    _repeat_mds(out)


def _repeat_mds(folder: Path) -> None:
    """List every shard COPIES times, under as many names."""
    index = json.loads((folder / "index.json").read_text("utf-8"))
    shards = []
    for copy in range(COPIES):
        for shard in index["shards"]:
            name = shard["raw_data"]["basename"]
            link = f"{copy}.{name}"
            os.link(folder / name, folder / link)
            shards.append({**shard, "raw_data": {**shard["raw_data"], "basename": link}})
    (folder / "index.json").write_text(json.dumps({**index, "shards": shards}), "utf-8")


def _litdata_documented(out: Path, data: Data) -> None:
    """As litdata's documentation stores images: Pillow's, kept as JPEG files."""
    _optimize(_DocumentedSample(data), len(data.reader), out)


def _litdata_tuned(out: Path, data: Data) -> None:
    _optimize(_TunedSample(data), len(data.reader), out)


def _litdata_raw(out: Path, data: Data) -> None:
    _optimize(_RawSample(data), min(RAW_TILES, len(data.reader)), out)


def _optimize(sample: Callable[[int], Any], tiles: int, out: Path) -> None:
    from litdata import optimize

    how = {"chunk_bytes": "64MB", "num_workers": 1, "verbose": False}
    optimize(sample, list(range(tiles)), str(out), **how)
    _repeat_litdata(out)


@dataclass(frozen=True)
class _Sample:
    """A tile by its number, as a process of `optimize` asks for it."""

    data: Data

    def _packed(self, tile: int) -> Packed:
        reader = self.data.reader
        rgb, nir, labels = map(bytes, reader.read(tile))
        return Packed(key=reader.key(tile), rgb=rgb, nir=nir, labels=labels)


class _DocumentedSample(_Sample):
    def __call__(self, tile: int) -> dict[str, Any]:
        packed = self._packed(tile)
        files = self.data.files(packed.key)
        rgb, nir = Image.open(files["rgb.jpg"]), Image.open(files["nir.jpg"])
        return {"rgb": rgb, "nir": nir, "labels": packed.labels}


class _TunedSample(_Sample):
    def __call__(self, tile: int) -> dict[str, Any]:
        packed = self._packed(tile)
        return {"rgb": packed.rgb, "nir": packed.nir, "labels": packed.labels}


class _RawSample(_Sample):
    def __call__(self, tile: int) -> dict[str, Any]:
        return self._packed(tile).arrays(self.data)


def _repeat_litdata(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text("utf-8"))
    chunks = []
    for copy in range(COPIES):
        for chunk in index["chunks"]:
            link = f"{copy}-{chunk['filename']}"
            os.link(folder / chunk["filename"], folder / link)
            chunks.append({**chunk, "filename": link})
    (folder / "index.json").write_text(json.dumps({**index, "chunks": chunks}), "utf-8")


# What is made, how, and what it takes: a peer that is not installed gets nothing.
_FORMATS: dict[str, tuple[Callable[[Path, Data], None], tuple[str, ...]]] = {
    "truth.json": (_truth, ()),
    "tars": (_tars, ()),
    "raw": (_raw, ()),
    "mds-documented": (_mds_documented, ("streaming",)),
    "mds-tuned": (_mds_tuned, ("streaming",)),
    "mds-raw": (_mds_raw, ("streaming",)),
    "litdata-documented": (_litdata_documented, ("litdata",)),
    "litdata-tuned": (_litdata_tuned, ("litdata",)),
    "litdata-raw": (_litdata_raw, ("litdata",)),
}


def make(options: argparse.Namespace, formats: tuple[str, ...] | None = None) -> Data:
    """Make what is not there yet.

    Args:
        options: `quick`, and those of `add_options`.
        formats: those that are needed besides the data set; None for all.
    """
    tiles, side = (96, 128) if options.quick else (1463, 512)  # 70 % of them train
    root = Path(options.folder) / f"{tiles}x{side}"
    if options.source or options.dataset:  # what was made from others' data has a place of its own
        named = f"{options.source} {options.dataset}".encode()
        root = Path(options.folder) / xxhash.xxh3_64_hexdigest(named)
    root.mkdir(parents=True, exist_ok=True)
    source = Path(options.source or root / "source")
    dataset = Path(options.dataset or root / "dataset")
    if not source.is_dir():
        _command("synthesize", str(source), "--tiles", str(tiles), "--size", str(side))
    if not dataset.is_dir():
        _command(
            "prepare", str(source), str(dataset), *(["--shard_tiles", "16"] if options.quick else [])
        )
    data = Data(root=root.resolve(), source=source.resolve(), dataset=dataset.resolve())
    for name, (function, modules) in _FORMATS.items():
        if (formats is None or name in formats) and not missing(*modules):
            _make_one(name, function, data)
    return data


def _command(*arguments: str) -> None:
    say("agrivision " + " ".join(arguments))
    if code := fresh(_quietly, list(arguments)):
        sys.exit(code)


def _quietly(arguments: list[str]) -> int:
    with contextlib.redirect_stdout(sys.stderr):  # stdout is the report's
        return agrivision(arguments)


def _make_one(name: str, function: Callable[[Path, Data], None], data: Data) -> None:
    out = data.root / name
    if out.exists():
        return
    say(f"making {out}")
    partial = out.with_name(f"partial-{name}")  # what an interrupted run left is made anew
    if partial.is_dir():
        shutil.rmtree(partial)
    fresh(function, partial, data)
    partial.rename(out)


def add_options(result: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options that say where the data is."""
    folder = Path(tempfile.gettempdir()) / "agrivision-benchmarks"
    result.add_argument("--folder", default=folder, help=f"where data is kept (default {folder})")
    result.add_argument("--source", help="an Agriculture-Vision folder of one's own")
    result.add_argument("--dataset", help="the same, prepared already")
    return result


def main() -> None:
    """Make everything that the scripts read."""
    data = make(add_options(parser(__doc__)).parse_args())
    say(f"{len(data.tile_keys())} training tiles in {data.root}")


if __name__ == "__main__":
    main()
