"""One trained network or several, from one side or from eight: the mean of their probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from numpy.typing import NDArray

from agrivision.errors import BadInput
from agrivision.inference.trained import ChannelStatistics, Description, TrainedModel
from agrivision.model.folding import folded
from agrivision.model.precision import Precision


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """What a map is made with.

    Attributes:
        networks: of the same bands and classes; their probabilities are averaged.
        symmetries: whether each sees an image in all eight positions of a square (test-time
            augmentation), eight times the work.
        precision: of the forward passes.
        fast: normalisation is folded into convolutions, which changes probabilities by rounding.
        statistics: means and deviations of the channels of the scene that is predicted, for networks
            that see pixels relative to their field; None: see `TrainedModel.probabilities`.
    """

    networks: tuple[TrainedModel, ...]
    symmetries: bool = False
    precision: Precision = "fp32"
    fast: bool = False
    statistics: ChannelStatistics | None = None

    @classmethod
    def of(
        cls,
        networks: Sequence[TrainedModel],
        *,
        symmetries: bool = False,
        precision: Precision = "fp32",
    ) -> Predictor:
        """Check that the networks belong together.

        Raises:
            BadInput: they were trained for different bands, classes or types of pixels.
        """
        first = networks[0]
        for other in networks[1:]:
            for name in ("bands", "classes", "dtype", "scope", "indices"):
                one, two = (getattr(each.description, name) for each in (first, other))
                if one != two:
                    raise BadInput(
                        f"{first.folder} and {other.folder} cannot be averaged: their {name} differ"
                        f" ({_text(one)}; {_text(two)})"
                    )
        return cls(networks=tuple(networks), symmetries=symmetries, precision=precision)

    @property
    def description(self) -> Description:
        """Bands, classes and statistics: those of the first network."""
        return self.networks[0].description

    @property
    def device(self) -> torch.device:
        """Where the probabilities are."""
        return self.networks[0].device

    @cached_property
    def _ready(self) -> Sequence[TrainedModel]:
        if not self.fast:
            return self.networks
        return [replace(each, module=folded(each.module)) for each in self.networks]

    @torch.inference_mode()
    def probabilities(
        self,
        images: torch.Tensor | NDArray[Any],
        *,
        margin: int = 0,
        statistics: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Class probabilities of a batch of images.

        Args:
            images: (batch, bands, height, width), pixels as in the data set.
            margin: pixels along each edge that are of no interest.
            statistics: (batch, 2, channels) of each image's field; None takes those of the scene.

        Returns:
            (batch, classes, height, width) float32 on the device, less the margins.
        """
        tensor = torch.as_tensor(images)
        if statistics is None and self.statistics is not None:
            statistics = torch.tensor([self.statistics]).expand(len(tensor), -1, -1)
        total: torch.Tensor | None = None
        for network in self._ready:
            for turns, mirrored in positions(self.symmetries):
                turned = _turn(tensor, turns, mirrored=mirrored)
                found = network.probabilities(
                    turned, precision=self.precision, margin=margin, statistics=statistics
                )
                back = _turn_back(found, turns, mirrored=mirrored)
                total = back if total is None else total.add_(back)
        assert total is not None
        count = len(self.networks) * (8 if self.symmetries else 1)
        return total if count == 1 else total.div_(count)


def positions(symmetries: bool) -> Iterator[tuple[int, bool]]:
    """Quarter turns and mirroring of each position in which an image is shown."""
    for mirrored in (False, True) if symmetries else (False,):
        for turns in range(4 if symmetries else 1):
            yield turns, mirrored


def _turn(images: torch.Tensor, turns: int, *, mirrored: bool) -> torch.Tensor:
    flipped = images.flip(-1) if mirrored else images
    return torch.rot90(flipped, turns, (-2, -1)) if turns else flipped


def _turn_back(images: torch.Tensor, turns: int, *, mirrored: bool) -> torch.Tensor:
    upright = torch.rot90(images, -turns, (-2, -1)) if turns else images
    return upright.flip(-1) if mirrored else upright


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
