from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agrivision.evaluation.presence import average_precision, presence, tile_presence, tile_scores

VALID = 1 << 15


def slow_scores(probabilities: Tensor, valid: Tensor) -> Tensor:
    rows = []
    for tile, mask in zip(probabilities.double(), valid, strict=True):
        blocks = []
        for i in range(0, mask.shape[0], 8):
            for j in range(0, mask.shape[1], 8):
                inside = mask[i : i + 8, j : j + 8]
                if inside.any():
                    pixels = tile[:, i : i + 8, j : j + 8][:, inside]
                    blocks.append((int(inside.sum()), pixels.mean(1)))
        fullest = max((count for count, _ in blocks), default=0)
        means = [mean for count, mean in blocks if 2 * count >= fullest]
        rows.append(torch.stack(means).amax(0) if means else torch.zeros(len(tile)))
    return torch.stack(rows).float()


def slow_average_precision(scores: list[float], truth: list[bool]) -> float:
    area, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        called = [t for s, t in zip(scores, truth, strict=True) if s >= threshold]
        area += (sum(called) / sum(truth) - recall) * sum(called) / len(called)
        recall = sum(called) / sum(truth)
    return area


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    share=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
)
def test_tile_scores_are_those_of_the_slow_reference(
    seed: int, size: tuple[int, int], share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(2, 3, *size, generator=generator)
    valid = torch.rand(2, *size, generator=generator) < share
    torch.testing.assert_close(tile_scores(probabilities, valid), slow_scores(probabilities, valid))
    everywhere = torch.ones_like(valid)
    torch.testing.assert_close(tile_scores(probabilities), slow_scores(probabilities, everywhere))


def test_a_lone_pixel_does_not_decide() -> None:
    probabilities = torch.zeros(1, 1, 16, 16)
    probabilities[0, 0, 3, 3] = 1
    assert tile_scores(probabilities).item() == 1 / 64
    valid = torch.ones(1, 16, 16, dtype=torch.bool)
    valid[0, :8, :8] = False
    valid[0, 3, 3] = True  # alone in its block
    assert tile_scores(probabilities, valid).item() == 0


def test_pixels_that_are_not_valid_say_nothing() -> None:
    probabilities = torch.full((1, 2, 8, 8), 0.25)
    labels = torch.full((1, 8, 8), VALID | 0b01, dtype=torch.int32)
    probabilities[..., 4:] = torch.nan
    labels[..., 4:] = 0b10
    scores, truth = tile_presence(probabilities, labels)
    assert scores.tolist() == [[0.25, 0.25]]
    assert truth.tolist() == [[True, False]]


@settings(deadline=None)
@given(
    items=st.lists(
        st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]), st.booleans()),
        min_size=1,
        max_size=20,
    )
)
def test_average_precision_is_its_definition(items: list[tuple[float, bool]]) -> None:
    scores, truth = [s for s, _ in items], [t for _, t in items]
    found = average_precision(torch.tensor(scores), torch.tensor(truth))
    if not any(truth):
        assert found is None
    else:
        assert found == pytest.approx(slow_average_precision(scores, truth))


def test_average_precision_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(0)
    scores, truth = (10 * torch.rand(200)).round() / 10, torch.rand(200) < 0.3
    expected = metrics.average_precision_score(truth.numpy(), scores.numpy())
    assert average_precision(scores, truth) == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), tiles=st.integers(1, 12))
def test_f1_is_that_of_every_threshold_tried(seed: int, tiles: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.rand(tiles, 1, generator=generator) * 10).round() / 10
    truth = torch.rand(tiles, 1, generator=generator) < 0.5
    found = presence(scores, truth, ["a"]).classes["a"]
    if not truth.any():
        assert found is None
        return

    def f1(threshold: float) -> float:
        called = scores[:, 0] >= threshold
        return 2 * int((called & truth[:, 0]).sum()) / int(called.sum() + truth.sum())

    assert found is not None
    assert found.tiles == int(truth.sum())
    assert found.f1 == pytest.approx(f1(0.5))
    assert found.best_f1 == pytest.approx(max(f1(s) for s in scores[:, 0].tolist()))
    assert f1(found.threshold) == pytest.approx(found.best_f1)


def test_classes_in_no_tile_have_no_score() -> None:
    scores = torch.tensor([[0.9, 0.2], [0.4, 0.6], [0.3, 0.1]])
    truth = torch.tensor([[True, False], [True, False], [False, False]])
    found = presence(scores, truth, ["a", "b"]).to_dict()
    assert json.loads(json.dumps(found)) == {
        "a": {
            "average_precision": 1.0,
            "f1": pytest.approx(2 / 3),
            "best_f1": 1.0,
            "threshold": pytest.approx(0.4),
            "tiles": 2,
        },
        "b": None,
    }
    with pytest.raises(ValueError, match="for 3 classes"):
        presence(scores, truth, ["a", "b", "c"])
