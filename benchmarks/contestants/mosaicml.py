"""mosaicml-streaming: MDS shards, read by its StreamingDataset and torch's DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from streaming import StreamingDataset
from torch.utils.data import DataLoader

from benchmarks.contestants.samples import (
    BATCH,
    WORKERS,
    DocumentedSample,
    Tensors,
    TunedBatch,
    raw_sample,
)
from benchmarks.data import Data


class Tiles(StreamingDataset):
    """A data set with something done to each sample, as the documentation shows it."""

    def __init__(self, folder: str, sample: Callable[[Any], Any] | None) -> None:
        super().__init__(local=folder, batch_size=BATCH, shuffle=True)
        self._sample = sample

    def __getitem__(self, tile: Any) -> Any:
        content = super().__getitem__(tile)
        return content if self._sample is None else self._sample(content)


def documented(data: Data) -> Iterator[Tensors]:
    """Columns of the type jpeg, and one four-band image."""
    return _batches(Tiles(str(data.root / "mds-documented"), DocumentedSample(data)))


def tuned(data: Data) -> Iterator[Tensors]:
    """Columns of bytes; simplejpeg, planes apart, nothing copied."""
    how = {"collate_fn": TunedBatch(data), "prefetch_factor": 4, "persistent_workers": True}
    return _batches(Tiles(str(data.root / "mds-tuned"), None), **how)


def raw(data: Data) -> Iterator[Tensors]:
    """Columns of arrays."""
    how = {"prefetch_factor": 4, "persistent_workers": True}
    return _batches(Tiles(str(data.root / "mds-raw"), raw_sample), **how)


def _batches(tiles: Tiles, **how: Any) -> Iterator[Tensors]:
    return iter(DataLoader(tiles, BATCH, num_workers=WORKERS, drop_last=True, **how))
