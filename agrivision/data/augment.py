"""A batch and its samples' generators → a batch the network can take, on the device.

Every random choice is drawn from a generator of its own for (seed, epoch, tile), so that a sample is
changed in the same way whatever rank, thread or batch it is met in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from agrivision.config import AugmentConfig
from agrivision.data.order import Stream, generator
from agrivision.data.schema import Schema


@dataclass(frozen=True, kw_only=True)
class Normaliser:
    """Pixels → what the network sees: less a mean, divided by a deviation, empty pixels zero.

    Attributes:
        mean: by band, in the units of the pixels.
        std: by band; 0 is taken as 1, so that a band that never varies is only centred.
        nodata: a pixel with this value in all bands is empty; None where there is none.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    nodata: float | None = None

    @classmethod
    def of(cls, schema: Schema, how: Literal["bands", "range"]) -> Normaliser:
        """From the statistics of a data set.

        Args:
            schema: of the data set.
            how: see `DataConfig.normalisation`.
        """
        known = schema.statistics
        if how == "bands":
            return cls(mean=known.mean, std=known.std, nodata=schema.nodata)
        largest = max(map(abs, (*known.minimum, *known.maximum)))
        bands = len(schema.bands)
        return cls(mean=(0.0,) * bands, std=(float(largest),) * bands, nodata=schema.nodata)

    def __call__(
        self,
        images: torch.Tensor,
        gain: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Normalise pixels, and change their radiometry in the same pass.

        Args:
            images: (batch, bands, height, width) of any type, best in channels-last memory.
            gain: (batch, bands) float32, a factor of the normalised bands; None for 1.
            shift: (batch, 1) float32, added after that; None for 0.

        Returns:
            float32 of the same shape in channels-last memory, never the memory of `images`. NaN and
            infinite values, and empty pixels, are 0.
        """
        pixels = images.permute(0, 2, 3, 1).contiguous()
        mean, std = (
            torch.tensor(by_band, device=pixels.device) for by_band in (self.mean, self._spread)
        )
        factor = 1 / std.unsqueeze(0) if gain is None else gain / std
        offset = -mean * factor if shift is None else shift - mean * factor
        normal = _scaled(pixels, factor, offset)
        if self.nodata is not None:
            normal.masked_fill_((pixels == self.nodata).all(dim=-1, keepdim=True), 0.0)
        if pixels.dtype.is_floating_point:
            normal.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        return normal.permute(0, 3, 1, 2)

    @property
    def _spread(self) -> tuple[float, ...]:
        return tuple(value or 1.0 for value in self.std)


def _scaled(pixels: torch.Tensor, factor: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """`pixels * factor + offset` in one pass.

    A row of pixels is one long row of numbers to it, with the bands' factors repeated: a loop over a
    handful of bands at a time is several times slower.

    Args:
        pixels: (batch, height, width, bands), contiguous.
        factor: (batch or 1, bands) float32.
        offset: like `factor`.
    """
    batch, height, width, bands = pixels.shape
    rows = pixels.reshape(batch, height, width * bands)
    rows = rows if rows.dtype == torch.uint8 else rows.to(torch.float32)
    repeated = (part.repeat(1, width).unsqueeze(1) for part in (offset, factor))
    start, factors = repeated
    return torch.addcmul(start, rows, factors).view(batch, height, width, bands)


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
        shift: added to the normalised bands.
        gain: factor of each band.
    """

    mirror: bool
    turns: int
    row: float
    column: float
    scale: float
    angle: float
    shift: float
    gain: tuple[float, ...]


def draw(config: AugmentConfig, bands: int, seed: int, epoch: int, tile: int) -> Draw:
    """Draw a sample's changes; all numbers are drawn whether used or not, in a fixed order."""
    random = generator(seed, Stream.AUGMENT, epoch, tile).random(8 + bands)
    symmetric = 2 * random - 1  # -1 … 1
    contrast = 1 + config.contrast * symmetric[7]
    return Draw(
        mirror=config.flip and bool(random[0] < 0.5),
        turns=int(random[1] * 4) if config.rotate90 else 0,
        row=float(random[2]),
        column=float(random[3]),
        scale=float((1 + config.scale) ** symmetric[4]),
        angle=float(config.rotate * symmetric[5]),
        shift=float(config.brightness * symmetric[6]),
        gain=tuple((contrast * (1 + config.band_gain * symmetric[8:])).tolist()),
    )


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Crops, flips, turns, warps and changes the radiometry of training samples.

    Attributes:
        config: which changes, how strong.
        normaliser: of the data set.
        crop: side of the crop in pixels; None keeps the tiles whole.
        seed: of the run.
    """

    config: AugmentConfig
    normaliser: Normaliser
    crop: int | None
    seed: int

    def __call__(
        self, planes: Sequence[torch.Tensor], labels: torch.Tensor, epoch: int, tiles: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Change a batch.

        Args:
            planes: (batch, side, side, bands) each, as decoded; together they have all bands.
            labels: (batch, side, side) label bits, int16 or int32.
            epoch: of the batch.
            tiles: their numbers in the split.

        Returns:
            images (batch, bands, crop, crop) float32, normalised, in channels-last memory, and
            labels (batch, crop, crop) int32, bits 0 … 15; pixels from outside of a tile are invalid.
        """
        bands = sum(plane.shape[-1] for plane in planes)
        draws = [draw(self.config, bands, self.seed, epoch, tile) for tile in tiles]
        gain, shift = self._radiometry(draws, planes[0].device)
        if self.config.scale or self.config.rotate:
            joined = torch.cat([plane.to(torch.float32) for plane in planes], dim=-1)
            # What a warp moves in from outside is zero, as empty pixels are once they are normalised.
            images = self.normaliser(joined.permute(0, 3, 1, 2), gain, shift)
            changed, bits = self._warp(images, _bits(labels), draws)
            return changed.contiguous(memory_format=torch.channels_last), bits
        pixels, cut = self._cut(planes, labels, draws)
        return self.normaliser(pixels.permute(0, 3, 1, 2), gain, shift), _bits(cut)

    def _radiometry(
        self, draws: Sequence[Draw], device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gain (batch, bands) and shift (batch, 1), or None where neither changes anything."""
        if not (self.config.brightness or self.config.contrast or self.config.band_gain):
            return None, None
        gain = torch.tensor([one.gain for one in draws]).to(device, non_blocking=True)
        shift = torch.tensor([[one.shift] for one in draws]).to(device, non_blocking=True)
        return gain, shift

    def _side(self, tile_side: int) -> int:
        return tile_side if self.crop is None else min(self.crop, tile_side)

    def _cut(
        self, planes: Sequence[torch.Tensor], labels: torch.Tensor, draws: Sequence[Draw]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Crops and the eight symmetries, (batch, crop, crop, bands): pixels move, none is computed."""
        tile_side, bands = planes[0].shape[1], sum(plane.shape[-1] for plane in planes)
        side = self._side(tile_side)
        pixels = planes[0].new_empty((len(draws), side, side, bands))
        bits = labels.new_empty((len(draws), side, side))
        for sample, one in enumerate(draws):
            top, left = (_offset(place, tile_side, side) for place in (one.row, one.column))
            window = (sample, slice(top, top + side), slice(left, left + side))
            joined = torch.cat([_movable(plane[window]) for plane in planes], dim=-1)
            _move(_words(joined), _words(_movable(pixels[sample])), one)
            _move(labels[window], bits[sample], one)
        return pixels, bits

    def _warp(
        self, images: torch.Tensor, labels: torch.Tensor, draws: Sequence[Draw]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, with scale and rotation, in one bilinear pass; labels take the nearest pixel."""
        side = self._side(images.shape[-1])
        matrices = np.stack([_matrix(one, images.shape[-1], side) for one in draws])
        grid = _grid(torch.from_numpy(matrices).to(images.device, torch.float32), side)
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


def _matrix(one: Draw, tile_side: int, side: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Output → input coordinates, each -1 … 1 over its image, (2, 3), as `_grid` takes them."""
    turn = math.radians(90 * one.turns + one.angle)
    cos, sin = math.cos(turn), math.sin(turn)
    # Image rows grow downwards, so a counter-clockwise turn reads the input with this sign of sine.
    rotate = np.array([[cos, -sin], [sin, cos]])
    mirror = np.diag([-1.0 if one.mirror else 1.0, 1.0])
    room = tile_side - side
    offsets = [_offset(share, tile_side, side) for share in (one.column, one.row)]
    centre = [(2 * offset - room) / tile_side for offset in offsets]
    linear = mirror @ rotate * (side / tile_side / one.scale)
    return np.concatenate([linear, np.array(centre)[:, None]], axis=1)
