"""Networks that see pixels relative to their field, and indices as channels, wherever they predict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from agrivision import predict_array, predict_scene
from agrivision.data.fields import FieldStatistics
from agrivision.data.indices import ratio
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.errors import BadInput, CheckpointError, SourceError
from agrivision.inference import export as exporting
from agrivision.inference.about import About
from agrivision.inference.export import BOUND, Samples, export
from agrivision.inference.exported import load_model
from agrivision.inference.predictor import Predictor
from agrivision.inference.scene import look
from agrivision.inference.tilesets import open_dataset, open_folder
from agrivision.inference.trained import Description, TrainedModel
from tests.inference import small

INDICES = ("ndvi", "ndwi")


def relative(folder: Path, scope: str, absolute: bool) -> TrainedModel:
    return small.trained_model(folder, scope=scope, indices=INDICES, absolute=absolute)


@pytest.fixture(scope="module", params=[False, True], ids=["relative", "both ways"])
def by_field(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> TrainedModel:
    """A network that sees pixels relative to their field."""
    return relative(tmp_path_factory.mktemp("field"), "field", request.param)


@pytest.fixture(scope="module", params=[False, True], ids=["relative", "both ways"])
def by_tile(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> TrainedModel:
    """A network that sees pixels relative to the tile."""
    return relative(tmp_path_factory.mktemp("tile"), "tile", request.param)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """A scene of several windows, with an edge that nobody photographed."""
    image = small.smooth(np.random.default_rng(1), 150, 170)
    image[:, :, :20] = 0
    return image


def test_a_scene_lends_its_own_statistics(
    by_field: TrainedModel, image: np.ndarray, tmp_path: Path
) -> None:
    path = small.write_scene(tmp_path / "scene.tif", image, nodata=0)
    scene = look(path, by_field.description)
    assert scene.statistics is not None
    there = image[:, :, 20:].reshape(4, -1).astype(np.float64)
    channels = np.stack([*there, ratio(there[3], there[0]), ratio(there[1], there[3])])
    mean, std = scene.statistics
    assert mean == pytest.approx(channels.mean(1))
    assert std == pytest.approx(channels.std(1))


def test_a_map_of_a_file_is_that_of_the_array(
    by_field: TrainedModel, image: np.ndarray, tmp_path: Path
) -> None:
    import rasterio

    path = small.write_scene(tmp_path / "scene.tif", image, nodata=0)
    predict_scene(by_field, path, tmp_path / "out")
    valid = (image != 0).any(0)
    found = predict_array(by_field, image, valid=valid)
    with rasterio.open(tmp_path / "out" / "scene.tif") as dataset:
        assert np.array_equal(dataset.read(1), found.ids)
    assert len(np.unique(found.ids)) > 2


def test_darker_light_over_a_whole_scene_changes_nothing(tmp_path: Path, image: np.ndarray) -> None:
    bands_only = small.trained_model(tmp_path, scope="field", dtype="float32", nodata=None)
    valid = np.ones(image.shape[1:], np.bool_)
    bright = image.astype(np.float32)
    one = predict_array(bands_only, bright, valid=valid)
    other = predict_array(bands_only, bright * np.float32(0.5) + 3, valid=valid)
    assert np.mean(one.ids != other.ids) < 1e-3
    plain = small.trained_model(tmp_path / "plain", dtype="float32")
    changed = predict_array(plain, bright * np.float32(0.5) + 3, valid=valid).ids
    assert np.mean(predict_array(plain, bright, valid=valid).ids != changed) > 0.05


def test_tiles_of_a_data_set_are_seen_by_their_field(by_field: TrainedModel, tmp_path: Path) -> None:
    source = small.agriculture_vision(tmp_path / "av", {"train": 3, "val": 5})
    folder = small.prepared(source, tmp_path / "ds")
    schema = Schema.read(folder)
    predictor = Predictor.of([by_field])
    for tiles in open_dataset(folder, None, by_field.description):
        fields = FieldStatistics.of(SplitReader(folder, schema, tiles.split))
        numbers = [tiles.keys.index(key) for key in tiles.keys]
        for batch in tiles.batches([0], 8, 0, torch.device("cpu")):
            assert batch.statistics is not None
            assert torch.equal(batch.statistics, fields[numbers[: len(batch.keys)]])
            found = predictor.probabilities(batch.images, statistics=batch.statistics)
            wanted = by_field.probabilities(batch.images, statistics=batch.statistics)
            assert torch.equal(found, wanted)
            assert not torch.equal(found, predictor.probabilities(batch.images))
    with pytest.raises(SourceError, match="prepare the folder, and predict the data set"):
        open_folder(source, None, by_field.description)


def samples(images: np.ndarray) -> Samples:
    return Samples(batches=(images[None].astype(np.float32),), origin="a test")


FORMS = pytest.mark.parametrize(
    ("form", "suffix", "bound"),
    [("safetensors", ".safetensors", 0), ("torch-export", ".pt2", 1e-5), ("onnx", ".onnx", BOUND)],
)


@FORMS
def test_a_network_by_tile_can_be_exported(
    by_tile: TrainedModel, image: np.ndarray, tmp_path: Path, form: Any, suffix: str, bound: float
) -> None:
    found = export(by_tile, tmp_path / f"net{suffix}", form, samples(image[:, :64, 20:84]))
    assert found.comparison.difference <= bound


@FORMS
def test_a_graph_is_told_of_the_field(
    by_field: TrainedModel, image: np.ndarray, tmp_path: Path, form: Any, suffix: str, bound: float
) -> None:
    import rasterio

    file = tmp_path / f"net{suffix}"
    export(by_field, file, form, samples(image[:, :64, 20:84]))
    again = load_model(file, "cpu")
    path = small.write_scene(tmp_path / "scene.tif", image, nodata=0)
    statistics = torch.tensor([look(path, again.description).statistics])
    part = image[None, :, 30:77, 40:93]  # a window, which must not be taken for the field
    found, wanted = (each.probabilities(part, statistics=statistics) for each in (again, by_field))
    # The bound holds for the samples of the export; weights this large make twice as much of rounding.
    torch.testing.assert_close(found, wanted, rtol=0, atol=2 * bound)
    assert not torch.allclose(by_field.probabilities(part), wanted, atol=BOUND)
    ids = []
    for number, network in enumerate((again, by_field)):
        predict_scene(network, path, tmp_path / str(number))
        with rasterio.open(tmp_path / str(number) / "scene.tif") as dataset:
            ids.append(dataset.read(1))
    assert np.mean(ids[0] != ids[1]) <= bound
    card = (tmp_path / f"net{suffix}.md").read_text()
    assert "red, green, blue, nir, ndvi, ndwi" in card
    assert "field: (1, 2, 6) float32" in card


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_graph_and_its_description_agree_on_what_it_takes(
    by_tile: TrainedModel, image: np.ndarray, tmp_path: Path, suffix: str
) -> None:
    form: Any = {".onnx": "onnx", ".pt2": "torch-export"}[suffix]
    claimed = replace(by_tile, description=replace(by_tile.description, scope="field"))
    file = tmp_path / f"net{suffix}"
    with (
        patch.object(exporting, "_said", lambda _: About.of(claimed).to_text()),
        pytest.raises(BadInput, match="its graph takes 1 inputs, its description says 2"),
    ):
        export(by_tile, file, form, samples(image[:, :64, 20:84]))
    assert not file.exists()


def test_networks_that_see_otherwise_are_not_averaged(
    by_field: TrainedModel, by_tile: TrainedModel
) -> None:
    with pytest.raises(BadInput, match="their scope differ"):
        Predictor.of([by_field, by_tile])


def test_a_description_of_indices_without_their_bands_is_refused(by_field: TrainedModel) -> None:
    content = replace(by_field.description, indices=("ndre",)).to_dict()
    with pytest.raises(CheckpointError, match="no band rededge"):
        Description.from_dict(content)
    for changes, said in (
        ({"indices": ["nonsense"]}, "nonsense"),
        ({"indices": ["ndvi", "ndvi"]}, "stands twice"),
        ({"indices": [["ndvi"]]}, "unhashable"),
        ({"indices": [], "scope": "planet"}, "relative to 'planet'"),
        ({"indices": [], "absolute": 2}, "absolute is '2'"),
        ({"indices": [], "scope": "data", "absolute": True}, "absolute is 'True'"),
    ):
        with pytest.raises(CheckpointError, match=said):
            Description.from_dict(content | changes)
