"""Logits for images of any size: the overlap-tile strategy's mirrored borders."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn


class Covering(Protocol):
    """A network whose logits lie in the middle of its input."""

    def input_size(self, output: int) -> int:
        """The smallest side in pixels of an image whose logits, centred in it, have >= `output`."""


def dense_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits for every pixel of images of any size.

    Where the network needs more than the images have, they are continued by mirroring at the middle
    of the border pixels, as in the overlap-tile strategy of Ronneberger et al. 2015; as often as
    needed, so that small images work too. Images that fit are passed on as they are.

    Args:
        model: a `Covering` network such as `UNet` and `EncoderUNet`.
        images: float (B, bands, H, W) with H, W >= 1.

    Returns:
        (B, classes, H, W).

    Raises:
        ValueError: the network's output is smaller than its `input_size` promised.
    """
    height, width = images.shape[-2:]
    covering = cast(Covering, model)
    padded = _mirror(images, 2, covering.input_size(height))
    padded = _mirror(padded, 3, covering.input_size(width))
    logits: Tensor = model(padded)
    if logits.shape[-2] < height or logits.shape[-1] < width:
        raise ValueError(f"logits {tuple(logits.shape)} do not cover {height} x {width} pixels")
    return _under(logits, height, width, tuple(padded.shape[-2:]))


def _under(logits: Tensor, height: int, width: int, padded: tuple[int, ...]) -> Tensor:
    """The logits of the pixels that stand in the middle of the padded images."""
    rows, columns = logits.shape[-2:]
    top = (padded[0] - height) // 2 - (padded[0] - rows) // 2
    left = (padded[1] - width) // 2 - (padded[1] - columns) // 2
    return logits[..., top : top + height, left : left + width]


def _mirror(images: Tensor, dim: int, size: int) -> Tensor:
    """Continue dimension `dim` to `size` on both sides; the images stay in the middle.

    By index and not with `F.pad`: that refuses to reflect more than once, and its backward has no
    deterministic kernel on CUDA.
    """
    have = images.shape[dim]
    if size == have:
        return images
    before = (size - have) // 2
    return images.index_select(dim, mirrored(have, before, size, device=images.device))


def mirrored(have: int, before: int, size: int, *, device: torch.device | None = None) -> Tensor:
    """Which of `have` pixels stands at each of `size` places, the first pixel at place `before`.

    Returns:
        int64 (size,): 2 1 0 1 2 3 2 1 for 4 pixels, 2 before, 8 places; one pixel is repeated.
    """
    period = max(1, 2 * (have - 1))
    place = torch.arange(-before, size - before, device=device).remainder(period)
    return torch.minimum(place, (period - place).clamp(max=have - 1)) if have > 1 else place * 0
