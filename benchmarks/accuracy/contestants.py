"""Who takes part."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.accuracy.outcome import Outcome
from benchmarks.accuracy.task import Task


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A peer.

    Attributes:
        title: in the table.
        trains: module and function, imported when it is its turn.
        needs: modules that it takes.
    """

    title: str
    trains: str
    needs: tuple[str, ...] = ()

    def train(self, task: Task, seed: int) -> Outcome:
        """Train and score it."""
        module, _, name = self.trains.partition(":")
        function: Callable[[Task, int], Outcome]
        function = getattr(importlib.import_module(f"benchmarks.accuracy.{module}"), name)
        return function(task, seed)


OURS = "agrivision"
PLAIN = "plain"
PEERS = {
    PLAIN: Contestant(title="plain loop, the same UNet", trains="plain:same_network"),
    "smp": Contestant(
        title="plain loop, segmentation-models-pytorch's Unet (resnet18)",
        trains="plain:smp",
        needs=("segmentation_models_pytorch",),
    ),
    "torchgeo": Contestant(
        title="torchgeo's SemanticSegmentationTask (unet, resnet18)",
        trains="geo:torchgeo",
        needs=("torchgeo", "lightning"),
    ),
    "student": Contestant(
        title="student project: near-infrared, SGD, weighted cross-entropy", trains="plain:student"
    ),
}
