"""The script that everybody writes: windows, probabilities added up in one array, argmax."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from rasterio.windows import Window
from torch import Tensor

from benchmarks.contestants.scenes import Make, Setting, load_network, write_ids


def plain(setting: Setting) -> Make:
    """One window at a time, memory as it comes."""
    return _script(setting, 1, torch.contiguous_format)


def tuned(setting: Setting) -> Make:
    """As many windows at a time as the others have, channels last."""
    return _script(setting, setting.batch, torch.channels_last)


def starts(length: int, side: int, stride: int) -> list[int]:
    """Where windows begin along a side of a scene; the last ends with it."""
    return [*range(0, length - side, stride), length - side]


def _script(setting: Setting, batch: int, layout: torch.memory_format) -> Make:
    model, description = load_network(setting)
    model.to(memory_format=layout)
    side, classes = setting.side, len(description.classes)

    def probabilities(images: list[NDArray[np.uint8]]) -> Tensor:
        pixels = torch.from_numpy(np.stack(images).astype(np.float32)).to(setting.device)
        with torch.no_grad(), setting.autocast():
            logits: Tensor = model(pixels.contiguous(memory_format=layout))
        return logits.float().softmax(1)

    def make(scene: Path, folder: Path) -> Path:
        with rasterio.open(scene) as source:
            total = np.zeros((classes, source.height, source.width), np.float32)
            counts = np.zeros((source.height, source.width), np.float32)
            rows, columns = (
                starts(length, side, setting.tiling.stride) for length in (source.height, source.width)
            )
            for places in _batches(product(rows, columns), batch):
                images = [source.read(window=Window(x, y, side, side)) for y, x in places]
                found = probabilities(images).cpu().numpy()
                for (y, x), each in zip(places, found, strict=True):
                    total[:, y : y + side, x : x + side] += each
                    counts[y : y + side, x : x + side] += 1
            ids = (total / counts).argmax(0).astype(np.uint8)
            return write_ids(folder / f"{scene.stem}.tif", source, ids)

    return make


def _batches(places: Iterator[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    while batch := list(islice(places, size)):
        yield batch
