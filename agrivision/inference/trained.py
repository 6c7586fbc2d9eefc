"""A trained network with all that is needed to use it: bands, classes, statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from agrivision import checkpoint
from agrivision.config import ModelConfig
from agrivision.data.indices import places
from agrivision.data.normalise import Normaliser, Scope
from agrivision.data.schema import Schema
from agrivision.errors import AgrivisionError, BadInput, CheckpointError, ConfigurationError
from agrivision.json_values import entries, share
from agrivision.model.build import build_model
from agrivision.model.padding import dense_logits
from agrivision.model.precision import Precision, autocast
from agrivision.rundir import RunDirectory, best_step

ChannelStatistics = tuple[tuple[float, ...], tuple[float, ...]]  # means, standard deviations


@dataclass(frozen=True, kw_only=True)
class Description:
    """What weights alone do not tell.

    Attributes:
        model: configuration of the network.
        bands: that it was trained on, in order.
        classes: names by id.
        class_values: value of each class in the label rasters it learned from; empty for masks.
        dtype: numpy name of the pixels' type.
        tile: side of the training tiles in pixels.
        mean: subtracted from each band, in the units of the pixels.
        std: that each band is divided by.
        nodata: a pixel with this value in all bands holds no data; None where there is no such value.
        data_fingerprint: of the data set.
        data_mean: of each band over the training tiles, in the units of the pixels.
        data_std: of each band.
        scope: whose mean and deviation the network sees pixels by; see `Normaliser`.
        indices: names of the spectral indices that follow the bands.
        absolute: whether a network with another scope sees all channels by the data set's too.
        resolution: metres a pixel in the data set; None where nothing says where its tiles lie.
    """

    model: ModelConfig
    bands: tuple[str, ...]
    classes: tuple[str, ...]
    class_values: tuple[int, ...]
    dtype: str
    tile: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    nodata: float | None
    data_fingerprint: str
    data_mean: tuple[float, ...] = ()
    data_std: tuple[float, ...] = ()
    resolution: float | None = None
    scope: Scope = "data"
    indices: tuple[str, ...] = ()
    absolute: bool = False

    def __post_init__(self) -> None:
        # What older checkpoints lack: their networks see pixels by these, or by a range.
        object.__setattr__(self, "data_mean", self.data_mean or self.mean)
        object.__setattr__(self, "data_std", self.data_std or self.std)

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        schema: Schema,
        normaliser: Normaliser,
        indices: tuple[str, ...] = (),
    ) -> Description:
        """Of a network that is trained on a data set, with the indices of that names."""
        return cls(
            # The weights of the encoder are in the checkpoint; the file need not be there any more.
            model=dataclasses.replace(model, encoder_weights=None),
            bands=schema.bands,
            classes=schema.classes,
            class_values=schema.class_values,
            dtype=schema.dtype,
            tile=schema.tile,
            mean=normaliser.mean,
            std=normaliser.std,
            nodata=normaliser.nodata,
            data_fingerprint=schema.fingerprint,
            data_mean=schema.statistics.mean,
            data_std=schema.statistics.std,
            resolution=schema.resolution,
            scope=normaliser.scope,
            indices=indices,
            absolute=normaliser.absolute,
        )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Description:
        """From JSON values.

        Raises:
            CheckpointError: an entry is missing or unknown.
        """
        try:
            fields: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in content.items()
            }
            fields["model"] = ModelConfig(**content["model"])
            known = cls(**fields)
            known._check_sight()
            return known
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint's description does not fit: {error}") from None

    def _check_sight(self) -> None:
        """Raise KeyError, TypeError or ValueError where nothing can be seen in such a way."""
        if self.scope not in get_args(Scope):
            raise ValueError(f"it sees pixels relative to {str(self.scope)[:100]!r}")
        if not isinstance(self.absolute, bool) or (self.absolute and self.scope == "data"):
            raise ValueError(f"absolute is {str(self.absolute)[:100]!r}")
        if len(set(self.indices)) < len(self.indices):
            raise ValueError("an index stands twice")
        places(self.indices, self.bands)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)

    @property
    def normaliser(self) -> Normaliser:
        """As it was in training."""
        return Normaliser(
            mean=self.mean,
            std=self.std,
            nodata=self.nodata,
            scope=self.scope,
            indices=places(self.indices, self.bands),
            absolute=self.absolute,
        )

    @property
    def channels(self) -> int:
        """How many the network sees; see `Normaliser`."""
        return self.normaliser.channels


@dataclass(frozen=True)
class TrainedModel:
    """A network ready to predict.

    Attributes:
        module: in evaluation mode, on its device.
        description: what its bands and classes are.
        device: where it is.
        step: optimiser steps that it was trained for.
        folder: the checkpoint, or the exported file, that it came from.
        takes_pixels: whether the module takes pixels as they are, float32 of any size, and gives
            their probabilities, as one does that was exported with all around it. With the scope
            `field` it takes the statistics of the images' fields after them.
    """

    module: nn.Module
    description: Description
    device: torch.device
    step: int
    folder: Path
    takes_pixels: bool = False

    def scores(self) -> Mapping[str, float | None] | None:
        """The mIoU (`mIoU`) and the IoU by class of the checkpoint, 0 to 1, as its run has them.

        Returns:
            None where the run did not score it, or the network came from an exported file.
        """
        if not self.folder.is_dir():
            return None
        try:
            for row in RunDirectory(self.folder.parent.parent).rows("evaluation"):
                if row.get("step") == self.step:
                    found = {"mIoU": row["miou"], **entries(row["iou"])}
                    return {name: None if v is None else share(v) for name, v in found.items()}
        except (OSError, ValueError, KeyError):
            return None
        return None

    @property
    def normaliser(self) -> Normaliser | None:
        """What stands before the module; None where it takes pixels as they are."""
        return None if self.takes_pixels else self.description.normaliser

    @torch.inference_mode()
    def probabilities(
        self,
        images: torch.Tensor | NDArray[Any],
        *,
        precision: Precision = "fp32",
        margin: int = 0,
        statistics: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Class probabilities of a batch of images.

        Args:
            images: (batch, bands, height, width), any size, pixels as in the data set.
            precision: of the forward pass.
            margin: pixels along each edge that are of no interest.
            statistics: (batch, 2, channels) float32, means and deviations of the images' fields, where
                the network sees pixels relative to those; None takes each image for a field.

        Returns:
            (batch, classes, height, width) float32 on the device, less the margins.

        Raises:
            BadInput: the number of bands differs.
        """
        tensor = torch.as_tensor(images)
        if tensor.ndim != 4 or tensor.shape[1] != len(self.description.bands):
            raise BadInput(
                f"images of shape {tuple(tensor.shape)}: the network takes (batch, bands,"
                f" height, width), bands {', '.join(self.description.bands)}"
            )
        pixels = tensor.to(self.device).to(torch.float32)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        normaliser = self.description.normaliser
        if statistics is not None:
            statistics = statistics.to(self.device)
        elif normaliser.scope == "field":
            statistics = normaliser.statistics(pixels)
        with autocast(self.device, precision):
            if self.takes_pixels:
                known = (statistics,) if normaliser.scope == "field" else ()
                probabilities: torch.Tensor = self.module(pixels, *known)
                return _inner(probabilities, margin)
            normal = normaliser(pixels, statistics=statistics)
            logits = dense_logits(self.module, normal)
        return _inner(logits, margin).float().softmax(1)

    def predict(
        self,
        image: NDArray[Any],
        *,
        precision: Precision = "fp32",
        statistics: torch.Tensor | None = None,
    ) -> NDArray[np.uint8]:
        """The class of every pixel of one image.

        Args:
            image: (bands, height, width), any size, pixels as in the data set.
            precision: of the forward pass.
            statistics: (1, 2, channels) float32, as in `probabilities`.

        Returns:
            (height, width) uint8 class ids.

        Raises:
            BadInput: the number of bands differs.
        """
        probabilities = self.probabilities(image[None], precision=precision, statistics=statistics)
        return probabilities[0].argmax(0).to(torch.uint8).cpu().numpy()


def _inner(images: torch.Tensor, margin: int) -> torch.Tensor:
    height, width = images.shape[-2:]
    return images[..., margin : height - margin, margin : width - margin]


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means.

    Args:
        path: a run directory (its best checkpoint, or the latest where none was scored), a checkpoint,
            or a file in one.

    Raises:
        CheckpointError: there is none.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    folder = path if path.is_dir() else path.parent
    if (folder / checkpoint.MANIFEST).is_file():
        return folder
    run = RunDirectory(folder)
    found = {entry.step: entry.folder for entry in checkpoint.entries(run.checkpoints)}
    if not found:
        raise CheckpointError(f"no checkpoint in {path}: give a run directory or a checkpoint")
    scored = {step: score for step, score in run.evaluations().items() if step in found}
    best = best_step(scored)
    return found[max(found) if best is None else best]


def load_run(path: str | Path, device: str | torch.device | None = None) -> TrainedModel:
    """Load what a run has learned: the averaged weights where there are any.

    Args:
        path: a run directory, a checkpoint, or a file in one; see `find_checkpoint`.
        device: where to; None takes the GPU where there is one.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded = _load_whole(Path(path))
    try:
        description = Description.from_dict(loaded.states["description"])
        weights = loaded.states.get("ema") or loaded.states["model"]
        module = with_weights(description, weights, chosen)
    except KeyError as error:
        raise CheckpointError(f"{loaded.folder} has no state {error}") from None
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"cannot use {loaded.folder}: {reason}") from None
    return TrainedModel(module, description, chosen, loaded.step, loaded.folder)


def with_weights(
    description: Description, weights: Mapping[str, torch.Tensor], device: torch.device
) -> nn.Module:
    """The network of a description with these weights, ready to predict.

    Raises:
        ValueError: the weights are not its own, or its encoder is not there.
    """
    how = description.model, description.channels, len(description.classes)
    # Names and shapes are compared before memory is taken for what is only claimed.
    try:
        with torch.device("meta"):
            wanted = {name: tensor.shape for name, tensor in build_model(*how).state_dict().items()}
    except ConfigurationError as error:  # the caller says which file it is that wants such an encoder
        raise ValueError(str(error)) from None
    if wanted != {name: tensor.shape for name, tensor in weights.items()}:
        raise ValueError("its weights are not those of the network that it describes")
    module = build_model(*how)
    module.load_state_dict(weights)
    ready: nn.Module = module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return ready.eval()


def _load_whole(path: Path) -> checkpoint.Checkpoint:
    """The checkpoint meant; where a run's best is damaged, its newest whole one, with a warning."""
    folder = find_checkpoint(path)
    try:
        return checkpoint.load(folder)
    except AgrivisionError as error:
        if folder in (path, path.parent):
            raise
        checkpoint.log.warning("%s; taking the newest whole checkpoint instead", error)
        found = checkpoint.latest(folder.parent)
        assert found is not None  # there are checkpoints, and latest() raises if none is whole
        return found
