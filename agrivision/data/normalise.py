"""Pixels as they are in a data set → what a network sees: channels around zero, empty pixels zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from agrivision.config import Normalisation
from agrivision.data.indices import places
from agrivision.data.schema import Schema
from agrivision.errors import ConfigurationError

Scope = Literal["data", "tile", "field"]


@dataclass(frozen=True, kw_only=True)
class Normaliser:
    """Pixels → what the network sees: less a mean, divided by a deviation, empty pixels zero.

    Spectral indices follow the bands as further channels. They are computed of the pixels as they are:
    what augmentation does to the light does not reach them.

    Attributes:
        mean: by band, in the units of the pixels.
        std: by band; 0 is taken as 1, so that a band that never varies is only centred.
        nodata: a pixel with this value in all bands is empty; None where there is none.
        scope: whose mean and deviation: `data` those above, which leaves indices as they are; `tile`
            each image's own; `field` those of the field that an image is of, which whoever has the
            image must know: without them an image is taken for a field of its own.
        indices: of each index, the places of its two bands.
        absolute: with the scope `tile` or `field`, whether the network sees the channels by `mean` and
            `std` too: first all of them so, then all of them relative to the scope.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    nodata: float | None = None
    scope: Scope = "data"
    indices: tuple[tuple[int, int], ...] = ()
    absolute: bool = False

    @classmethod
    def of(cls, schema: Schema, how: Normalisation, indices: tuple[str, ...] = ()) -> Normaliser:
        """From the statistics of a data set.

        Args:
            schema: of the data set.
            how: see `DataConfig.normalisation`.
            indices: see `DataConfig.indices`.

        Raises:
            ConfigurationError: the data set lacks a band that an index needs.
        """
        known, nodata = schema.statistics, schema.nodata
        try:
            found = places(indices, schema.bands)
        except ValueError as error:
            raise ConfigurationError(f"data.indices: {error}") from None
        parts = how.split("+")
        scope: Scope = "tile" if "tile" in parts else "field" if "field" in parts else "data"
        mean, std = known.mean, known.std
        if "range" in parts:
            largest = float(max(map(abs, (*known.minimum, *known.maximum))))
            mean, std = (0.0,) * len(mean), (largest,) * len(std)
        return cls(
            mean=mean, std=std, nodata=nodata, scope=scope, indices=found, absolute=len(parts) > 1
        )

    @property
    def channels(self) -> int:
        """How many the network sees: the bands, then the indices; twice that with `absolute`."""
        return (len(self.mean) + len(self.indices)) * (1 + self.absolute)

    def __call__(
        self,
        images: torch.Tensor,
        gain: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        statistics: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Normalise pixels, and change their radiometry in the same pass.

        Args:
            images: (batch, bands, height, width) of any type, best in channels-last memory.
            gain: (batch, bands) float32, a factor of the normalised bands; None for 1.
            shift: (batch, 1) or (batch, bands) float32, added after that; None for 0.
            statistics: (batch, 2, channels) float32, means and deviations, for the scopes `tile` and
                `field`; None takes those of the images.

        Returns:
            (batch, channels, height, width) float32 in channels-last memory, never the memory of
            `images`. NaN and infinite values, and empty pixels, are 0.
        """
        pixels = images.permute(0, 2, 3, 1).contiguous()
        if self.scope == "data":
            views: list[torch.Tensor | None] = [None]
        else:
            own = self._statistics(pixels) if statistics is None else statistics
            views = [None, own] if self.absolute else [own]
        indices = self._indices(pixels) if self.indices else None
        seen = [self._seen(pixels, indices, view, gain, shift) for view in views]
        normal = seen[0] if len(seen) == 1 else torch.cat(seen, dim=-1)
        if self.nodata is not None:
            normal.masked_fill_((pixels == self.nodata).all(dim=-1, keepdim=True), 0.0)
        if pixels.dtype.is_floating_point:
            normal.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        return normal.permute(0, 3, 1, 2)

    def _seen(
        self,
        pixels: torch.Tensor,
        indices: torch.Tensor | None,
        statistics: torch.Tensor | None,
        gain: torch.Tensor | None,
        shift: torch.Tensor | None,
    ) -> torch.Tensor:
        """Bands and indices by the statistics, or without them by those of the data set."""
        mean, std = self._bands(statistics, pixels.device)
        factor = 1 / std if gain is None else gain / std
        offset = -mean * factor if shift is None else shift - mean * factor
        normal = _scaled(pixels, factor, offset)
        if indices is None:
            return normal
        if statistics is not None:
            indices = self._normal_indices(indices, statistics)
        return torch.cat([normal, indices], dim=-1)

    def statistics(self, images: torch.Tensor) -> torch.Tensor:
        """Means and deviations of whole images over the pixels that are not empty.

        Args:
            images: (batch, bands, height, width) of any type.

        Returns:
            (batch, 2, channels) float32; of an image that is empty zeros.
        """
        return self._statistics(images.permute(0, 2, 3, 1))

    def _statistics(self, pixels: torch.Tensor) -> torch.Tensor:
        values = pixels.float()
        if self.indices:
            values = torch.cat([values, self._indices(pixels)], dim=-1)
        there = torch.isfinite(values).all(dim=-1, keepdim=True)
        if self.nodata is not None:
            there &= ~(pixels == self.nodata).all(dim=-1, keepdim=True)
        values = torch.where(there, values, 0.0)
        count = there.sum((1, 2)).clamp(min=1)
        # Rows first: long sums of float32 lose digits, and each runtime others.
        mean = values.sum(2).sum(1) / count
        around = torch.where(there, values - mean[:, None, None], 0.0)
        return torch.stack([mean, (around.square().sum(2).sum(1) / count).sqrt()], dim=1)

    def _bands(
        self, statistics: torch.Tensor | None, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of each band, (batch or 1, bands)."""
        if statistics is None:
            spread = tuple(value or 1.0 for value in self.std)
            mean, std = (torch.tensor([each], device=device) for each in (self.mean, spread))
            return mean, std
        mean, std = statistics[:, :, : len(self.mean)].unbind(1)
        return mean, torch.where(std == 0, 1.0, std)

    def _indices(self, pixels: torch.Tensor) -> torch.Tensor:
        """The indices of (batch, height, width, bands), between -1 and 1; 0 where both bands are 0."""
        found = []
        for first, second in self.indices:
            a, b = pixels[..., first].float(), pixels[..., second].float()
            total = a + b
            ratio = (a - b) / torch.where(total == 0, 1.0, total)
            found.append(ratio.clamp(-1, 1))
        return torch.stack(found, dim=-1)

    def _normal_indices(self, indices: torch.Tensor, statistics: torch.Tensor) -> torch.Tensor:
        mean, std = statistics[:, :, len(self.mean) :, None, None].permute(0, 3, 4, 1, 2).unbind(3)
        return (indices - mean) / torch.where(std == 0, 1.0, std)


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
