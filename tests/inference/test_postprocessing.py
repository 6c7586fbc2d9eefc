"""Post-processing: what changes nothing changes no bit, and blocks have no say in what it does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from agrivision.data.labels import VALID_BIT
from agrivision.errors import BadInput
from agrivision.evaluation.confusion import confusion_matrix, matrices_of_counts
from agrivision.inference import counting, scenes
from agrivision.inference.api import predict_array
from agrivision.inference.blend import decide
from agrivision.inference.card import card
from agrivision.inference.counting import (
    AREAS,
    FACTORS,
    AreaCounts,
    areas_of,
    at_each_factor,
    first_wins,
)
from agrivision.inference.postprocessing import (
    Chosen,
    Postprocessing,
    find_postprocessing,
    weights_digest,
)
from agrivision.inference.predict import PredictOptions, predict
from agrivision.inference.products import Products
from agrivision.inference.recorded import RecordedTile, Recording, Spill
from agrivision.inference.trained import TrainedModel
from agrivision.maps.legend import NODATA
from agrivision.maps.specks import without_specks
from tests.inference.small import CLASSES, smooth, trained_model, write_scene
from tests.inference.test_tiles import files, ids_in

COUNT = len(CLASSES)
NEUTRAL = Postprocessing.neutral(CLASSES)
HARD = Postprocessing(
    classes=CLASSES,
    factors=tuple(1.0 if number % 3 else 1.4 for number in range(COUNT)),
    areas=tuple(60 if number % 2 else 0 for number in range(COUNT)),
)
ONE = PredictOptions(batch_size=2, threads=0)


def chosen(trained: TrainedModel, how: Postprocessing = HARD) -> Chosen:
    return Chosen(
        how=how,
        step=trained.step,
        weights=weights_digest(trained),
        data_fingerprint="a" * 64,
        split="val",
        objective="miou",
        symmetries=False,
        precision="fp32",
        before=0.5,
        after=0.75,
        crossed=0.625,
    )


# What changes nothing


def test_neutral_predictions_are_the_same_bytes(
    trained: TrainedModel, source: Path, tmp_path: Path
) -> None:
    scene = write_scene(tmp_path / "s.tif", smooth(np.random.default_rng(1), 150, 170))
    for name, postprocessing in (("plain", None), ("neutral", NEUTRAL)):
        options = replace(
            ONE, postprocessing=postprocessing, split=None, products=Products(confidence=True)
        )
        predict(trained, [source, scene], tmp_path / name, options)
    plain, neutral = files(tmp_path / "plain"), files(tmp_path / "neutral")
    assert plain == neutral


@given(arrays(np.float32, (2, 3, 4, 5), elements=st.floats(0, 1, width=32)))
def test_neutral_decisions_are_the_likeliest_classes(values) -> None:
    probabilities = torch.from_numpy(values)
    valid = torch.ones(2, 4, 5, dtype=torch.bool)
    neutral = Postprocessing.neutral("abc")
    assert torch.equal(neutral.decide(probabilities, valid), probabilities.argmax(1))


@given(arrays(np.uint16, (3, 4, 5)))
def test_sums_are_decided_alike_with_weights_of_one(sums) -> None:
    valid = np.ones((4, 5), np.bool_)
    plain = decide(sums, valid, probabilities=True)
    ones = decide(sums, valid, probabilities=True, weights=np.ones(3, np.float32))
    for name in ("ids", "confidence", "probabilities"):
        assert (getattr(plain, name) == getattr(ones, name)).all()


# By hand


def test_a_factor_lowers_the_threshold_of_a_class() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2]).reshape(1, 3, 1, 1).expand(1, 3, 2, 2)
    valid = torch.ones(1, 2, 2, dtype=torch.bool)

    def first(*factors: float) -> int:
        way = Postprocessing(classes=("a", "b", "c"), factors=factors, areas=(0, 0, 0))
        return int(way.decide(probabilities, valid)[0, 0, 0])

    assert [first(1, 1, 1), first(1, 1.7, 1), first(1, 1.6, 1), first(0.3, 1, 1.6)] == [0, 1, 0, 2]


def test_a_small_area_gets_what_surrounds_it_and_pixels_without_data_stay() -> None:
    ids = np.zeros((8, 8), np.uint8)
    ids[2, 2:4], ids[5:7, 5:7], ids[0, 7] = 1, 1, 1
    valid = np.ones((8, 8), np.bool_)
    valid[0, 7] = False
    way = Postprocessing(classes=("a", "b"), factors=(1.0, 1.0), areas=(0, 3))
    wanted = ids.copy()
    wanted[2, 2:4] = 0
    assert (way.sieved(ids, valid) == wanted).all()


def test_areas_cover_the_same_ground_on_other_pixels() -> None:
    way = Postprocessing(classes=("a", "b"), factors=(1.0, 1.0), areas=(0, 64))
    assert way.at(1.0, (0.5, 0.5)).areas == (0, 256)
    assert way.at(1.0, (2.0, 2.0)).areas == (0, 16)
    assert way.at(0.3, (0.3 + 1e-9, 0.3)) == way
    assert way.at(None, (2.0, 2.0)) == way == way.at(1.0, None)


# Tiles and scenes


def test_tiles_are_what_their_probabilities_and_validity_give(
    trained: TrainedModel, dataset: Path, tmp_path: Path
) -> None:
    from agrivision.inference.predictor import Predictor
    from agrivision.inference.tilesets import open_dataset

    predict(trained, [dataset], tmp_path, replace(ONE, split="val", postprocessing=HARD))
    found, changed = ids_in(tmp_path), 0
    [tiles] = open_dataset(dataset, "val", trained.description)
    for batch in tiles.batches(range(3), 2, 0, torch.device("cpu")):
        probabilities = Predictor.of([trained]).probabilities(batch.images)
        weighted = (probabilities * torch.tensor(HARD.factors)[:, None, None]).argmax(1)
        for key, ids, valid, plain in zip(
            batch.keys, weighted, batch.valid, probabilities.argmax(1), strict=True
        ):
            there = valid.numpy()
            masked = np.where(there, ids.numpy(), NODATA).astype(np.uint8)
            wanted = np.where(there, without_specks(masked, HARD.areas), ids.numpy())
            assert (found[key] == wanted).all()
            changed += int((wanted != plain.numpy()).sum())
    assert changed


def test_a_scene_does_not_depend_on_blocks_parts_or_strips(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agrivision.inference import cleaning, tiling
    from agrivision.part import Part

    image = smooth(np.random.default_rng(2), 200, 230)
    image[:, 40:90, 100:140] = 0
    scene = write_scene(tmp_path / "s.tif", image, nodata=0)
    options = replace(ONE, tile=32, overlap=8, postprocessing=HARD, products=Products(confidence=True))
    predict(trained, [scene], tmp_path / "whole", options)
    monkeypatch.setattr(cleaning, "_PIXELS", 7 * 230)
    predict(trained, [scene], tmp_path / "strips", options)
    monkeypatch.setattr(tiling, "_BLOCK", 64)
    for number in range(2):
        predict(trained, [scene], tmp_path / "blocks", options, part=Part(number=number, of=2))
    whole = files(tmp_path / "whole")
    assert files(tmp_path / "strips") == whole == files(tmp_path / "blocks")
    with rasterio.open(tmp_path / "whole" / "s.tif") as dataset:
        assert dataset.tags()["AGRIVISION_POSTPROCESSING"] == HARD.line()
        cleaned = dataset.read(1)
    assert HARD.line() in json.loads(whole["s.json"])["properties"]["agrivision:postprocessing"]
    assert "Post-processing" in whole["s.html"].decode()
    factors_only = replace(HARD, areas=(0,) * COUNT)
    predict(trained, [scene], tmp_path / "f", replace(options, postprocessing=factors_only))
    with rasterio.open(tmp_path / "f" / "s.tif") as dataset:
        before = dataset.read(1)
    assert (cleaned == without_specks(before, HARD.areas)).all()
    assert (cleaned != before).any()


def test_the_confidence_is_that_of_the_class_on_the_map(trained: TrainedModel, tmp_path: Path) -> None:
    image = smooth(np.random.default_rng(3), 150, 170)
    scene = write_scene(tmp_path / "s.tif", image)
    products = Products(confidence=True, probabilities=True)
    predict(trained, [scene], tmp_path / "out", replace(ONE, postprocessing=HARD, products=products))
    layers = {}
    for name in ("s", "s.confidence", "s.probabilities"):
        with rasterio.open(tmp_path / "out" / f"{name}.tif") as dataset:
            layers[name] = dataset.read()
    ids = layers["s"].astype(np.int64)
    of_class = np.take_along_axis(layers["s.probabilities"], ids, 0)
    assert (layers["s.confidence"] == np.maximum(of_class, 1)).all()
    products = Products(confidence=True)
    predict(trained, [scene], tmp_path / "less", replace(ONE, postprocessing=HARD, products=products))
    with rasterio.open(tmp_path / "less" / "s.confidence.tif") as dataset:
        assert (dataset.read() == layers["s.confidence"]).all()
    found = predict_array(trained, image, replace(ONE, postprocessing=HARD))
    assert (found.ids == ids[0]).all()
    assert np.allclose(found.confidence * 255, layers["s.confidence"][0])


# What a choice is made on


def recorded(probabilities, labels, spread: float, tmp: Path) -> tuple[Spill, Recording]:
    spill = Spill(tmp)
    made = Recording(spill, probabilities.shape[0], spread)
    made.add(0, torch.from_numpy(probabilities), torch.from_numpy(labels))
    return spill, made


@st.composite
def tiles(draw: st.DrawFn):
    """Probabilities with ties, and label sets with pixels that do not count."""
    raw = draw(arrays(np.int32, (3, 5, 6), elements=st.integers(0, 8)))
    raw[0] += 1
    labels = draw(arrays(np.int32, (5, 6), elements=st.sampled_from([0, 1, 2, 3, 4, 6])))
    valid = draw(arrays(np.bool_, (5, 6)))
    return (raw / raw.sum(0)).astype(np.float32), labels | (valid.astype(np.int32) << VALID_BIT)


def plainly(probabilities, labels, way: Postprocessing) -> torch.Tensor:
    """The matrix that `evaluate` would count."""
    valid = torch.from_numpy((labels >> VALID_BIT) & 1).bool()[None]
    ids = way.decide(torch.from_numpy(probabilities)[None], valid)
    return confusion_matrix(ids, torch.from_numpy(labels)[None], len(probabilities))


@settings(max_examples=40)
@given(tiles(), st.lists(st.integers(0, len(FACTORS) - 1), min_size=3, max_size=3), st.integers(0, 2))
def test_counts_at_each_factor_are_those_of_a_plain_decision(
    tmp_path_factory: pytest.TempPathFactory, tile, places: list[int], class_id: int
) -> None:
    probabilities, labels = tile
    spill, made = recorded(
        probabilities, labels, FACTORS[-1] / FACTORS[0], tmp_path_factory.getbasetemp()
    )
    with spill:
        kinds = np.arange(8, dtype=np.uint16)
        wins = first_wins(made.tile(0), places, class_id, kinds, 8)
        counts = torch.from_numpy(at_each_factor(made.settled[0], wins, class_id))
        found = matrices_of_counts(counts, torch.arange(8), 3)
    for place, matrix in enumerate(found):
        now = list(places)
        now[class_id] = place
        way = Postprocessing(
            classes=("a", "b", "c"), factors=tuple(FACTORS[p] for p in now), areas=(0, 0, 0)
        )
        assert torch.equal(matrix, plainly(probabilities, labels, way))


@settings(max_examples=40)
@given(
    tiles(),
    st.lists(st.sampled_from([0, 2, 3, 5]), min_size=3, max_size=3),
    st.sampled_from([None, 0, 1, 2]),
)
def test_counts_at_each_bound_are_those_of_a_plain_decision(
    tmp_path_factory: pytest.TempPathFactory, tile, least: list[int], class_id: int | None
) -> None:
    grid = (0, 2, 3, 5)  # small ones, for a small tile
    probabilities, labels = tile
    spill, made = recorded(probabilities, labels, 1.0, tmp_path_factory.getbasetemp())
    with spill, pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "AREAS", grid)
        one = made.tile(0)
        counts = AreaCounts(spill, 3, 8)
        kinds = np.arange(8, dtype=np.uint16)
        for _ in range(2):  # two tiles in one group
            counts.add(areas_of(one.likeliest(np.ones(3, np.float32)), one.sets, kinds, 3, 8))
        counts.close()
        found = sum(
            counts.at_each_bound(group, [grid.index(each) for each in least], class_id)
            for group in counts.groups
        )
        found = matrices_of_counts(torch.from_numpy(found + counts.settled), torch.arange(8), 3)
    for bound, matrix in zip(grid, found, strict=True):
        now = list(least) if class_id is not None else [bound] * 3
        if class_id is not None:
            now[class_id] = bound
        way = Postprocessing(classes=("a", "b", "c"), factors=(1.0,) * 3, areas=tuple(now))
        assert torch.equal(matrix, 2 * plainly(probabilities, labels, way))


@given(tiles(), st.lists(st.sampled_from(FACTORS), min_size=3, max_size=3))
def test_a_recorded_tile_decides_as_its_probabilities_do(
    tmp_path_factory: pytest.TempPathFactory, tile, factors: list[float]
) -> None:
    probabilities, labels = tile
    spill, made = recorded(
        probabilities, labels, FACTORS[-1] / FACTORS[0], tmp_path_factory.getbasetemp()
    )
    with spill:
        one: RecordedTile = made.tile(0)
    weights = np.array(factors, np.float32)
    valid = (labels >> VALID_BIT) & 1 == 1
    likeliest = (probabilities * weights[:, None, None]).argmax(0)
    assert (one.likeliest(weights) == np.where(valid, likeliest, NODATA)).all()


def test_the_grids_hold_what_changes_nothing() -> None:
    assert AREAS[0] == 0 and FACTORS[counting.UNCHANGED] == 1.0


# The file


def test_a_file_is_read_as_it_was_written(trained: TrainedModel, tmp_path: Path) -> None:
    made = chosen(trained)
    assert Chosen.read(made.write(tmp_path)) == made


@pytest.mark.parametrize(
    "change",
    [
        {"format": "x"},
        {"version": 2},
        {"factors": {}},
        {"areas": [1]},
        {"factors": dict.fromkeys(CLASSES, 0.0)},
        {"factors": dict.fromkeys(CLASSES, "1")},
        {"areas": dict.fromkeys(CLASSES, -1)},
        {"objective": "speed"},
        {"score": {"before": 2.0, "after": None, "crossed": None}},
    ],
)
def test_a_file_that_was_changed_is_refused_in_a_line(
    trained: TrainedModel, tmp_path: Path, change: dict[str, object]
) -> None:
    path = chosen(trained).write(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadInput, match="is no post-processing") as refused:
        Chosen.read(path)
    assert "\n" not in str(refused.value)


def test_anything_else_is_refused_in_a_line(tmp_path: Path) -> None:
    path = write_scene(tmp_path / "s.tif", smooth(np.random.default_rng(1), 8, 8))
    for place in (path, tmp_path, tmp_path / "missing"):
        with pytest.raises(BadInput, match=place.name):
            Chosen.read(place)


def test_a_run_finds_its_own_and_nobody_else_does(tmp_path: Path) -> None:
    trained = trained_model(tmp_path / "run")
    with pytest.raises(BadInput, match="agrivision tune"):
        find_postprocessing([trained], None)
    path = chosen(trained).write(tmp_path / "run")
    assert find_postprocessing([trained], None) == HARD
    with torch.no_grad():
        next(trained.module.parameters()).add_(1)
    with pytest.raises(BadInput, match="step 7"):
        find_postprocessing([trained], None)
    with pytest.raises(BadInput, match="--postprocess FILE"):
        find_postprocessing([trained, trained], None)
    assert find_postprocessing([trained, trained], path) == HARD
    other = trained_model(tmp_path / "other", classes=("a", *CLASSES[1:]))
    with pytest.raises(BadInput, match="is for the classes"):
        find_postprocessing([other], path)
    with pytest.raises(BadInput, match="is for the classes"):
        predict(other, [tmp_path], tmp_path / "out", replace(ONE, postprocessing=HARD))


def test_the_card_names_what_was_chosen_for_these_weights(tmp_path: Path) -> None:
    trained = trained_model(tmp_path / "run")
    before = card(trained, "net.onnx", "onnx", "")
    chosen(trained).write(tmp_path / "run")
    after = card(trained, "net.onnx", "onnx", "")
    assert "Post-processing" not in before
    assert HARD.line() in after and "0.6250" in after
    chosen(trained).write(tmp_path / "run")
    with torch.no_grad():
        next(trained.module.parameters()).add_(1)
    assert "Post-processing" not in card(trained, "net.onnx", "onnx", "")


def test_the_digest_of_a_scene_is_what_it_was_without(trained: TrainedModel, tmp_path: Path) -> None:
    """What an interrupted prediction left is found again by the next version."""
    from agrivision.inference.predictor import Predictor
    from agrivision.inference.scene import look
    from agrivision.inference.tiling import Tiling

    scene = look(
        write_scene(tmp_path / "s.tif", smooth(np.random.default_rng(1), 80, 80)), trained.description
    )
    how = scenes.How(predictor=Predictor.of([trained]), tiling=Tiling.of(trained.description))
    assert how.digest(scene) != replace(how, postprocessing=HARD).digest(scene)
    several = {
        replace(how, postprocessing=HARD, confidence=confidence).digest(scene)
        for confidence in (False, True)
    }
    assert len(several) == 2
    assert how.digest(scene) == replace(how, confidence=True).digest(scene)
