"""dataset.json, with its fingerprint made to fit: what is accepted can be used as its types say."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from agrivision.data import schema as module
from agrivision.data.decode import Layout
from agrivision.data.schema import (
    FILE_NAME,
    BandStatistics,
    Part,
    Schema,
    ShardInfo,
    Split,
)
from agrivision.data.shards import SplitReader
from agrivision.errors import AgrivisionError
from tests.fuzz.harness import REFUSED, Target, answer
from tests.fuzz.mutations import mutate_json

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_MOST_BYTES = 1 << 36  # of one tile's pixels and labels


def _split(tiles: int) -> Split:
    shard = ShardInfo(name="00000", tiles=tiles, bytes=10_240, index="0" * 32)
    return Split(
        tiles=tiles,
        labelled=True,
        shards=(shard,),
        pixels=100 * tiles,
        class_pixels=(60 * tiles, 40 * tiles),
        class_tiles=(tiles, tiles),
    )


def _good(**changes: Any) -> Schema:
    fields: dict[str, Any] = {
        "source": "agriculture-vision-2021",
        "bands": ("red", "green", "blue", "nir"),
        "dtype": "uint8",
        "tile": 64,
        "parts": (Part(extension="rgb.jpg", bands=3), Part(extension="nir.jpg", bands=1)),
        "classes": ("background", "water"),
        "class_values": (),
        "unscored": ("storm_damage",),
        "splits": {"train": _split(3), "val": _split(1)},
        "statistics": BandStatistics(
            splits=("train",), pixels=300, mean=(1.0, 2.0, 3.0, 4.0), std=(1.0, 1.0, 0.0, 2.5),
            minimum=(0.0,) * 4, maximum=(255.0,) * 4,
        ),
    }  # fmt: skip
    return Schema(**(fields | changes))


def _bytes(folder: Path, schema: Schema) -> bytes:
    schema.write(folder)
    return (folder / FILE_NAME).read_bytes()


def dataset_json(folder: Path) -> Target:
    """The description of a data set."""
    raw = (Part(extension="image.raw", bands=4), Part(extension="place.json", bands=0))
    goods = [
        _good(),
        _good(parts=raw, dtype="float32", nodata=-9999.0, class_values=(3, 7), unscored=()),
    ]
    seeds = tuple(_bytes(folder, good) for good in goods)
    path = folder / FILE_NAME

    def run(data: bytes) -> None:
        path.write_bytes(data)
        found = answer(lambda: Schema.read(folder), path)
        assert found is REFUSED or found in goods or found == _of(data)
        path.write_bytes(_fitted(data))
        found = answer(lambda: Schema.read(folder), path)
        if found is not REFUSED:
            _check(found)
            found.write(folder)
            assert Schema.read(folder) == found
            for name in found.splits:
                answer(
                    lambda name=name: SplitReader(folder, found, name).key(found.split(name).tiles - 1)
                )

    return Target(seeds=seeds, run=run, mutate=mutate_json)


def _of(data: bytes) -> Any:
    return module._parse(Schema, json.loads(data))


def _fitted(data: bytes) -> bytes:
    """With the fingerprint that belongs to what it says, as far as it says something."""
    try:
        content = json.loads(data)
        content["fingerprint"] = _of(data).fingerprint
        return json.dumps(content).encode()
    except (AgrivisionError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return data
    except OverflowError:
        return data


def _check(schema: Schema) -> None:
    """Every field is of its type and within its range, and the counts go together."""
    texts = (schema.source, schema.dtype, *schema.bands, *schema.classes, *schema.unscored)
    assert all(type(text) is str and text.isprintable() for text in texts)
    assert schema.dtype in {
        "uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64",
    }  # fmt: skip
    names = (*schema.classes, *schema.unscored, "valid")
    assert len(set(names)) == len(names)
    assert schema.class_values == () or len(schema.class_values) == len(schema.classes)
    assert all(type(part.bands) is int and part.bands >= 0 for part in schema.parts)
    assert all(re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", part.extension) for part in schema.parts)
    assert type(schema.tile) is int and schema.tile >= 1
    assert Layout.of(schema, 1).size <= _MOST_BYTES
    assert schema.nodata is None or type(schema.nodata) is float
    for name, split in schema.splits.items():
        assert _NAME.fullmatch(name)
        assert split.tiles == sum(shard.tiles for shard in split.shards)
        assert all(_NAME.fullmatch(shard.name) and shard.tiles >= 1 for shard in split.shards)
        assert all(0 <= shard.bytes < 2**63 for shard in split.shards)
        assert len({shard.name for shard in split.shards}) == len(split.shards)
        assert type(split.labelled) is bool
        assert len(split.class_pixels) == len(split.class_tiles) == len(schema.classes)
        assert all(0 <= tiles <= split.tiles for tiles in split.class_tiles)
        assert 0 <= split.pixels <= split.tiles * schema.tile**2
        assert all(0 <= pixels <= split.pixels for pixels in split.class_pixels)
    about = schema.statistics
    for values in (about.mean, about.std, about.minimum, about.maximum):
        assert len(values) == len(schema.bands) and all(map(math.isfinite, values))
    assert all(std >= 0 for std in about.std)
