"""webdataset: the 13 files in tars, and our own shards, which are tars of its convention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from benchmarks.contestants.samples import (
    BATCH,
    WORKERS,
    Tensors,
    TunedBatch,
    TunedMasks,
    colour,
    grey,
    interleaved,
    unpacked,
)
from benchmarks.data import COPIES, SPLIT, Data


def files(data: Data) -> Iterator[Tensors]:
    """The 13 files, decoded by OpenCV, one array of masks."""
    samples = _samples(_thirteen(data)).decode(_decode).map(_MaskedSample(data))
    return _batches(samples.batched(BATCH, partial=False))


def files_tuned(data: Data) -> Iterator[Tensors]:
    """The 13 files; simplejpeg, planes apart, masks joined into bits in the worker, nothing copied."""
    samples = _samples(_thirteen(data))
    batches = samples.batched(BATCH, collation_fn=TunedMasks(data), partial=False)
    return _batches(batches, prefetch_factor=4)


def documented(data: Data) -> Iterator[Tensors]:
    """Labels packed; webdataset's own decoder, which is Pillow's, and one four-band image."""
    samples = _samples(_ours(data)).decode("pil").map(_Sample(data))
    return _batches(samples.batched(BATCH, partial=False))


def tuned(data: Data) -> Iterator[Tensors]:
    """Labels packed; simplejpeg, planes apart, nothing copied."""
    collate = TunedBatch(data, "rgb.jpg", "nir.jpg", "labels.zst")
    batches = _samples(_ours(data)).batched(BATCH, collation_fn=collate, partial=False)
    return _batches(batches, prefetch_factor=4)


def _thirteen(data: Data) -> Sequence[Path]:
    return sorted((data.root / "tars").iterdir())


def _ours(data: Data) -> Sequence[Path]:
    return sorted((data.dataset / SPLIT).glob("*.tar"))


def _samples(tars: Sequence[Path]) -> Any:
    """A shuffled stream without end, each sample a mapping of bytes, as the documentation builds it."""
    urls = [str(tar) for tar in tars] * COPIES  # more than workers, also of a small set
    stream = webdataset.WebDataset(urls, shardshuffle=len(urls))
    return stream.shuffle(256, initial=64).repeat()


def _batches(batches: Any, **how: Any) -> Iterator[Tensors]:
    """Batches are made in the workers, as the documentation advises."""
    return iter(webdataset.WebLoader(batches, batch_size=None, num_workers=WORKERS, **how))


def _decode(key: str, content: bytes) -> Any:
    """A decoder of one's own, as the documentation shows it: OpenCV, as for the folder."""
    if key.endswith("rgb.jpg"):
        return colour(content)
    return grey(content) if key.endswith(("jpg", "png")) else None


class _MaskedSample:
    def __init__(self, data: Data) -> None:
        self.masks = [f"{name}.png" for name, _ in data.masks] + ["boundary.png", "mask.png"]

    def __call__(self, sample: Any) -> Any:
        image = interleaved(sample["rgb.jpg"], sample["nir.jpg"])
        return image, np.stack([sample[name] for name in self.masks])


class _Sample:
    def __init__(self, data: Data) -> None:
        self.shape = data.shape

    def __call__(self, sample: Any) -> Any:
        nir = sample["nir.jpg"].convert("L")  # `pil` makes RGB of everything
        return interleaved(sample["rgb.jpg"], nir), unpacked(sample["labels.zst"], self.shape)
