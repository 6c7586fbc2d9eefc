"""Precision and recall of each class over the thresholds that its probability may be held against."""

from __future__ import annotations

import torch
from torch import Tensor

from agrivision.data.labels import VALID_BIT

THRESHOLDS = 101  # 0, 0.01, … 1


def threshold_counts(probabilities: Tensor, labels: Tensor) -> Tensor:
    """How many pixels have which probability of a class, with and without the class.

    A pixel has a class if it is any of its labels. Pixels that are not valid, and those without any
    scored label, do not count.

    Args:
        probabilities: float (B, classes, H, W), 0 to 1.
        labels: int32 (B, H, W): bit c for class c, bit 15 for valid.

    Returns:
        int64 (classes, 2, THRESHOLDS) on the same device: pixels without the class, and with it, by
        the highest threshold that the probability reaches. Counts of parts of a data set add up.
    """
    classes = probabilities.shape[1]
    counted = (((labels >> VALID_BIT) & 1) * (labels & (2**classes - 1))) != 0
    # As TensorBoard's own: the last threshold is reached by a probability of 1 alone.
    reached = (probabilities.float() * (THRESHOLDS - 1)).int().clamp(0, THRESHOLDS - 1)
    counts = []
    for class_id in range(classes):
        has = (labels >> class_id) & 1
        kind = torch.where(counted, has * THRESHOLDS + reached[:, class_id], 2 * THRESHOLDS)
        # Without weights, bincount is deterministic on CUDA too.
        counts.append(torch.bincount(kind.flatten(), minlength=2 * THRESHOLDS + 1)[:-1])
    return torch.stack(counts).reshape(classes, 2, THRESHOLDS)


def above(counts: Tensor) -> tuple[Tensor, Tensor]:
    """True and false positives of each class at each threshold.

    Args:
        counts: int64 (classes, 2, THRESHOLDS), as from `threshold_counts`.

    Returns:
        Two int64 (classes, THRESHOLDS): pixels with the class, and without it, whose probability
        reaches the threshold.
    """
    sums = counts.flip(2).cumsum(2).flip(2)
    return sums[:, 1], sums[:, 0]
