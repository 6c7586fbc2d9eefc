"""Where label sets meet, and how near a pixel is to that.

The UNet's paper (arXiv:1505.04597) asks more of pixels between touching cells. Its borders are those of
instances; here there are classes, so a border is where two neighbours have different label sets. Pixels
that do not count have no border: nobody knows what is there.

All of it is shifts, sums and minima of whole numbers, which have one result on every device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CUT = 3.0  # sigmas, beyond which a Gaussian is taken as 0
_FAR = 1 << 24  # squared pixels, more than any reach


def reach(sigma: float) -> int:
    """How far in pixels a border is felt."""
    return math.ceil(_CUT * sigma)


@torch.no_grad()
def nearness(sets: Tensor, sigma: float) -> Tensor:
    """exp(-d² / (2 sigma²)), where d is the distance to the nearest border; 0 beyond `reach`.

    Args:
        sets: int32 (B, H, W), label sets; 0 where a pixel does not count.
        sigma: in pixels.

    Returns:
        float32 (B, H, W). The pixels on both sides of a border have 1.
    """
    squares = squared_distance(_borders(sets), reach(sigma))
    near = torch.exp(squares.float() * (-0.5 / sigma**2))
    return near.masked_fill(squares > reach(sigma) ** 2, 0.0)


def squared_distance(marked: Tensor, most: int) -> Tensor:
    """Squared Euclidean distance in pixels to the nearest marked pixel of the sample.

    The least of dx² + dy² is the least over dy of dy² + the least over dx of dx²: one pass along the
    rows, one along the columns, each over all shifts up to `most`.

    Args:
        marked: bool (B, H, W).
        most: pixels. Distances up to this are exact, longer ones at least as long as they are.

    Returns:
        int32 (B, H, W).
    """
    squares = torch.where(marked, 0, _FAR).int()
    for dim in (1, 2):
        least, size = squares.clone(), squares.shape[dim]
        for shift in range(1, min(most, size - 1) + 1):
            length, further = size - shift, squares + shift**2
            least.narrow(dim, 0, length).clamp_(max=further.narrow(dim, shift, length))
            least.narrow(dim, shift, length).clamp_(max=further.narrow(dim, 0, length))
        squares = least
    return squares


@torch.no_grad()
def neighbourhood(sets: Tensor, most: int) -> Tensor:
    """The labels of each pixel and of all within a square of `most` pixels to each side.

    Args:
        sets: int32 (B, H, W), label sets; 0 where a pixel does not count.
        most: pixels.

    Returns:
        int32 (B, H, W), label sets.
    """
    for dim in (1, 2):
        size, covered = sets.shape[dim], 0
        while covered < min(most, size - 1):
            # A pixel up to twice as far away and one has been seen by one on the way to it.
            shift = min(covered + 1, min(most, size - 1) - covered)
            wider, length = sets.clone(), size - shift
            wider.narrow(dim, 0, length).bitwise_or_(sets.narrow(dim, shift, length))
            wider.narrow(dim, shift, length).bitwise_or_(sets.narrow(dim, 0, length))
            sets, covered = wider, covered + shift
    return sets


def _borders(sets: Tensor) -> Tensor:
    """Bool: has any of the four neighbours another label set?"""
    border = torch.zeros_like(sets, dtype=torch.bool)
    for dim in (1, 2):
        length = sets.shape[dim] - 1
        one, other = sets.narrow(dim, 0, length), sets.narrow(dim, 1, length)
        meet = (one != other) & (one != 0) & (other != 0)
        border.narrow(dim, 0, length).logical_or_(meet)
        border.narrow(dim, 1, length).logical_or_(meet)
    return border
