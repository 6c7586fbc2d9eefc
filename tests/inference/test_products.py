"""All that is made of a scene, together, as a user asks for it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyogrio
import pystac
import pytest
import rasterio
import shapely
from rio_cogeo.cogeo import cog_validate

from agrivision import predict_array, predict_scene
from agrivision.errors import BadInput, SourceError
from agrivision.inference.predict import PredictOptions, predict
from agrivision.inference.products import Products
from agrivision.inference.trained import TrainedModel
from tests.inference.small import smooth, write_scene
from tests.inference.test_parts import Counter, outputs, seen, times  # noqa: F401 - a fixture

EVERYTHING = {"confidence": True, "probabilities": True, "polygons": True}
SUFFIXES = (
    ".tif", ".confidence.tif", ".probabilities.tif", ".qml", ".confidence.qml", ".png", ".gpkg",
    ".geojson", ".fields.csv", ".json", ".html",
)  # fmt: skip


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    image = smooth(np.random.default_rng(8), 150, 130)
    image[:, :20, :30] = 0
    return write_scene(tmp_path / "in/s.tif", image, nodata=0)


@pytest.fixture
def boundaries(scene: Path) -> Path:
    """The left half of the scene, and a field far away."""
    with rasterio.open(scene) as dataset:
        left, bottom, right, top = dataset.bounds
        crs = dataset.crs.to_wkt()
    fields = [shapely.box(left, bottom, (left + right) / 2, top), shapely.box(0, 0, 9, 9)]
    path = scene.with_name("fields.gpkg")
    pyogrio.raw.write(
        path, np.array([shapely.to_wkb(field) for field in fields], object),
        [np.array(["west", "elsewhere"], object)], ["name"], geometry_type="Polygon", crs=crs,
    )  # fmt: skip
    return path


def test_everything_at_once(
    trained: TrainedModel, scene: Path, boundaries: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = PredictOptions(tile=64, products=Products(fields=boundaries, **EVERYTHING))
    predict(trained, [scene], out, options)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [".predict", *(f"s{suffix}" for suffix in SUFFIXES)]
    )
    with rasterio.open(out / "s.tif") as map_, rasterio.open(out / "s.confidence.tif") as layer:
        ids, confidence = map_.read(1), layer.read(1)
        assert tuple(map_.transform) == tuple(layer.transform)
    with rasterio.open(out / "s.probabilities.tif") as dataset:
        probabilities = dataset.read()
        assert dataset.descriptions == trained.description.classes
    known = ids != 255
    assert known.sum() == ids.size - 20 * 30
    np.testing.assert_array_equal(confidence == 0, ~known)
    best = np.take_along_axis(probabilities, np.where(known, ids, 0)[None], 0)[0]
    np.testing.assert_array_equal(np.maximum(best, 1)[known], confidence[known])
    for name in ("s.tif", "s.confidence.tif", "s.probabilities.tif"):
        assert cog_validate(out / name, strict=True)[0]
    item = pystac.Item.from_file(out / "s.json")
    assert {Path(asset.href).name for asset in item.assets.values()} == {
        f"s{suffix}" for suffix in SUFFIXES if suffix != ".json"
    }
    areas = pyogrio.raw.read(out / "s.gpkg", layer="anomalies", columns=["class_id", "hectares"])[3]
    with (out / "s.fields.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["field"] for row in rows} == {"west"}
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=1e-3)
    pixels = np.bincount(ids[known], minlength=9)
    whole = areas[1].sum()
    for class_id in range(1, 9):  # the background has no polygons
        share = pixels[class_id] / pixels[1:].sum()
        found = areas[1][areas[0] == class_id].sum()
        assert found == pytest.approx(whole * share, rel=1e-6)
    page = (out / "s.html").read_text()
    assert all(f"s{suffix}" in page for suffix in SUFFIXES if suffix != ".html")


def test_what_is_asked_for_later_is_made_without_the_network(
    trained: TrainedModel,
    scene: Path,
    seen: Counter,  # noqa: F811
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    small = PredictOptions(tile=64, products=Products(confidence=True))
    predict(trained, [scene], out, small)
    before, images = times(out), seen.images
    options = PredictOptions(tile=64, products=Products(polygons=True, smallest=2.0, simplify=0.5))
    predict(trained, [scene], out, options)
    assert seen.images == images
    assert (out / "s.gpkg").exists()
    layers = {path: time for path, time in times(out).items() if path.suffix == ".tif"}
    assert layers == {path: time for path, time in before.items() if path.suffix == ".tif"}
    whole = outputs(out)
    predict(trained, [scene], out, options)
    assert times(out).keys() == before.keys()
    assert outputs(out) == whole
    predict(trained, [scene], tmp_path / "new", options)
    assert outputs(tmp_path / "new") == whole


def test_several_scenes_have_an_index(trained: TrainedModel, scene: Path, tmp_path: Path) -> None:
    write_scene(scene.with_name("t.tif"), smooth(np.random.default_rng(1), 40, 50))
    predict(trained, [scene.parent], tmp_path / "out", PredictOptions(tile=64))
    page = (tmp_path / "out/index.html").read_text()
    assert 'href="./s.html"' in page
    assert 'href="./t.html"' in page
    write_scene(scene.with_name("index.tif"), smooth(np.random.default_rng(1), 40, 50))
    with pytest.raises(SourceError, match="would both become"):
        predict(trained, [scene.parent], tmp_path / "other", PredictOptions(tile=64))


def test_arrays_are_predicted_as_files(trained: TrainedModel, scene: Path, tmp_path: Path) -> None:
    options = PredictOptions(tile=64, symmetries=True, products=Products(probabilities=True))
    (path,) = predict_scene(trained, scene, tmp_path / "out", options).maps
    with rasterio.open(scene) as dataset:
        image = dataset.read()
    found = predict_array(trained, image, options, valid=(image != 0).any(0))
    with rasterio.open(path) as map_, rasterio.open(tmp_path / "out/s.probabilities.tif") as layer:
        np.testing.assert_array_equal(found.ids, map_.read(1))
        np.testing.assert_array_equal(np.round(found.probabilities * 255), layer.read())
    assert found.classes == trained.description.classes
    np.testing.assert_allclose(found.confidence, found.probabilities.max(0), atol=1 / 254)


@pytest.mark.parametrize("shape", [(3, 20, 20), (4, 20), (4, 0, 5)])
def test_arrays_that_do_not_fit(trained: TrainedModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match="red, green, blue, nir"):
        predict_array(trained, np.zeros(shape, np.uint8))


def test_it_does_not_matter_where_the_windows_begin(trained: TrainedModel) -> None:
    """Of a network that sees less far than the margin, nothing but rounding: a 255th."""
    image = smooth(np.random.default_rng(5), 200, 240)
    options = PredictOptions(tile=64, margin=32, overlap=16)
    whole = predict_array(trained, image, options)
    moved = predict_array(trained, image[:, 36:, 20:], options)
    inner = slice(32, -32)
    one = whole.probabilities[:, 36:, 20:][:, inner, inner]
    two = moved.probabilities[:, inner, inner]
    assert np.abs(one - two).max() <= 1.01 / 255


@pytest.mark.parametrize(
    "changes",
    [
        {"smallest": -1.0, "polygons": True},
        {"simplify": 1.0},
        {"background": True},
        {"field_name": "a"},
    ],
)
def test_products_that_make_no_sense(changes: dict[str, object]) -> None:
    with pytest.raises(BadInput, match=next(iter(changes))):
        Products(**changes)  # type: ignore[arg-type]


def test_fields_that_cannot_be_used_are_found_before_the_work(
    trained: TrainedModel,
    scene: Path,
    seen: Counter,  # noqa: F811
    tmp_path: Path,
) -> None:
    bad = tmp_path / "fields.geojson"
    bad.write_text(json.dumps({"type": "nothing"}))
    with pytest.raises(SourceError, match=r"fields\.geojson"):
        predict(trained, [scene], tmp_path / "out", PredictOptions(products=Products(fields=bad)))
    assert not seen.images
    assert not (tmp_path / "out").exists()
