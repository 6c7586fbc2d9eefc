"""Every way from a scene in a GeoTIFF to a map of class ids in another, with one network.

Each shows the network squares of the same size at the same distance, as many at a time. The peers get
the network in a module that normalises pixels on its device, as ours does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agrivision import checkpoint
from agrivision.inference.predict import PredictOptions, predict
from agrivision.inference.predictor import Predictor
from agrivision.inference.scene import look
from agrivision.inference.scenes import How, SceneWork
from agrivision.inference.tiling import Tiling
from agrivision.inference.trained import Description, load_run
from agrivision.model.build import build_model
from agrivision.model.precision import Precision

Make = Callable[[Path, Path], Path]  # a scene and a folder → the map in it


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all have in common.

    Attributes:
        run: directory of the run whose network is used.
        tiling: as we cut a scene; the network sees a tile with its margins.
        batch: windows in one forward pass.
        precision: of the forward pass.
        device: where it runs.
        workers: processes of the peers' loaders; 0 where the processor has the network to compute.
    """

    run: Path
    tiling: Tiling
    batch: int
    precision: Precision
    device: torch.device
    workers: int

    @property
    def side(self) -> int:
        """Pixels of what the network sees."""
        return self.tiling.tile + 2 * self.tiling.margin

    def autocast(self) -> torch.autocast:
        """The same precision for everybody."""
        bfloat = self.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat)


@dataclass(frozen=True, kw_only=True)
class Mapper:
    """One way to make a map.

    Attributes:
        title: in the table.
        opens: module and function that makes ready; imported when it is its turn.
        needs: modules that it takes.
    """

    title: str
    opens: str
    needs: tuple[str, ...] = ()

    def ready(self, setting: Setting) -> Make:
        """Load the network, and return what makes a map."""
        module, _, function = self.opens.partition(":")
        opened = getattr(importlib.import_module(f"benchmarks.contestants.{module}"), function)
        result: Make = opened(setting)
        return result


OURS, ALONE, PLAIN, TUNED = "agrivision", "agrivision-map", "plain", "plain-tuned"
TORCHGEO, RASTERVISION = "torchgeo", "raster-vision"
MAPPERS = {
    PLAIN: Mapper(title="plain script, a window at a time", opens="sliding:plain"),
    TUNED: Mapper(title="the same in batches, channels-last", opens="sliding:tuned"),
    TORCHGEO: Mapper(title="torchgeo, GridGeoSampler", opens="torchgeo:grid", needs=("torchgeo",)),
    RASTERVISION: Mapper(
        title="raster-vision, predict_dataset, smooth labels",
        opens="rastervision:smooth",
        needs=("rastervision",),
    ),
    ALONE: Mapper(title="agrivision, the map alone", opens="scenes:alone"),
    OURS: Mapper(title="agrivision predict", opens="scenes:ours"),
}


def alone(setting: Setting) -> Make:
    """The map, and none of what `predict` makes of it."""
    network = load_run(setting.run, setting.device)
    how = How(
        predictor=Predictor.of([network], precision=setting.precision),
        tiling=setting.tiling,
        batch_size=setting.batch,
    )

    def make(scene: Path, folder: Path) -> Path:
        work = SceneWork(look(scene, network.description), folder, how)
        work.predict(range(work.grid.blocks), lambda _: None)
        work.finish(lambda _: None)
        return work.layers.map

    return make


def ours(setting: Setting) -> Make:
    """As `agrivision predict` does it: also a style, a picture, a STAC item and a page."""
    network, tiling = load_run(setting.run, setting.device), setting.tiling
    options = PredictOptions(
        batch_size=setting.batch,
        precision=setting.precision,
        tile=tiling.tile,
        margin=tiling.margin,
        overlap=tiling.overlap,
    )

    def make(scene: Path, folder: Path) -> Path:
        return predict(network, [scene], folder, options).maps[0]

    return make


class OnPixels(nn.Module):
    """A network that normalises the pixels itself.

    Args:
        network: from normalised images to logits.
        description: with the statistics.
    """

    def __init__(self, network: nn.Module, description: Description) -> None:
        super().__init__()
        self.network = network
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(description.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(description.std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images (batch, bands, height, width), float32, of a size that fits the network."""
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits


def load_network(setting: Setting) -> tuple[OnPixels, Description]:
    """The network as torch's users load one: contiguous, in evaluation mode, nothing folded."""
    states = checkpoint.load(next((setting.run / "checkpoints").iterdir())).states
    description = Description.from_dict(states["description"])
    module = build_model(description.model, description.channels, len(description.classes))
    module.load_state_dict(states["model"])
    return OnPixels(module, description).to(setting.device).eval(), description


def write_ids(path: Path, scene: Any, ids: NDArray[np.uint8]) -> Path:
    """Write a map of class ids as a GeoTIFF on the grid of its scene, which is open."""
    profile = scene.profile | {"count": 1, "dtype": "uint8", "nodata": 255}
    with rasterio.open(path, "w", **profile) as target:
        target.write(ids, 1)
    return path
