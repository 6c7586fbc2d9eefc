"""Image files of a record: what is decoded is what another decoder sees, or refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image as Pillow

from agrivision.data.parts import (
    decode_part,
    decode_place,
    encode_place,
    encode_raw,
    encode_tiff,
    jpeg_shape,
    tiff_coordinates,
)
from agrivision.data.schema import Part
from agrivision.data.tile import Coordinates
from tests.fuzz import tiff
from tests.fuzz.harness import REFUSED, Target, answer
from tests.fuzz.mutations import mutate_json

_SIDE = 24


def _smooth(bands: int, side: int = _SIDE) -> np.ndarray:
    y, x = np.mgrid[:side, :side]
    return np.stack([(x * (b + 2) + y * 3) % 256 for b in range(bands)], -1).astype(np.uint8)


def _pillow_jpeg(mode: str, side: int = _SIDE, **options: Any) -> bytes:
    file = io.BytesIO()
    Pillow.fromarray(_smooth(3, side)).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def _decoded(data: bytes, extension: str, bands: int, dtype: str, before: int) -> tuple[Any, Any]:
    """Memory that held another value before, and what the decoder said."""
    out = np.full((_SIDE, _SIDE, bands), before, dtype)
    part = Part(extension=extension, bands=bands)
    return out, answer(lambda: decode_part(data, part, dtype, _SIDE, out=out))


def jpeg(folder: Path) -> Target:
    """JPEG of three bands and of one, of other colours, progressive, cut, with restart markers."""
    del folder
    seeds = [
        simplejpeg.encode_jpeg(_smooth(3), quality=85),
        simplejpeg.encode_jpeg(_smooth(1), colorspace="GRAY", colorsubsampling="Gray"),
        _pillow_jpeg("RGB", progressive=True, quality=60),
        _pillow_jpeg("L", progressive=True),
        _pillow_jpeg("RGB", restart_marker_blocks=1, optimize=True, subsampling=2),
        _pillow_jpeg("CMYK"),
        _pillow_jpeg("RGB", side=40),
        _pillow_jpeg("RGB", icc_profile=b"profile" * 20, comment=b"comment", keep_rgb=True),
    ]

    def run(data: bytes) -> None:
        for bands in (1, 3):
            first, result = _decoded(data, "rgb.jpg", bands, "uint8", 1)
            second, other = _decoded(data, "rgb.jpg", bands, "uint8", 254)
            assert (result is REFUSED) == (other is REFUSED)
            if result is not REFUSED:
                assert np.array_equal(first, second), "some pixels were left as they were"
                assert jpeg_shape(data) == first.shape
                assert np.array_equal(first, _by_pillow(data, bands))

    return Target(seeds=tuple(seeds), run=run)


def _by_pillow(data: bytes, bands: int) -> np.ndarray:
    with Pillow.open(io.BytesIO(data), formats=["JPEG"]) as image:
        assert image.mode == {1: "L", 3: "RGB"}[bands]
        return np.asarray(image).reshape(_SIDE, _SIDE, bands)


def _tiles() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        _smooth(4).transpose(2, 0, 1),
        rng.integers(0, 1 << 16, (2, _SIDE, _SIDE), dtype=np.uint16),
        rng.normal(size=(1, _SIDE, _SIDE)).astype(np.float32),
    ]


_WKT = 'LOCAL_CS["here",UNIT["metre",1]]'


def tile_tiff(folder: Path) -> Target:
    """The small GeoTIFFs of records: of other sizes, types, block sizes, compressions, and cut."""
    del folder
    place = Coordinates(crs=_WKT, transform=(5.0, 0.0, 486_000.0, 0.0, -5.0, 5_209_000.0))
    tiles = _tiles()
    seeds = [encode_tiff(tile, place, 7.0) for tile in tiles]
    seeds += [encode_tiff(tiles[0], None, None), tiff.encode(tiles[0], tile=16), tiff.encode(tiles[1])]

    def run(data: bytes) -> None:
        answer(lambda: tiff_coordinates(data))
        for tile in tiles:
            first, result = _decoded(data, "image.tif", len(tile), tile.dtype.name, 1)
            second, other = _decoded(data, "image.tif", len(tile), tile.dtype.name, 99)
            assert (result is REFUSED) == (other is REFUSED)
            if result is not REFUSED:
                if first.tobytes() != second.tobytes():
                    assert tiff.overflows(data), "some pixels were left as they were"
                    continue
                slowly = tiff.decode(data)
                assert slowly is None or slowly.tobytes() == first.tobytes()

    return Target(seeds=tuple(seeds), run=run)


def raw(folder: Path) -> Target:
    """Plain pixels, and the JSON that says where they lie."""
    del folder
    tile = _tiles()[1]
    place = Coordinates(crs=_WKT, transform=(5.0, 0.0, 486_000.0, 0.0, -5.0, 5_209_000.0))
    seeds = (encode_place(place), encode_place(None), encode_raw(tile))

    def run(data: bytes) -> None:
        part = Part(extension="image.raw", bands=2)
        pixels = answer(lambda: decode_part(data, part, "uint16", _SIDE))
        assert (pixels is REFUSED) == (len(data) != tile.nbytes)
        assert pixels is REFUSED or pixels.astype("<u2").tobytes() == data
        found = answer(lambda: decode_place(data))
        if isinstance(found, Coordinates):
            assert list(map(float, json.loads(data)["transform"])) == list(found.transform)
            assert np.isfinite(found.transform).all() and json.loads(data)["crs"] == found.crs
            assert decode_place(encode_place(found)) == found

    def mutate(seeds: Any, program: bytes) -> bytes:
        return mutate_json(seeds[:2], program) if program[:1] < b"\xe0" else seeds[2][: len(program)]

    return Target(seeds=seeds, run=run, mutate=mutate)
