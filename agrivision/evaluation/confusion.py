"""The challenge's confusion matrix, exact to the pixel, and the scores it holds.

A prediction is right if it is any of the pixel's labels. Matrices of parts of a data set add up to the
matrix of the whole, so ranks and batches sum integers and the score is taken once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agrivision.data.labels import VALID_BIT

_MOST_COUNTS = 1 << 20  # that are kept at once: tiles of few classes are counted together


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Count predictions against label sets.

    Where the predicted class x is in the pixel's label set Y, every y in Y gains M[y, y]; otherwise
    every y in Y gains M[x, y].

    Args:
        predicted: integers (B, H, W), one class id a pixel.
        labels: int32 (B, H, W): bit c for class c, bit 15 for valid; other bits are not scored. A
            valid pixel without any scored label does not count, as if it were not valid.
        classes: number of scored classes, at most 15.

    Returns:
        int64 (classes, classes) on the device of `predicted`: rows predicted, columns true.

    Raises:
        ValueError: shapes that differ, too many classes, or a predicted id that is no class; also
            where the pixel is not valid, because such predictions come from other classes than these.
    """
    return confusion_matrices(predicted, labels, classes).sum(0)


def confusion_matrices(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The matrix of each tile by itself, as from `confusion_matrix`.

    Args:
        predicted: integers (B, H, W), one class id a pixel.
        labels: int32 (B, H, W).
        classes: number of scored classes, at most 15.

    Returns:
        int64 (B, classes, classes) on the device of `predicted`: rows predicted, columns true.

    Raises:
        ValueError: see `confusion_matrix`.
    """
    _check(predicted, labels, classes)
    if len(predicted) == 0:
        return torch.zeros(0, classes, classes, dtype=torch.int64, device=predicted.device)
    valid = (labels >> VALID_BIT) & 1
    sets = (labels & (2**classes - 1)) * valid  # 0, the empty set, where the pixel does not count
    # All pixels of a tile with the same prediction and the same label set do the same to its matrix.
    pairs = (predicted.long() << classes) + sets
    together = max(1, _MOST_COUNTS // (classes << classes))
    parts = [_spread(_count(part, classes).cpu(), classes) for part in pairs.split(together)]
    return torch.cat(parts).to(predicted.device)


def _count(pairs: Tensor, classes: int) -> Tensor:
    """How often each pair of prediction and label set stands in each tile.

    Args:
        pairs: int64 (B, H, W), the prediction above the bits of the label set.
        classes: number of classes.

    Returns:
        int64 (B, classes, 2**classes).
    """
    tiles, kinds = len(pairs), classes << classes
    first = kinds * torch.arange(tiles, device=pairs.device).reshape(-1, 1, 1)
    # Without weights, bincount is deterministic on CUDA too.
    counts = torch.bincount((pairs + first).flatten(), minlength=tiles * kinds)
    return counts.reshape(tiles, classes, 1 << classes)


def _check(predicted: Tensor, labels: Tensor, classes: int) -> None:
    if not 1 <= classes <= VALID_BIT:
        raise ValueError(f"{classes} classes: 1 to {VALID_BIT} have a bit")
    if predicted.shape != labels.shape:
        raise ValueError(f"predictions {tuple(predicted.shape)} for labels {tuple(labels.shape)}")
    if predicted.numel() == 0:
        return
    least, most = (int(bound) for bound in torch.aminmax(predicted))
    if least < 0 or most >= classes:
        wrong = least if least < 0 else most
        raise ValueError(f"class id {wrong} is predicted, but the ids are 0 to {classes - 1}")


def _spread(counts: Tensor, classes: int) -> Tensor:
    """The matrices from pixels counted by tile, prediction and label set.

    Args:
        counts: int64 (B, classes, 2**classes) on the CPU; CUDA has no product of integer matrices.
        classes: number of classes.

    Returns:
        int64 (B, classes, classes).
    """
    seen = counts.any(0).any(0).nonzero().flatten()
    return matrices_of_counts(counts[:, :, seen], seen, classes)


def matrices_of_counts(counts: Tensor, sets: Tensor, classes: int) -> Tensor:
    """The matrices of pixels that were counted by prediction and label set.

    Args:
        counts: int64 (B, classes, sets) on the CPU.
        sets: int64, the bits of each label set; pixels of the empty one do not count.
        classes: number of classes.

    Returns:
        int64 (B, classes, classes): rows predicted, columns true.
    """
    member = (sets.unsqueeze(1) >> torch.arange(classes)) & 1  # (sets, classes)
    hits = (counts * member.T).sum(1) @ member
    misses = (counts * (1 - member.T)) @ member
    return misses + torch.diag_embed(hits)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a confusion matrix says of each class, and the challenge's score.

    Attributes:
        classes: names in the order of their ids.
        confusion: rows predicted, columns true, in pixels.
        iou: by class name, 0 to 1; None where the class is in neither labels nor predictions.
        precision: likewise; 0 where the class is labelled but never predicted.
        recall: likewise; 0 where the class is predicted but never labelled.
        f1: likewise.
        miou: mean IoU over the classes that have one, background included: the challenge's score;
            None where no class has.
    """

    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    iou: dict[str, float | None]
    precision: dict[str, float | None]
    recall: dict[str, float | None]
    f1: dict[str, float | None]
    miou: float | None

    @property
    def absent(self) -> tuple[str, ...]:
        """Classes in neither labels nor predictions: they are left out of the mean."""
        return tuple(name for name in self.classes if self.iou[name] is None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the keys that `evaluate --json` promises, and the classes left out."""
        return {
            "miou": self.miou,
            "iou": dict(self.iou),
            "precision": dict(self.precision),
            "recall": dict(self.recall),
            "f1": dict(self.f1),
            "confusion": [list(row) for row in self.confusion],
            "classes": list(self.classes),
            "absent": list(self.absent),
        }


def scores(matrix: Tensor, classes: Sequence[str]) -> Scores:
    """Scores of a confusion matrix.

    Args:
        matrix: integers (classes, classes), rows predicted, columns true.
        classes: names in the order of their ids.

    Raises:
        ValueError: the matrix is not of as many classes as there are names.
    """
    if matrix.shape != (len(classes), len(classes)):
        raise ValueError(f"a matrix of shape {tuple(matrix.shape)} for {len(classes)} classes")
    rows: list[list[int]] = matrix.tolist()
    right = [rows[c][c] for c in range(len(classes))]
    predicted = [sum(row) for row in rows]
    true = [sum(column) for column in zip(*rows, strict=True)]
    present = [p + t > 0 for p, t in zip(predicted, true, strict=True)]

    def by_class(denominators: list[int], factor: int = 1) -> dict[str, float | None]:
        cells = zip(classes, right, denominators, present, strict=True)
        return {name: factor * tp / max(d, 1) if there else None for name, tp, d, there in cells}

    both = [p + t for p, t in zip(predicted, true, strict=True)]
    iou = by_class([b - tp for b, tp in zip(both, right, strict=True)])
    known = [value for value in iou.values() if value is not None]
    return Scores(
        classes=tuple(classes),
        confusion=tuple(tuple(row) for row in rows),
        iou=iou,
        precision=by_class(predicted),
        recall=by_class(true),
        f1=by_class(both, factor=2),
        miou=sum(known) / len(known) if known else None,
    )
