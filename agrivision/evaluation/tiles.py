"""How well each tile by itself is predicted: which are the best and the worst of a class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TileCounts:
    """Pixels of each tile, as the challenge's confusion matrix counts them.

    Attributes:
        hits: int64 (tiles, classes), the matrix's diagonal.
        predicted: likewise, its rows' sums.
        true: likewise, its columns' sums.
    """

    hits: Tensor
    predicted: Tensor
    true: Tensor

    @classmethod
    def of(cls, counts: Tensor) -> TileCounts:
        """From int64 (tiles, 3, classes), as `tile_counts` gives them."""
        hits, predicted, true = counts.unbind(1)
        return cls(hits=hits, predicted=predicted, true=true)

    def iou(self) -> Tensor:
        """Float64 (tiles, classes), 0 to 1; NaN where a tile has no pixel of the class."""
        union = self.predicted + self.true - self.hits
        return torch.where(self.true > 0, self.hits.double() / union.clamp(min=1), torch.nan)

    def worst(self, class_id: int, count: int) -> list[tuple[int, float]]:
        """The tiles with the lowest IoU of a class among those that have it, the lowest first.

        Returns:
            At most `count` pairs of a tile's number and its IoU; of equals the first tile comes first.
        """
        return self._first(class_id, count, 1)

    def best(self, class_id: int, count: int) -> list[tuple[int, float]]:
        """The tiles with the highest IoU of a class among those that have it, the highest first."""
        return self._first(class_id, count, -1)

    def _first(self, class_id: int, count: int, sign: int) -> list[tuple[int, float]]:
        tiles = self.true[:, class_id].nonzero().flatten()
        iou = self.iou()[tiles, class_id]
        order = (sign * iou).argsort(stable=True)[:count]
        return list(zip(tiles[order].tolist(), iou[order].tolist(), strict=True))


def tile_counts(matrices: Tensor) -> Tensor:
    """Hits, predicted and true pixels of each class.

    Args:
        matrices: int64 (tiles, classes, classes), as from `confusion_matrices`.

    Returns:
        int64 (tiles, 3, classes).
    """
    hits = matrices.diagonal(dim1=1, dim2=2)
    return torch.stack([hits, matrices.sum(2), matrices.sum(1)], dim=1)
