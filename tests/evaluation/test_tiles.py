"""Which tiles are the best and the worst of a class: as a plain loop finds them."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from agrivision.evaluation.confusion import confusion_matrices, confusion_matrix
from agrivision.evaluation.tiles import TileCounts, tile_counts

VALID = 1 << 15


def some(seed: int, tiles: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    predicted = torch.randint(0, classes, (tiles, 5, 4), generator=random)
    labels = torch.randint(0, 2**classes, (tiles, 5, 4), generator=random, dtype=torch.int32)
    valid = torch.randint(0, 2, (tiles, 5, 4), generator=random, dtype=torch.int32)
    return predicted, labels + VALID * valid


@given(seed=st.integers(0, 10_000), tiles=st.integers(0, 5), classes=st.sampled_from([1, 2, 4, 9, 15]))
def test_the_matrices_of_tiles_are_those_of_each_alone(seed: int, tiles: int, classes: int) -> None:
    predicted, labels = some(seed, tiles, classes)
    found = confusion_matrices(predicted, labels, classes)
    assert found.shape == (tiles, classes, classes)
    for tile in range(tiles):
        assert torch.equal(found[tile], confusion_matrix(predicted[[tile]], labels[[tile]], classes))
    assert torch.equal(found.sum(0), confusion_matrix(predicted, labels, classes))


@given(seed=st.integers(0, 10_000), count=st.integers(0, 9))
def test_the_best_and_the_worst_are_those_of_a_plain_loop(seed: int, count: int) -> None:
    predicted, labels = some(seed, 7, 3)
    counts = TileCounts.of(tile_counts(confusion_matrices(predicted, labels, 3)))
    for class_id in range(3):
        there: list[tuple[float, int]] = []
        for tile in range(7):
            sets = labels[tile][labels[tile] >= VALID].numpy()
            chosen = predicted[tile][labels[tile] >= VALID].numpy()
            has = (sets >> class_id) & 1 == 1
            hit = (sets >> chosen) & 1 == 1
            hits = int((has & hit).sum())
            missed = sum(bin(int(one) & 7).count("1") for one in sets[(chosen == class_id) & ~hit])
            if has.any():
                union = int(has.sum()) + missed
                there.append((hits / union, tile))
                assert counts.iou()[tile, class_id] == hits / union
            else:
                assert counts.iou()[tile, class_id].isnan()
        worst = [(tile, iou) for iou, tile in sorted(there)]
        best = [(tile, iou) for iou, tile in sorted(there, key=lambda pair: (-pair[0], pair[1]))]
        assert counts.worst(class_id, count) == worst[:count]
        assert counts.best(class_id, count) == best[:count]


def test_of_equals_the_first_tile_comes_first() -> None:
    same = torch.full((4, 1), 10)
    counts = TileCounts(hits=same // 2, predicted=same, true=same * torch.tensor([[1], [0], [1], [1]]))
    assert [tile for tile, _ in counts.worst(0, 9)] == [0, 2, 3]
    assert [tile for tile, _ in counts.best(0, 2)] == [0, 2]
    assert np.allclose(counts.iou()[0, 0], 1 / 3)
