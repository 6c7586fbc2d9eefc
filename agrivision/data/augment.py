"""A batch and its samples' generators → a batch the network can take, on the device.

Every random choice is drawn from a generator of its own for (seed, epoch, sample), so that a sample is
changed in the same way whatever rank, thread or batch it is met in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from agrivision.config import AugmentConfig
from agrivision.data.growing import GrowingCrop
from agrivision.data.normalise import Normaliser
from agrivision.data.order import Stream, generator

_POINTS = 3  # of a side of the grid that bends a sample, as in the UNet's paper


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The random choices for one sample.

    Attributes:
        mirror: flip left and right.
        turns: quarter turns, counter-clockwise, after the flip.
        row: decides the upper edge of the crop, 0 … 1; see `_offset`.
        column: decides the left edge of the crop, 0 … 1.
        scale: factor by which the sample is enlarged.
        angle: degrees by which it is turned.
        shift: added to each normalised band.
        gain: factor of each band.
        bend: displacements of a grid of 3 x 3 points over the crop, in pixels, down and to the right:
            (2, 3, 3); None where nothing is bent.
        focus: row and column of a pixel of the tile that the crop must hold; None: it may lie anywhere.
    """

    mirror: bool
    turns: int
    row: float
    column: float
    scale: float
    angle: float
    shift: tuple[float, ...]
    gain: tuple[float, ...]
    bend: NDArray[np.float64] | None = None
    focus: tuple[int, int] | None = None


def draw(config: AugmentConfig, bands: int, seed: int, epoch: int, sample: int) -> Draw:
    """Draw a sample's changes; all numbers are drawn whether used or not, in a fixed order."""
    numbers = generator(seed, Stream.AUGMENT, epoch, sample)
    random = numbers.random(8 + bands)
    symmetric = 2 * random - 1  # -1 … 1
    by_band = 2 * numbers.random(bands) - 1
    bend = config.elastic * numbers.standard_normal((2, _POINTS, _POINTS))
    contrast = 1 + config.contrast * symmetric[7]
    shift = config.brightness * symmetric[6] + config.band_shift * by_band
    return Draw(
        mirror=config.flip and bool(random[0] < 0.5),
        turns=int(random[1] * 4) if config.rotate90 else 0,
        row=float(random[2]),
        column=float(random[3]),
        scale=float((1 + config.scale) ** symmetric[4]),
        angle=float(config.rotate * symmetric[5]),
        shift=tuple(shift.tolist()),
        gain=tuple((contrast * (1 + config.band_gain * symmetric[8:])).tolist()),
        bend=bend if config.elastic else None,
    )


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Crops, flips, turns, warps and changes the radiometry of training samples.

    Attributes:
        config: which changes, how strong.
        normaliser: of the data set.
        crop: side of the crop in pixels; None keeps the tiles whole.
        seed: of the run.
        growing: has the side of the crop where it depends on the epoch, `crop` being the largest.
    """

    config: AugmentConfig
    normaliser: Normaliser
    crop: int | None
    seed: int
    growing: GrowingCrop | None = None

    def __call__(
        self,
        planes: Sequence[torch.Tensor],
        labels: torch.Tensor,
        epoch: int,
        samples: Sequence[int],
        *,
        focus: Sequence[tuple[int, int] | None] | None = None,
        statistics: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Change a batch.

        Args:
            planes: (batch, side, side, bands) each, as decoded; together they have all bands.
            labels: (batch, side, side) label bits, int16 or int32.
            epoch: of the batch.
            samples: their numbers in the epoch.
            focus: of each sample, row and column of a pixel of its tile that the crop must hold; None
                where it may lie anywhere.
            statistics: (batch, 2, channels) float32 on the device, of the samples' fields, where the
                normaliser wants those.

        Returns:
            images (batch, channels, crop, crop) float32, normalised, in channels-last memory, and
            labels (batch, crop, crop) int32, bits 0 … 15; pixels from outside of a tile are invalid.
        """
        bands = sum(plane.shape[-1] for plane in planes)
        places = focus or [None] * len(samples)
        draws = [
            replace(draw(self.config, bands, self.seed, epoch, sample), focus=place)
            for sample, place in zip(samples, places, strict=True)
        ]
        gain, shift = self._radiometry(draws, planes[0].device)
        side = self.side(epoch, labels.shape[-1])
        if statistics is None and self.normaliser.scope != "data":
            statistics = self.normaliser.statistics(_joined(planes))  # of the tiles, before any cut
        if self.config.scale or self.config.rotate or self.config.elastic:
            # What a warp moves in from outside is zero, as empty pixels are once they are normalised.
            images = self.normaliser(_joined(planes), gain, shift, statistics)
            changed, bits = _warp(images, _bits(labels), draws, side)
            return changed.contiguous(memory_format=torch.channels_last), bits
        pixels, cut = _cut(planes, labels, draws, side)
        return self.normaliser(pixels.permute(0, 3, 1, 2), gain, shift, statistics), _bits(cut)

    def _radiometry(
        self, draws: Sequence[Draw], device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gain and shift (batch, bands), or None where neither changes anything."""
        how = self.config
        if not (how.brightness or how.contrast or how.band_gain or how.band_shift):
            return None, None
        gain = torch.tensor([one.gain for one in draws]).to(device, non_blocking=True)
        shift = torch.tensor([one.shift for one in draws]).to(device, non_blocking=True)
        return gain, shift

    def side(self, epoch: int, tile_side: int) -> int:
        """Pixels along the edge of an image as the network sees it in an epoch."""
        crop = self.crop if self.growing is None else self.growing.at(epoch)
        return tile_side if crop is None else min(crop, tile_side)


def _cut(
    planes: Sequence[torch.Tensor], labels: torch.Tensor, draws: Sequence[Draw], side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops and the eight symmetries, (batch, side, side, bands): pixels move, none is computed."""
    tile_side, bands = planes[0].shape[1], sum(plane.shape[-1] for plane in planes)
    pixels = planes[0].new_empty((len(draws), side, side, bands))
    bits = labels.new_empty((len(draws), side, side))
    for sample, one in enumerate(draws):
        top, left = _corner(one, tile_side, side)
        window = (sample, slice(top, top + side), slice(left, left + side))
        joined = torch.cat([_movable(plane[window]) for plane in planes], dim=-1)
        _move(_words(joined), _words(_movable(pixels[sample])), one)
        _move(labels[window], bits[sample], one)
    return pixels, bits


def _warp(
    images: torch.Tensor, labels: torch.Tensor, draws: Sequence[Draw], side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """With scale, rotation and bending too, in one bilinear pass; labels take the nearest pixel."""
    matrices = np.stack([_matrix(one, images.shape[-1], side) for one in draws])
    grid = _grid(torch.from_numpy(matrices).to(images.device, torch.float32), side)
    bends = [one.bend for one in draws if one.bend is not None]
    if bends:
        shares = torch.from_numpy(np.stack(bends) * (2 / images.shape[-1]))
        grid = grid + _bent(shares.to(images.device, torch.float32), side)
    cut = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    # float32 holds all 16 bits exactly, and outside there is no valid bit.
    bits = F.grid_sample(
        labels.unsqueeze(1).to(torch.float32),
        grid,
        mode="nearest",
        padding_mode="zeros",
        align_corners=False,
    )
    return cut, bits.squeeze(1).to(torch.int32)


def _joined(planes: Sequence[torch.Tensor]) -> torch.Tensor:
    """All bands as float32, (batch, bands, side, side) in channels-last memory."""
    return torch.cat([plane.to(torch.float32) for plane in planes], dim=-1).permute(0, 3, 1, 2)


def _bits(labels: torch.Tensor) -> torch.Tensor:
    """Bits 0 … 15 as int32: in int16 the highest is the sign."""
    return labels.to(torch.int32) & 0xFFFF


def _movable(pixels: torch.Tensor) -> torch.Tensor:
    """The same memory as a type that torch can move about, which it cannot with uint16."""
    return pixels.view(torch.int16) if pixels.dtype == torch.uint16 else pixels


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _words(pixels: torch.Tensor) -> torch.Tensor:
    """All bands of a pixel as one number, (side, side), where there is one of that size.

    Four bands of a byte move several times faster as one word. Else (side, side, bands), unchanged.
    """
    size = pixels.shape[-1] * pixels.element_size()
    return pixels.view(_WORDS[size]).squeeze(-1) if size in _WORDS else pixels


def _move(source: torch.Tensor, target: torch.Tensor, one: Draw) -> None:
    """Copy (side, side, …) with the flip and the quarter turns that were drawn."""
    # A quarter turn counter-clockwise is a transposition and a flip of the rows; each further one moves
    # on through the eight symmetries. Written so that all flips are one pass.
    rows, columns = one.turns in (1, 2), (one.turns in (2, 3)) != one.mirror
    if one.turns % 2:
        source = source.transpose(0, 1)
        rows, columns = (one.turns == 1) != one.mirror, one.turns == 3
    flips = [dim for dim, flip in enumerate((rows, columns)) if flip]
    target.copy_(source.flip(flips) if flips else source)


def _corner(one: Draw, tile_side: int, side: int) -> tuple[int, int]:
    """Top and left of the crop in its tile."""
    shares = one.row, one.column
    if one.focus is None:
        top, left = (_offset(share, tile_side, side) for share in shares)
    else:
        top, left = (
            min(max(pixel - int(share * side), 0), tile_side - side)
            for pixel, share in zip(one.focus, shares, strict=True)
        )
    return top, left


def _offset(share: float, tile_side: int, side: int) -> int:
    """Where a crop begins, from a number drawn between 0 and 1.

    Drawn from half a crop beyond both ends and moved in: pixels along the edge of a tile are in few of
    the places that a crop can have, and would hardly be seen.
    """
    room = tile_side - side
    beyond = min(room, side) // 2
    place = int(share * (room + 2 * beyond + 1)) - beyond
    return min(max(place, 0), room)


def _grid(matrices: torch.Tensor, side: int) -> torch.Tensor:
    """Where each output pixel's centre comes from: (batch, side, side, 2), x before y.

    As `F.affine_grid`, but without a matrix product, whose bits may depend on the batch and whose
    precision on the GPU's settings.
    """
    centres = (torch.arange(side, device=matrices.device) * 2 + 1) / side - 1
    rows, columns = centres.view(1, side, 1, 1), centres.view(1, 1, side, 1)
    along_x, along_y, shift = (matrices[:, None, None, :, part] for part in range(3))
    return along_x * columns + along_y * rows + shift


def _bent(points: torch.Tensor, side: int) -> torch.Tensor:
    """Displacements of a coarse grid, interpolated in two cubic passes as in the UNet's paper.

    Args:
        points: (batch, 2, points, points) float32, down before to the right.
        side: of the crop in pixels.

    Returns:
        (batch, side, side, 2), x before y, in the units of `points`.
    """
    weights = torch.from_numpy(_cubic(points.shape[-1], side)).to(points.device, torch.float32)
    # Sums written out: the bits of a matrix product may depend on the batch.
    rows = torch.zeros(*points.shape[:2], side, points.shape[-1], device=points.device)
    for k, weight in enumerate(weights.T):
        rows += weight[:, None] * points[:, :, k, None, :]
    both = torch.zeros(*points.shape[:2], side, side, device=points.device)
    for k, weight in enumerate(weights.T):
        both += weight * rows[..., k, None]
    return both.flip(1).permute(0, 2, 3, 1)


def _cubic(points: int, side: int) -> NDArray[np.float64]:
    """Weights of points that lie evenly from edge to edge for each pixel's centre, (side, points).

    Cubic convolution (Keys 1981, a = -1/2); beyond the edges the outermost points go on.
    """
    position = (np.arange(side) + 0.5) / side * (points - 1)
    weights = np.zeros((side, points))
    for step in range(-1, 3):
        point = np.floor(position) + step
        distance = np.abs(position - point)
        near = 1.5 * distance**3 - 2.5 * distance**2 + 1
        far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
        weight = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
        np.add.at(weights, (np.arange(side), np.clip(point, 0, points - 1).astype(int)), weight)
    return weights


def _matrix(one: Draw, tile_side: int, side: int) -> NDArray[np.float64]:
    """Output → input coordinates, each -1 … 1 over its image, (2, 3), as `_grid` takes them."""
    turn = math.radians(90 * one.turns + one.angle)
    cos, sin = math.cos(turn), math.sin(turn)
    # Image rows grow downwards, so a counter-clockwise turn reads the input with this sign of sine.
    rotate = np.array([[cos, -sin], [sin, cos]])
    mirror = np.diag([-1.0 if one.mirror else 1.0, 1.0])
    room = tile_side - side
    top, left = _corner(one, tile_side, side)
    centre = [(2 * offset - room) / tile_side for offset in (left, top)]
    linear = mirror @ rotate * (side / tile_side / one.scale)
    return np.concatenate([linear, np.array(centre)[:, None]], axis=1)
