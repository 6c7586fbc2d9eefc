"""Masks of a source, and anybody's PNGs and zip files that are scored."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from agrivision.data.labels import compress
from agrivision.data.schema import BandStatistics, Part, Schema, Split
from agrivision.data.shards import Record, SplitReader, write_shard
from agrivision.data.sources.masks import MaskReader
from agrivision.evaluation import score as scoring
from agrivision.evaluation.score import score_folder
from tests.fuzz.harness import REFUSED, Target, answer
from tests.fuzz.mutations import Program, change_bytes, mutate_bytes

_SIDE = 16
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _ids(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, (_SIDE, _SIDE), dtype=np.uint8)


def _png(pixels: np.ndarray, mode: str = "L", **options: Any) -> bytes:
    file = io.BytesIO()
    image = Pillow.fromarray(pixels)
    if mode == "P":
        image = Pillow.fromarray(pixels, "P")
        image.putpalette([9, 9, 9] * 256)
    elif mode == "1":
        image = Pillow.fromarray(pixels > 0)
    elif mode == "I;16":
        image = Pillow.fromarray(pixels.astype(np.uint16) * 300)
    image.save(file, "PNG", **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG, with its checksum."""
    return (
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    )


def header(width: int, height: int, depth: int = 8, colour: int = 0, interlace: int = 0) -> bytes:
    """The first chunk."""
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))


def _seeds() -> tuple[bytes, ...]:
    pixels = _ids(0)
    plain = _png(pixels)
    body, end = plain[len(_SIGNATURE) + 25 :], chunk(b"IEND", b"")
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 20), 9)) * 3
    profile = chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(1 << 22), 9))
    bomb = chunk(b"IDAT", zlib.compress(bytes(1 << 22), 9))
    short = chunk(b"IDAT", zlib.compress(bytes(_SIDE + 1))) + end
    own = _SIGNATURE + header(_SIDE, _SIDE)
    return (
        plain,
        _png(pixels * 255),
        _png(pixels, "P"),
        _png(pixels, "1"),
        _png(pixels, "I;16"),
        own + text + profile + body,
        own + header(65_535, 65_535) + body,
        _SIGNATURE + header(65_535, 65_535) + bomb + end,
        _SIGNATURE + header(65_535, 65_535, 16, 6) + bomb + end,
        own + bomb + end,
        own + chunk(b"acTL", struct.pack(">II", 2, 0)) + body,
        _SIGNATURE + header(_SIDE, _SIDE, interlace=1) + body,
        own + chunk(b"tRNS", b"\0\1") + body,
        own + chunk(b"tEXt", b"a\0") + short,
        _SIGNATURE + header(_SIDE, _SIDE, depth=1) + short,
    )


def _mutate_png(seeds: Any, program: bytes) -> bytes:
    """Bytes; or chunk by chunk, each with the checksum that fits."""
    steps = Program(program)
    if steps.number(3) == 0:
        return mutate_bytes(seeds, program[1:])
    chunks = list(_chunks(steps.choice(seeds)))
    for _ in range(1 + steps.number(3)):
        place = steps.number(len(chunks))
        kind, content = chunks[place]
        what = steps.number(8)
        if what == 0:
            del chunks[place]
        elif what == 1:
            chunks.insert(steps.number(len(chunks) + 1), (kind, content))
        elif what == 2:
            others = list(_chunks(steps.choice(seeds)))
            chunks.insert(place, steps.choice(others))
        else:
            changed = bytearray(content)
            part = Program(bytes(steps.number(256) for _ in range(8)))
            change_bytes(changed, [content], part)
            chunks[place] = kind, bytes(changed)
        if not chunks:
            break
    return _SIGNATURE + b"".join(chunk(kind, content) for kind, content in chunks)


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    start = len(_SIGNATURE)
    while start < len(content):
        (size,) = struct.unpack_from(">I", content, start)
        yield content[start + 4 : start + 8], content[start + 8 : start + 8 + size]
        start += 12 + size


def _slowly(content: bytes) -> np.ndarray | None:
    """Pixels of a plain grey PNG by hand, (side, side) uint8; None of any other, or a damaged one."""
    if not content.startswith(_SIGNATURE + header(_SIDE, _SIDE)):
        return None
    try:
        chunks = list(_chunks(content))
        data = zlib.decompressobj().decompress(
            b"".join(piece for kind, piece in chunks if kind == b"IDAT"), 1 << 20
        )
    except (struct.error, zlib.error):
        return None
    if any(kind not in (b"IHDR", b"IDAT", b"IEND") for kind, _ in chunks) or chunks[-1][0] != b"IEND":
        return None
    if len(data) < _SIDE * (_SIDE + 1):
        return None
    rows, above = [], np.zeros(_SIDE, int)
    for y in range(_SIDE):
        line = data[y * (_SIDE + 1) : (y + 1) * (_SIDE + 1)]
        row = _unfiltered(line[0], list(line[1:]), above.tolist())
        if row is None:
            return None
        above = np.array(row)
        rows.append(row)
    return np.array(rows, np.uint8)


def _assert_whole(content: bytes) -> None:
    """What is taken has at least the bytes that so many pixels need; Pillow makes up the others."""
    width, height, depth, colour = struct.unpack_from(">IIBB", content, 16)
    until_the_end = takewhile(lambda chunk: chunk[0] != b"IEND", _chunks(content))
    pieces = b"".join(piece for kind, piece in until_the_end if kind == b"IDAT")
    data = zlib.decompressobj().decompress(pieces, 1 << 20)
    bits = width * height * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    assert len(data) >= bits // 8 + height, "pixels are missing"


def _unfiltered(kind: int, line: list[int], above: list[int]) -> list[int] | None:
    row: list[int] = []
    for x, value in enumerate(line):
        left, up, corner = row[x - 1] if x else 0, above[x], above[x - 1] if x else 0
        guess = left + up - corner
        nearest = min((left, up, corner), key=lambda v: abs(guess - v))
        predicted = {0: 0, 1: left, 2: up, 3: (left + up) // 2, 4: nearest}.get(kind)
        if predicted is None:
            return None
        row.append((value + predicted) % 256)
    return row


def mask(folder: Path) -> Target:
    """A mask of a source."""
    path = folder / "mask.png"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        reader = MaskReader(size=(_SIDE, _SIDE))
        found = answer(lambda: reader.read(path), path)
        if found is REFUSED:
            return
        _assert_whole(data)
        again = reader.read(path)
        assert np.array_equal(found, again)
        whole = np.broadcast_to(found, (_SIDE, _SIDE))
        slowly = _slowly(data)
        if slowly is None:
            with Pillow.open(io.BytesIO(data), formats=["PNG"]) as image:
                slowly = np.asarray(image)
        assert np.array_equal(whole, slowly > 0)

    return Target(seeds=_seeds(), run=run, mutate=_mutate_png)


def _dataset(folder: Path, tiles: int) -> tuple[Path, list[np.ndarray]]:
    """A data set of tiles whose labels are 1 << id of some ids."""
    out = folder / "dataset"
    (out / "val").mkdir(parents=True)
    truth = [_ids(number) for number in range(tiles)]
    labels = [(1 << ids.astype(np.uint16)) | 0x8000 for ids in truth]
    records = [
        Record(
            key=f"tile{number}",
            field="",
            files={"image.raw": bytes(_SIDE * _SIDE), "labels.zst": compress(labels[number])},
            pixels=[int((truth[number] == 0).sum()), int((truth[number] == 1).sum())],
        )
        for number in range(tiles)
    ]
    info = write_shard(out / "val", "00000", records)
    assert info is not None
    pixels = tuple(map(int, np.sum([record.pixels for record in records], 0)))
    split = Split(
        tiles=tiles, labelled=True, shards=(info,), pixels=sum(pixels), class_pixels=pixels,
        class_tiles=(tiles, tiles),
    )  # fmt: skip
    Schema(
        source="rasters", bands=("grey",), dtype="uint8", tile=_SIDE,
        parts=(Part(extension="image.raw", bands=1),), classes=("a", "b"), class_values=(), unscored=(),
        splits={"val": split},
        statistics=BandStatistics(
            splits=("val",), pixels=sum(pixels), mean=(0.0,), std=(1.0,), minimum=(0.0,), maximum=(1.0,)
        ),
    ).write(out)  # fmt: skip
    return out, truth


def prediction(folder: Path) -> Target:
    """One PNG of class ids, as it is scored."""
    dataset, (truth,) = _dataset(folder, 1)
    path = folder / "predicted" / "tile0.png"
    path.parent.mkdir()
    reader = SplitReader(dataset, Schema.read(dataset), "val")

    def run(data: bytes) -> None:
        path.write_bytes(data)
        predictions = scoring._in_folder(path.parent)
        matrix = answer(lambda: scoring._score_tile(predictions, reader, 0, "tile0"), path.name)
        if matrix is REFUSED:
            return
        _assert_whole(data)
        slowly = _slowly(data)
        if slowly is None:
            with Pillow.open(io.BytesIO(data), formats=["PNG"]) as image:
                slowly = np.asarray(image)
        assert slowly.max() <= 1
        counts = [[int(((truth == t) & (slowly == p)).sum()) for t in (0, 1)] for p in (0, 1)]
        assert matrix.tolist() == counts  # rows predicted, columns true

    return Target(seeds=_seeds(), run=run, mutate=_mutate_png)


def zip_file(folder: Path) -> Target:
    """A zip file of PNGs."""
    dataset, truth = _dataset(folder, 2)
    path = folder / "predicted.zip"
    names = ("tile0.png", "tile1.png")
    files = dict(zip(names, map(_png, truth), strict=True))
    bomb = b"\x89PNG\r\n\x1a\n" + bytes(1 << 22)
    many = {f"labels/{name}": content for name, content in files.items()} | {"__MACOSX/tile0.png": b""}
    seeds = (
        _zip(files),
        _zip(many, zipfile.ZIP_DEFLATED),
        _zip(files, zipfile.ZIP_BZIP2),
        _zip(files, zipfile.ZIP_LZMA),
        _zip({"../../tile0.png": files["tile0.png"], "/tile1.png": files["tile1.png"]}),
        _zip({**files, "x/tile0.png": b""}),
        _zip({"tile0.png": bomb, "tile1.png": bomb}, zipfile.ZIP_DEFLATED),
        _zip({"\u202etile0.png\n": b"x", "tile0.png": b""}),
    )
    right = score_folder(_written(path, seeds[0]), dataset, "val")

    def run(data: bytes) -> None:
        path.write_bytes(data)
        found = answer(lambda: score_folder(path, dataset, "val"), path)
        if found is not REFUSED:
            # The checksums of the members and of the PNGs' chunks leave hardly anything else.
            assert found == right or _unpacked(data) != files

    return Target(seeds=seeds, run=run)


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _zip(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return file.getvalue()


def _unpacked(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [name for name in archive.namelist() if not name.startswith("__MACOSX/")]
        return {name.rpartition("/")[2]: archive.read(name) for name in names if name.endswith(".png")}
