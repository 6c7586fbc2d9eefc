"""litdata: chunks made by its `optimize`, read by its StreamingDataset and StreamingDataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from litdata import StreamingDataLoader, StreamingDataset

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
        super().__init__(folder, shuffle=True, drop_last=True)
        self._sample = sample

    def __getitem__(self, tile: Any) -> Any:
        content = super().__getitem__(tile)
        return content if self._sample is None else self._sample(content)


def documented(data: Data) -> Iterator[Tensors]:
    """Images as its serializer for JPEG keeps and decodes them, and one four-band image."""
    return _batches(Tiles(str(data.root / "litdata-documented"), DocumentedSample(data)))


def tuned(data: Data) -> Iterator[Tensors]:
    """Bytes; simplejpeg, planes apart, nothing copied."""
    how = {"collate_fn": TunedBatch(data), "prefetch_factor": 4, "persistent_workers": True}
    return _batches(Tiles(str(data.root / "litdata-tuned"), None), **how)


def raw(data: Data) -> Iterator[Tensors]:
    """Arrays."""
    how = {"prefetch_factor": 4, "persistent_workers": True}
    return _batches(Tiles(str(data.root / "litdata-raw"), raw_sample), **how)


def _batches(tiles: Tiles, **how: Any) -> Iterator[Tensors]:
    loader = StreamingDataLoader(tiles, batch_size=BATCH, num_workers=WORKERS, drop_last=True, **how)
    return iter(loader)
