"""Is a class anywhere in a tile? Scores and truth by tile, and how well one tells the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from agrivision.data.labels import VALID_BIT

_BLOCK = 8  # pixels
_THRESHOLD = 0.5


def tile_presence(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How sure the network is that each class is in each tile, and whether it is.

    Args:
        probabilities: float (B, classes, H, W).
        labels: int32 (B, H, W): bit c for class c, bit 15 for valid.

    Returns:
        scores: float32 (B, classes), as from `tile_scores`.
        truth: bool (B, classes), whether any valid pixel has the class.
    """
    valid = ((labels >> VALID_BIT) & 1).bool()
    sets = labels * valid
    classes = torch.arange(probabilities.shape[1], device=labels.device, dtype=labels.dtype)
    truth = ((sets.unsqueeze(1) >> classes.reshape(-1, 1, 1)) & 1).flatten(2).any(2)
    return tile_scores(probabilities, valid), truth


def tile_scores(probabilities: Tensor, valid: Tensor | None = None) -> Tensor:
    """How sure the network is that each class is somewhere in the tile.

    The largest of a class's probabilities after averaging over the valid pixels of 8 x 8 blocks: a
    lone pixel does not decide. For the same reason a block counts only where it has at least half as
    many valid pixels as the fullest block of the tile.

    Args:
        probabilities: float (B, classes, H, W).
        valid: bool (B, H, W); None where all pixels are.

    Returns:
        float32 (B, classes), 0 to 1; 0 for a tile without valid pixels.
    """
    if valid is None:
        valid = torch.ones_like(probabilities[:, 0], dtype=torch.bool)
    weight = valid.unsqueeze(1).float()
    pixels = _block_sums(weight)
    # Not a product with the weight: what stands in pixels that do not count may be anything, even NaN.
    means = _block_sums(probabilities.float().masked_fill(weight == 0, 0)) / pixels.clamp(min=1)
    counts = 2 * pixels >= pixels.amax((2, 3), keepdim=True)
    return means.masked_fill(~counts, 0).amax((2, 3))


def _block_sums(images: Tensor) -> Tensor:
    """Sums over blocks, smaller at the right and bottom: (B, C, H / 8, W / 8), rounded up."""
    return F.avg_pool2d(images, _BLOCK, ceil_mode=True, divisor_override=1)


def average_precision(scores: Tensor, truth: Tensor) -> float | None:
    """Area under precision over recall, without interpolation: the sum of (R_n - R_{n-1}) P_n.

    n runs over the distinct scores from the highest down, so the order of equal scores does not matter.

    Args:
        scores: float (N,).
        truth: bool (N,).

    Returns:
        0 to 1; None where nothing is true.
    """
    if not truth.any():
        return None
    _, hits, called = _thresholds(scores, truth)
    gained = hits.diff(prepend=hits.new_zeros(1))
    return float((gained / hits[-1] * (hits / called)).sum())


def _thresholds(scores: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct scores from the highest down, and true and all items at or above each, as float64."""
    scores, order = scores.double().cpu().sort(descending=True)
    hits = truth.cpu()[order].long().cumsum(0)
    last = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool)])
    called = torch.arange(1, len(scores) + 1)
    return scores[last], hits[last].double(), called[last].double()


@dataclass(frozen=True, kw_only=True)
class ClassPresence:
    """How well tiles with one class are told from tiles without it.

    Attributes:
        average_precision: 0 to 1.
        f1: where a class is called present from a score of 0.5.
        best_f1: where it is called present from `threshold`.
        threshold: with the best F1; the highest of those that are equally good.
        tiles: how many have the class.
    """

    average_precision: float
    f1: float
    best_f1: float
    threshold: float
    tiles: int


@dataclass(frozen=True, kw_only=True)
class PresenceScores:
    """Scores by class name; None where no tile has the class.

    Attributes:
        classes: in the order of their ids.
    """

    classes: dict[str, ClassPresence | None]

    def to_dict(self) -> dict[str, dict[str, float | int] | None]:
        """For JSON: by class name the fields of `ClassPresence`, or None."""
        return {
            name: None if found is None else dataclasses.asdict(found)
            for name, found in self.classes.items()
        }


def presence(scores: Tensor, truth: Tensor, classes: Sequence[str]) -> PresenceScores:
    """Scores of all tiles of a data set.

    Args:
        scores: float (N, classes), one row a tile.
        truth: bool (N, classes).
        classes: names in the order of their ids.

    Raises:
        ValueError: the shapes do not go together.
    """
    if scores.shape != truth.shape or scores.shape[1:] != (len(classes),):
        raise ValueError(
            f"scores {tuple(scores.shape)} and truth {tuple(truth.shape)} for {len(classes)} classes"
        )
    columns = zip(classes, scores.T, truth.T, strict=True)
    return PresenceScores(classes={name: _presence(score, true) for name, score, true in columns})


def _presence(scores: Tensor, truth: Tensor) -> ClassPresence | None:
    precision = average_precision(scores, truth)
    if precision is None:
        return None
    thresholds, hits, called = _thresholds(scores, truth)
    f1 = 2 * hits / (called + hits[-1])
    best = int(f1.argmax())
    above = int((thresholds >= _THRESHOLD).sum())
    return ClassPresence(
        average_precision=precision,
        f1=float(f1[above - 1]) if above else 0.0,
        best_f1=float(f1[best]),
        threshold=float(thresholds[best]),
        tiles=int(hits[-1]),
    )
