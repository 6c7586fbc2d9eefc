"""What all tiles of a field have in common: means and deviations of their channels.

A network that sees pixels relative to their field need not know light, season and sensor of a flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from agrivision.data.indices import indices_of
from agrivision.data.normalise import Scope
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.errors import DatasetError


def channels_of(schema: Schema) -> tuple[str, ...]:
    """Names of the channels that a data set counts: its bands, then the indices they suffice for."""
    return (*schema.bands, *indices_of(schema.bands))


@dataclass(frozen=True, kw_only=True)
class FieldStatistics:
    """Mean and deviation of each channel over the valid pixels of a tile's field.

    Tiles that overlap count what they share twice.

    Attributes:
        table: float32 (fields, 2, channels): means, then standard deviations.
        field: number of each tile's field, int64 (tiles,).
    """

    table: torch.Tensor
    field: NDArray[np.int64]

    @classmethod
    def of(cls, reader: SplitReader) -> FieldStatistics:
        """From the indexes of a split.

        Raises:
            DatasetError: an index cannot be read, or was written by a version that did not count.
        """
        channels = len(channels_of(reader.schema))
        names, valid, moments = [], [], []
        for index in reader.indexes():
            if index.dtype.names is None or "moments" not in index.dtype.names:
                raise DatasetError(
                    f"{reader.dataset} has no statistics of its fields (it was prepared by an earlier"
                    " version): prepare it again, or choose another data.normalisation"
                )
            if index["moments"].shape[1] != channels:
                raise DatasetError(f"{reader.dataset} counts other channels: prepare it again")
            names.append(index["field"])
            valid.append(index["valid"])
            moments.append(index["moments"])
        fields, field = np.unique(np.concatenate(names), return_inverse=True)
        pixels = np.zeros(len(fields))
        np.add.at(pixels, field, np.concatenate(valid))
        sums = np.zeros((len(fields), channels, 2))
        np.add.at(sums, field, np.concatenate(moments))
        return cls(table=_table(pixels, sums), field=field.astype(np.int64))

    def __getitem__(self, tiles: Sequence[int]) -> torch.Tensor:
        """Of some tiles' fields: float32 (tiles, 2, channels)."""
        return self.table[torch.from_numpy(self.field[list(tiles)])]


def fields_of(reader: SplitReader, scope: Scope) -> FieldStatistics | None:
    """What a network with this scope has to know of a split's fields; None where that is nothing.

    Raises:
        DatasetError: see `FieldStatistics.of`.
    """
    return FieldStatistics.of(reader) if scope == "field" else None


def of_tiles(
    fields: FieldStatistics | None, tiles: Sequence[int], device: torch.device
) -> torch.Tensor | None:
    """Statistics of some tiles' fields on a device, as a normaliser takes them, where there are any."""
    return None if fields is None else fields[tiles].to(device)


def _table(pixels: NDArray[np.float64], sums: NDArray[np.float64]) -> torch.Tensor:
    """Means and deviations from (fields,) pixels and (fields, channels, 2) sums."""
    means, squares = np.moveaxis(sums / np.maximum(pixels, 1)[:, None, None], 2, 0)
    deviations = np.sqrt(np.maximum(squares - means**2, 0))
    return torch.from_numpy(np.stack([means, deviations], axis=1).astype(np.float32))
