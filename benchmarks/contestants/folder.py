"""A folder of 13 files a tile, read by torch's DataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.contestants.samples import BATCH, WORKERS, Tensors, TunedMasks, interleaved
from benchmarks.data import COPIES, Data


class Folder(Dataset[Any]):
    """As every tutorial reads it: one imread a file, one array of masks."""

    def __init__(self, data: Data) -> None:
        self.data, self.keys = data, data.tile_keys()

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, tile: int) -> Any:
        rgb, nir, *masks = map(str, self.data.files(self.keys[tile]).values())
        colour = cv2.cvtColor(cv2.imread(rgb), cv2.COLOR_BGR2RGB)
        image = interleaved(colour, cv2.imread(nir, cv2.IMREAD_GRAYSCALE))
        return image, np.stack([cv2.imread(mask, cv2.IMREAD_GRAYSCALE) for mask in masks])


class FolderBytes(Folder):
    """The files' contents, for TunedMasks."""

    def __getitem__(self, tile: int) -> Any:
        files = self.data.files(self.keys[tile])
        return {name: path.read_bytes() for name, path in files.items()}


def documented(data: Data) -> Iterator[Tensors]:
    """As tutorials do it, with OpenCV."""
    return _batches(Folder(data))


def tuned(data: Data) -> Iterator[Tensors]:
    """simplejpeg, planes apart, masks joined into bits in the worker, nothing copied."""
    return _batches(FolderBytes(data), collate_fn=TunedMasks(data), prefetch_factor=4)


def _batches(dataset: Folder, **how: Any) -> Iterator[Tensors]:
    """Many permutations in a row, so that no epoch ends while it is measured."""
    sampler = RandomSampler(dataset, num_samples=COPIES * len(dataset))
    loader = DataLoader(
        dataset,
        BATCH,
        sampler=sampler,
        num_workers=WORKERS,
        persistent_workers=True,
        drop_last=True,
        **how,
    )
    return iter(loader)
