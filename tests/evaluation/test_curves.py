"""Pixels by probability: the counts are those of a comparison with each threshold."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from agrivision.evaluation.curves import THRESHOLDS, above, threshold_counts

VALID = 1 << 15


@given(seed=st.integers(0, 10_000), classes=st.integers(1, 15))
def test_hits_and_false_alarms_are_those_of_each_threshold(seed: int, classes: int) -> None:
    random = torch.Generator().manual_seed(seed)
    shape = (2, classes, 6, 5)
    probabilities = torch.rand(shape, generator=random)
    edges = torch.randint(0, THRESHOLDS, shape, generator=random) / (THRESHOLDS - 1)
    probabilities = torch.where(torch.rand(shape, generator=random) < 0.3, edges, probabilities)
    labels = torch.randint(0, 2**15, (2, 6, 5), generator=random, dtype=torch.int32)
    labels[0, :3] &= ~(2**classes - 1)  # no scored label
    labels += VALID * torch.randint(0, 2, labels.shape, generator=random, dtype=torch.int32)
    hits, false = above(threshold_counts(probabilities, labels))
    bits = labels.numpy()
    counted = (bits >= VALID) & (bits & (2**classes - 1) != 0)
    scaled = (probabilities * (THRESHOLDS - 1)).numpy()  # in float32, as TensorBoard's own does
    for class_id in range(classes):
        has = (bits >> class_id) & 1 == 1
        reached = np.floor(scaled[:, class_id])
        for threshold in range(THRESHOLDS):
            called = counted & (reached >= threshold)
            assert hits[class_id, threshold] == (called & has).sum()
            assert false[class_id, threshold] == (called & ~has).sum()


def test_counts_of_parts_add_up() -> None:
    random = torch.Generator().manual_seed(0)
    probabilities = torch.rand(6, 3, 8, 8, generator=random).softmax(1)
    labels = torch.randint(0, 2**16, (6, 8, 8), generator=random, dtype=torch.int32)
    parts = [threshold_counts(probabilities[i : i + 2], labels[i : i + 2]) for i in (0, 2, 4)]
    assert torch.equal(
        sum(parts, torch.zeros(3, 2, THRESHOLDS).long()), threshold_counts(probabilities, labels)
    )


def test_nothing_counts_where_nothing_is_valid() -> None:
    labels = torch.full((1, 4, 4), 3, dtype=torch.int32)
    assert threshold_counts(torch.full((1, 2, 4, 4), torch.nan), labels).sum() == 0
