"""Scenes and label rasters: cut, kept with their coordinates, put together again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st

from agrivision.data.labels import VALID_BIT, decompress_into
from agrivision.data.parts import decode_part, tiff_coordinates
from agrivision.data.shards import SplitReader
from agrivision.data.sources.rasters import windows
from agrivision.data.sources.survey import parse_classes
from agrivision.errors import SourceError
from tests.data import scenes

NAIP = Path(__file__).parents[3] / "shared" / "naip"


def tiles_of(summary):
    """Key, image (bands, height, width), labels and the file of every tile."""
    for name in summary.schema.splits:
        reader = SplitReader(summary.out, summary.schema, name)
        size = summary.schema.tile
        for tile in range(len(reader)):
            image, labels_file = reader.read(tile)
            labels = np.empty((size, size), np.uint16)
            decompress_into(labels_file, labels)
            pixels = decode_part(image, summary.schema.parts[0], summary.schema.dtype, size)
            yield reader.key(tile), pixels.transpose(2, 0, 1), labels, bytes(image)


def window_of(key: str) -> tuple[str, list[int]]:
    name, _, edges = key.rpartition("_")
    return name, [int(edge) for edge in edges.split("-")]


def mosaic(summary, shapes):
    """Scenes and label sets put together from their tiles."""
    schema = summary.schema
    images = {k: np.zeros((len(schema.bands), h, w), schema.dtype) for k, (h, w) in shapes.items()}
    labels = {k: np.zeros((h, w), np.uint16) for k, (h, w) in shapes.items()}
    for key, image, bits, _ in tiles_of(summary):
        name, (x1, y1, x2, y2) = window_of(key)
        height, width = shapes[name]
        inside = np.s_[: min(y2, height) - y1, : min(x2, width) - x1]
        images[name][:, y1:y2, x1:x2] = image[(slice(None), *inside)]
        labels[name][y1:y2, x1:x2] = bits[inside]
        outside = bits.copy()
        outside[inside] = 0
        assert not outside.any()
    return images, labels


@pytest.mark.parametrize(
    ("bands", "dtype"), [(4, "uint8"), (6, "uint16"), (2, "int16"), (1, "uint32"), (3, "float32")]
)
@pytest.mark.parametrize("stride", [32, 20])
def test_the_tiles_put_together_are_the_scenes(tmp_path, prepared, bands, dtype, stride):
    source = tmp_path / "source"
    pairs = scenes.write_source(source, shape=(bands, 50, 70), dtype=dtype)
    summary = prepared(source, tile=32, stride=stride, strict=True)
    images, labels = mosaic(summary, dict.fromkeys(pairs, (50, 70)))
    for name, (image, values) in pairs.items():
        assert images[name].dtype == image.dtype
        np.testing.assert_array_equal(images[name], image)
        np.testing.assert_array_equal(labels[name], 1 << values.astype(int) | 1 << VALID_BIT)
    schema = summary.schema
    assert len(schema.bands) == bands
    if bands in (3, 4):
        assert schema.bands == ("red", "green", "blue", "nir")[:bands]
    assert (schema.classes, schema.class_values) == (("class_0", "class_1", "class_2"), (0, 1, 2))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32", "float32"])
def test_statistics_of_every_type(tmp_path, prepared, dtype):
    source = tmp_path / "source"
    pairs = scenes.write_source(source, dtype=dtype)
    summary = prepared(source, tile=32, val=("s1.tif",), shard_tiles=3)
    values = np.concatenate([pairs[name][0].reshape(4, -1) for name in ("s0", "s2")], axis=1)
    statistics = summary.schema.statistics
    assert statistics.pixels == values.shape[1]
    n = values.shape[1]
    if dtype == "float32":
        np.testing.assert_allclose(statistics.mean, values.astype(float).mean(axis=1), rtol=1e-12)
        np.testing.assert_allclose(statistics.std, values.astype(float).std(axis=1), rtol=1e-12)
    else:
        exact = [list(map(int, band)) for band in values.tolist()]
        assert statistics.mean == tuple(sum(band) / n for band in exact)
        spread = [n * sum(v * v for v in band) - sum(band) ** 2 for band in exact]
        np.testing.assert_allclose(statistics.std, [s**0.5 / n for s in spread], rtol=1e-15)
    assert statistics.minimum == tuple(values.min(axis=1))
    assert statistics.maximum == tuple(values.max(axis=1))


def test_a_tile_keeps_its_coordinates(tmp_path, prepared):
    source = tmp_path / "source"
    scenes.write_source(source, scenes=1, nodata=0)
    for key, _, _, content in tiles_of(prepared(source, tile=32)):
        _, (x1, y1, _, _) = window_of(key)
        coordinates = tiff_coordinates(content)
        assert rasterio.CRS.from_wkt(coordinates.crs) == rasterio.CRS.from_string(scenes.CRS)
        assert coordinates.transform == (5, 0, 486_000 + 5 * x1, 0, -5, 5_209_000 - 5 * y1)
        with rasterio.MemoryFile(content) as memory, memory.open() as dataset:
            assert dataset.nodata == 0
            assert [colour.name for colour in dataset.colorinterp][-1] != "alpha"


def test_nodata_means_all_bands(tmp_path, prepared):
    image = scenes.noise(0, (4, 32, 32)) | 1
    image[:, :5] = 0
    image[1, 10] = 0
    labels = np.ones((32, 32), np.uint8)
    labels[20, :7] = 255
    labels[21, :7] = 9
    source = tmp_path / "source"
    scenes.write_raster(source / "scenes/a.tif", image, nodata=0)
    scenes.write_raster(source / "labels/a.tif", labels, nodata=255)
    summary = prepared(source, tile=32, ignore=9)
    ((_, _, bits, _),) = tiles_of(summary)
    wanted = np.ones((32, 32), bool)
    wanted[:5] = wanted[20, :7] = wanted[21, :7] = False
    np.testing.assert_array_equal(bits >> VALID_BIT == 1, wanted)
    assert summary.schema.classes == ("class_1",)
    assert summary.schema.nodata == 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pixels_that_are_not_finite_hold_no_data(tmp_path, prepared, dtype):
    image = scenes.noise(0, (3, 40, 40), dtype)
    image[1, 3, 4], image[:, 0], image[2, 39, 39] = np.nan, np.nan, np.inf
    image[0, 20, 20] = -np.finfo(dtype).max if dtype == "float64" else 7
    source = tmp_path / "source"
    scenes.write_raster(source / "scenes/a.tif", image, nodata=np.nan)
    scenes.write_raster(source / "labels/a.tif", np.ones((40, 40), np.uint8))
    summary = prepared(source, tile=32)
    images, labels = mosaic(summary, {"a": (40, 40)})
    np.testing.assert_array_equal(images["a"], image)
    wanted = (np.isfinite(image) & (np.abs(image) < 1e100)).all(axis=0)
    np.testing.assert_array_equal(labels["a"] >> VALID_BIT == 1, wanted)
    assert np.isfinite(summary.schema.statistics.mean).all()


def test_a_mask_or_alpha_band_says_what_is_valid(tmp_path, prepared):
    on = scenes.noise(5, (32, 32)) > 100
    image = scenes.noise(0, (3, 32, 32))
    alpha = np.concatenate([image, on[None].astype(np.uint8) * 255])
    for name in ("mask", "alpha"):
        scenes.write_raster(tmp_path / name / "labels/a.tif", np.ones((32, 32), np.uint8))
    scenes.write_raster(tmp_path / "alpha/scenes/a.tif", alpha, photometric="RGB", alpha="YES")
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        scenes.write_raster(tmp_path / "mask/scenes/a.tif", image)
        with rasterio.open(tmp_path / "mask/scenes/a.tif", "r+") as dataset:
            dataset.write_mask(on)
    for name in ("mask", "alpha"):
        summary = prepared(tmp_path / name, tile=32)
        assert summary.schema.bands == ("red", "green", "blue")
        ((_, pixels, bits, _),) = tiles_of(summary)
        np.testing.assert_array_equal(pixels, image)
        np.testing.assert_array_equal(bits >> VALID_BIT == 1, on)
    assert prepared(tmp_path / "alpha", tile=32, bands=tuple("rgba")).schema.bands == tuple("rgba")


def test_tiles_without_a_valid_pixel_are_left_out(tmp_path, prepared):
    source = tmp_path / "source"
    image = scenes.noise(0, (4, 32, 96)) | 1
    image[:, :, 32:64] = 0
    scenes.write_raster(source / "scenes/a.tif", image, nodata=0)
    scenes.write_raster(source / "labels/a.tif", np.ones((32, 96), np.uint8))
    summary = prepared(source, tile=32, shard_tiles=1)
    assert (summary.tiles, summary.blank) == (2, 1)
    assert [shard.name for shard in summary.schema.splits["train"].shards] == ["00000", "00002"]
    assert len(list(summary.out.glob("train/*"))) == 4


def test_band_names(tmp_path, prepared):
    source = tmp_path / "source"
    scenes.write_source(source, scenes=1, shape=(6, 32, 32))
    assert prepared(source).schema.bands == tuple(f"band_{i}" for i in range(1, 7))
    assert prepared(source, bands=tuple("abcdef")).schema.bands == tuple("abcdef")
    with pytest.raises(SourceError, match="6 different band names"):
        prepared(source, bands=("a",))
    with rasterio.open(source / "scenes/s0.tif", "r+") as dataset:
        dataset.descriptions = [f"B{i:02d}" for i in range(6)]
    assert prepared(source).schema.bands == tuple(f"B{i:02d}" for i in range(6))


def test_classes_by_name_and_values_that_are_none(tmp_path, prepared):
    source = tmp_path / "source"
    pairs = scenes.write_source(source)
    classes = parse_classes("2:bare,0:vegetation")
    summary = prepared(source, tile=32, classes=classes)
    assert summary.schema.classes == ("bare", "vegetation")
    assert summary.schema.class_values == (2, 0)
    assert summary.problem_kinds == {"unknown value": 1}  # one line for a value, not for each raster
    ones = sum(np.count_nonzero(labels == 1) for _, labels in pairs.values())
    assert str(summary.problems[0]) == (
        f"{source}/labels/s0.tif: 1 is in all 3 label rasters, and no class ({ones} pixels, not valid):"
        " add 1:NAME to --classes, or --ignore 1"
    )
    _, labels = mosaic(summary, dict.fromkeys(pairs, (50, 70)))
    valid = 1 << VALID_BIT
    wanted = np.array([2 | valid, 0, 1 | valid])
    np.testing.assert_array_equal(labels["s0"], wanted[pairs["s0"][1]])
    with pytest.raises(SourceError, match=r"labels/s0.tif: 1 is in all"):
        prepared(source, classes=classes, strict=True)


def test_each_value_that_is_none_is_said_once(tmp_path, prepared):
    for name, first in (("a", 0), ("b", 10)):
        values = np.arange(first, first + 32, dtype=np.uint8)
        scenes.write_raster(tmp_path / f"scenes/{name}.tif", scenes.noise(0, (4, 32, 32)))
        scenes.write_raster(tmp_path / f"labels/{name}.tif", np.repeat(values[None], 32, 0))
    problems = prepared(tmp_path, tile=32, classes=parse_classes("0:a,10:b,11:c"), ignore=1).problems
    lines = [str(problem) for problem in problems]
    assert len(lines) == 16  # 2 to 9 and 12 to 18, and one for those from 19 to 41
    assert (
        "a.tif: 2 is in 1 of 2 label rasters, and no class (32 pixels, not valid): add 2:" in lines[0]
    )
    assert "--ignore" not in lines[0]  # there is one value to ignore, and it is given
    assert "a.tif: 12 is in all 2 label rasters, and no class (64 pixels" in lines[8]
    assert lines[-1].endswith("23 further values in the label rasters are no classes either")


@pytest.mark.parametrize(
    ("folders", "given", "said"),
    [
        (["scenes"], ".", r"has scenes/ but no labels/: scenes and labels go together$"),
        (["labels"], ".", r"has labels/ but no scenes/"),
        (["scenes", "Labels"], ".", r"has Labels/ and scenes/ but no labels/.*; call Labels labels$"),
        (
            ["Scenes", "Labels"],
            ".",
            r"no scenes/ and no labels/.*; call Labels labels; call Scenes scenes$",
        ),
        (["scenes", "labels"], "scenes", r"scenes is one of .*: give the folder above, .*/source$"),
        (["scenes", "labels"], "labels", r"labels is one of .*: give the folder above, .*/source$"),
        (["scenes"], "scenes", r"give the folder above, .*/source$"),
        (["pictures"], ".", r"is no source"),
    ],
)
def test_half_a_source(folders, given, said, tmp_path, prepared):
    for name in folders:
        (tmp_path / "source" / name).mkdir(parents=True)
    with pytest.raises(SourceError, match=said):
        prepared(tmp_path / "source" / given)


@pytest.mark.parametrize("text", ["vegetation", "a:b", "0:a,0:b", "0:a,1:a", "0:", "0:valid", ""])
def test_classes_that_are_none(text):
    with pytest.raises(SourceError, match="classes"):
        parse_classes(text)


def test_too_many_classes(tmp_path, prepared):
    scenes.write_source(tmp_path, values=16)
    with pytest.raises(SourceError, match=r"16 different values .*--classes"):
        prepared(tmp_path)


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lambda root: (root / "labels/s1.tif").unlink(), "unpaired"),
        (lambda root: (root / "scenes/s1.tif").unlink(), "unpaired"),
        (lambda root: (root / "scenes/s1.tif").write_bytes(b"nothing"), "unreadable"),
        (lambda root: (root / "labels/s1.tif").write_bytes(b"nothing"), "unreadable"),
        (lambda root: (root / "scenes/s1.vrt").write_text("<VRTDataset/>"), "format"),
        (lambda root: relabel(root, shape=(50, 71)), "wrong size"),
        (lambda root: relabel(root, crs="EPSG:32614"), "coordinates"),
        (lambda root: relabel(root, transform=shifted()), "coordinates"),
        (lambda root: relabel(root, shape=(2, 50, 70)), "labels"),
        (lambda root: relabel(root, dtype="float32"), "labels"),
    ],
)
def test_a_scene_that_does_not_fit_is_named_and_left_out(tmp_path, prepared, capfd, damage, kind):
    scenes.write_source(tmp_path / "source")
    damage(tmp_path / "source")
    capfd.readouterr()
    summary = prepared(tmp_path / "source")
    assert summary.problem_kinds == {kind: 1}
    assert "s1." in summary.problems[0].path
    with pytest.raises(SourceError, match=r"s1\."):
        prepared(tmp_path / "source", strict=True)
    assert capfd.readouterr() == ("", "")


def shifted():
    return rasterio.transform.from_origin(486_003, 5_209_000, 5, 5)


def relabel(root, shape=(50, 70), dtype="uint8", **options):
    labels = np.full(shape, 0.5 if dtype == "float32" else 1, dtype)
    scenes.write_raster(root / "labels/s1.tif", labels, **options)


def test_a_truncated_scene_costs_the_tiles_that_are_lost(tmp_path, prepared):
    source = tmp_path / "source"
    scenes.write_source(source, tiled=True, blockxsize=32, blockysize=32)
    path = source / "scenes/s1.tif"
    path.write_bytes(path.read_bytes()[:-5000])
    summary = prepared(source, tile=32)
    assert set(summary.problem_kinds) == {"unreadable"}
    assert 1 <= len(summary.problems) <= 3
    assert {problem.path for problem in summary.problems} == {str(path)}
    assert summary.tiles == 18 - len(summary.problems)


def test_labels_without_coordinates_are_taken_as_they_are(tmp_path, prepared):
    source = tmp_path / "source"
    scenes.write_raster(source / "scenes/a.tif", scenes.noise(0, (4, 32, 32)))
    scenes.write_raster(
        source / "labels/a.png", np.ones((32, 32), np.uint8), driver="PNG", crs=None, transform=None
    )
    assert prepared(source, strict=True).tiles == 1


def test_scenes_that_differ(tmp_path, prepared):
    scenes.write_source(tmp_path)
    scenes.write_raster(tmp_path / "scenes/s1.tif", scenes.noise(0, (4, 50, 70), "uint16"))
    with pytest.raises(SourceError, match=r"s1.tif has 4 bands of uint16, but .*s0.tif 4 of uint8"):
        prepared(tmp_path)


def test_names_that_collide(tmp_path, prepared):
    scenes.write_source(tmp_path, scenes=1)
    for folder in ("scenes", "labels"):
        (tmp_path / folder / "a b.tif").write_bytes((tmp_path / folder / "s0.tif").read_bytes())
        (tmp_path / folder / "a.b.tif").write_bytes((tmp_path / folder / "s0.tif").read_bytes())
    with pytest.raises(SourceError, match="same name 'a-b'"):
        prepared(tmp_path)


def test_a_table(tmp_path, prepared):
    scenes.write_source(tmp_path / "data")
    table = tmp_path / "table.csv"
    rows = [f"data/scenes/s{i}.tif,data/labels/s{i}.tif" for i in range(3)]
    table.write_text("scene,label\n" + "\n".join(rows))
    assert set(prepared(table).schema.splits) == {"train", "val"}
    assert prepared(table, val=("s1",)).schema.splits["val"].tiles == 1
    splits = ["train", "val", "holdout"]
    lines = [f"{row},{split}" for row, split in zip(rows, splits, strict=True)]
    table.write_text("scene,label,split\n" + "\n".join(lines))
    assert list(prepared(table).schema.splits) == splits
    with pytest.raises(SourceError, match=r"has its own splits .*--val"):
        prepared(table, val=("s1",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "columns scene, label"),
        ("image,label\na,b\n", "it has image, label"),
        ("scene,label\nhttp://x/a.tif,b.tif\n", "line 2: 'http://x/a.tif' is not the path"),
        ("scene,label\n/vsicurl/http:a.tif,b.tif\n", "is not the path"),
        ("scene,label\ns.tif,\n", "line 2: '' is not the path"),
        ("scene,label,split\na.tif,b.tif,../x\n", "cannot name a split"),
        ("scene,label\nmissing.tif,b.tif\n", "missing.tif: missing"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, prepared, text, message):
    table = tmp_path / "table.csv"
    table.write_text(text)
    with pytest.raises(SourceError, match=message):
        prepared(table)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 99), st.integers(1, 99), st.integers(1, 40), st.integers(1, 50))
def test_windows_cover_the_scene(height, width, tile, stride):
    times = np.zeros((height, width), int)
    for x1, y1, x2, y2 in windows(height, width, tile, stride):
        assert (x2 - x1, y2 - y1, x1 % stride, y1 % stride) == (tile, tile, 0, 0)
        assert x1 < width
        assert y1 < height
        fresh = times[y1:y2, x1:x2] == 0
        assert fresh.any()
        times[y1:y2, x1:x2] += 1
    if stride <= tile:
        assert times.min() >= 1
    if stride == tile:
        assert times.max() == 1


@pytest.mark.naip
@pytest.mark.skipif(not NAIP.is_dir(), reason="no real scenes beside the checkout")
def test_real_scenes(prepared):
    summary = prepared(NAIP, val=("20180716", "20200831.tif"), tile=256, strict=True)
    assert (summary.schema.bands, summary.schema.nodata) == (("red", "green", "blue", "nir"), 0)
    assert {name: split.tiles for name, split in summary.schema.splits.items()} == {
        "train": 72,
        "val": 24,
    }
    shapes = {}
    for path in NAIP.glob("scenes/*.tif"):
        with rasterio.open(path) as scene:
            shapes[path.stem] = scene.shape
    images, labels = mosaic(summary, shapes)
    for stem in shapes:
        with rasterio.open(NAIP / f"scenes/{stem}.tif") as scene:
            pixels = scene.read()
        with rasterio.open(NAIP / f"labels/{stem}.tif") as label:
            values = label.read(1)
        np.testing.assert_array_equal(images[stem], pixels)
        valid = (values != 255) & pixels.any(axis=0)
        np.testing.assert_array_equal(labels[stem] >> VALID_BIT == 1, valid)
        np.testing.assert_array_equal(labels[stem][valid] & 7, 1 << values[valid])
