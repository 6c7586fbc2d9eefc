"""The page about a data set holds what the data set holds."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio

from agrivision.cli import main
from agrivision.data.glance import look_over
from agrivision.data.inspect import inspect_dataset
from agrivision.data.labels import class_mask, decompress_into, valid_mask
from agrivision.data.parts import decode_part
from agrivision.data.prepare import PrepareOptions, prepare
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.report.dataset import dataset_page
from tests.pages import Parsed


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenes with coordinates, of which one validates."""
    root, generator = tmp_path_factory.mktemp("farm"), np.random.default_rng(0)
    for number in range(2):
        for kind, bands, high in (("scenes", 3, 4000), ("labels", 1, 2)):
            path = root / "source" / kind / f"s{number}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(1 if bands > 1 else 0, high, (bands, 64, 64))
            profile = {"height": 64, "width": 64, "count": bands, "crs": "EPSG:32633"}
            profile["transform"] = rasterio.Affine(10, 0, 500000 + 640 * number, 0, -10, 5300000)
            with rasterio.open(path, "w", driver="GTiff", dtype="uint16", **profile) as target:
                target.write(pixels.astype(np.uint16))
    options = PrepareOptions(workers=1, tile=32, val=("s1",), classes=((0, "crop"), (1, "<b>weeds")))
    prepare(root / "source", root / "data", options)
    return root / "data"


def test_the_sums_are_those_of_the_tiles(dataset: Path) -> None:
    """Of a small data set every tile is looked at."""
    schema = Schema.read(dataset)
    glance = look_over(dataset, schema)
    assert glance.tiles == sum(split.tiles for split in schema.splits.values())
    assert (glance.unreadable, glance.footprints) == (0, ())
    counts = np.zeros((len(schema.bands), 256), np.int64)
    pairs = np.zeros((len(schema.classes),) * 2, np.int64)
    for name, split in schema.splits.items():
        reader = SplitReader(dataset, schema, name)
        for tile in range(len(reader)):
            *files, content = reader.read(tile)
            labels = np.empty((schema.tile, schema.tile), np.uint16)
            decompress_into(content, labels)
            planes = [
                decode_part(file, part, schema.dtype, schema.tile)
                for file, part in zip(files, schema.parts, strict=True)
            ]
            pixels = np.concatenate(planes, -1)[valid_mask(labels)]
            counts += [np.bincount(band, minlength=256) for band in pixels.T]
            masks = [class_mask(labels, number).ravel() for number in range(len(schema.classes))]
            pairs += [[int((a & b).sum()) * split.labelled for b in masks] for a in masks]
    np.testing.assert_array_equal(glance.histograms, counts.reshape(len(schema.bands), -1, 4).sum(-1))
    np.testing.assert_array_equal(glance.overlaps, pairs)
    for class_id in range(len(schema.classes)):
        total = sum(split.class_tiles[class_id] for split in schema.splits.values() if split.labelled)
        assert (class_id in glance.examples) == (total > 0)


def test_the_first_example_has_most_of_its_class(dataset: Path) -> None:
    schema = Schema.read(dataset)
    examples = look_over(dataset, schema).examples
    for class_id, (first, *_) in examples.items():
        counts = {}
        for name, split in schema.splits.items():
            for shard in SplitReader(dataset, schema, name).shards() if split.labelled else ():
                for row in range(len(shard.index)):
                    counts[name, shard.key(row)] = int(shard.index["pixels"][row, class_id])
        assert counts[first.split, first.key] == max(counts.values())
        mask = class_mask(first.labels, class_id)
        assert first.share == mask.sum() / valid_mask(first.labels).sum()


def test_a_share_of_a_larger_one_is_looked_at(dataset: Path) -> None:
    schema = Schema.read(dataset)
    glance = look_over(dataset, schema, tiles=5)
    sizes = [split.tiles for split in schema.splits.values()]
    assert glance.tiles == sum(max(1, round(5 * size / sum(sizes))) for size in sizes) < sum(sizes)


def test_tiles_lie_where_their_scenes_do(farm: Path) -> None:
    glance = look_over(farm, Schema.read(farm))
    assert len(glance.footprints) == glance.tiles == 8
    corners = np.concatenate([each.corners for each in glance.footprints if each.split == "val"])
    assert corners.min(0).tolist() == [500640, 5300000 - 640]
    assert corners.max(0).tolist() == [501280, 5300000]


def test_the_page_says_it_all_and_fetches_nothing(farm: Path, dataset: Path) -> None:
    for folder in (farm, dataset):
        schema = Schema.read(folder)
        found, glance = inspect_dataset(folder), look_over(folder, schema)
        page = dataset_page(found, glance)
        assert page == dataset_page(found, look_over(folder, schema))
        parsed = Parsed(page.encode())
        fetched = [e[name] for _, e in parsed.elements for name in ("src", "srcset") if name in e]
        assert fetched and all(source.startswith("data:image/") for source in fetched)
        for _, attributes in parsed.elements:
            assert "style" not in attributes and not any(n.startswith("on") for n in attributes)
        alts = [picture["alt"] for picture in parsed.all("img")]
        text = "\n".join(parsed.texts)
        for name, split in schema.splits.items():
            assert name in text and f"{split.pixels:,}" in text
        assert all(name in text for name in (*schema.classes, *schema.bands))
        for examples in glance.examples.values():
            assert all(any(one.key in alt for alt in alts) for one in examples)
    assert "<b>weeds" not in dataset_page(inspect_dataset(farm), look_over(farm, Schema.read(farm)))
    assert "Where it lies" not in text  # nobody knows of tiles from Agriculture-Vision


def test_damage_is_named_on_the_page(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(dataset, folder)
    schema = Schema.read(folder)
    shard = next(SplitReader(folder, schema, "train").shards())
    with shard.path.open("r+b") as file:
        file.seek(int(shard.index["offsets"][1][0]) + 40)
        file.write(b"\xff" * 20)
    key = shard.key(1)
    out = tmp_path / "page.html"
    assert main(["inspect", str(folder), "--verify", "--page", str(out)]) == 2
    text = "\n".join(Parsed(out.read_bytes()).texts)
    assert key in text and "1 damages" in text and "--repair" in text
    (folder / "val" / "00000.tar").unlink()
    assert main(["inspect", str(folder), "--page", str(out)]) == 2
    assert "val/00000" in out.read_text()
