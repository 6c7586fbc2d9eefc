"""torchgeo: chips of a RasterDataset by its GridGeoSampler, put together by their bounds.

Its documentation has the sampler for this purpose and leaves the rest to the user. As its maintainers
show it elsewhere, classes are decided chip by chip, and half of what a chip shares with the next is
thrown away on each side.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
import torch
from torch.utils.data import DataLoader
from torchgeo.datasets import RasterDataset, stack_samples
from torchgeo.samplers import GridGeoSampler

from benchmarks.contestants.scenes import Make, Setting, load_network, write_ids


def grid(setting: Setting) -> Make:
    """A DataLoader, argmax, and one array for the map."""
    model, _ = load_network(setting)
    side, stride = setting.side, setting.tiling.stride
    cut = (side - stride) // 2

    def make(scene: Path, folder: Path) -> Path:
        dataset = RasterDataset(scene)
        loader = DataLoader(
            dataset,
            sampler=GridGeoSampler(dataset, size=side, stride=stride),
            batch_size=setting.batch,
            num_workers=setting.workers,
            collate_fn=stack_samples,
        )
        with rasterio.open(scene) as source:
            ids = np.full(source.shape, 255, np.uint8)
            for batch in loader:
                with torch.inference_mode(), setting.autocast():
                    logits = model(batch["image"].to(setting.device))
                found = logits.argmax(1).to(torch.uint8).cpu().numpy()
                for (across, down, _), chip in zip(batch["bounds"], found, strict=True):
                    column, row = ~source.transform * (across.start, down.stop)
                    top, left = round(row), round(column)
                    # The scene's own edges have no other chip.
                    y, bottom = _kept(top, side, cut, source.height)
                    x, right = _kept(left, side, cut, source.width)
                    ids[y:bottom, x:right] = chip[y - top : bottom - top, x - left : right - left]
            return write_ids(folder / f"{scene.stem}.tif", source, ids)

    return make


def _kept(start: int, side: int, cut: int, length: int) -> tuple[int, int]:
    """The pixels along one side of a scene that are taken from a chip."""
    begin = max(0, start) if start <= 0 else start + cut
    end = start + side
    return begin, length if end >= length else end - cut
