"""The data that all contestants learn from, and how much of it they may see."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from agrivision.data.schema import Schema
from benchmarks.common import say

TRAIN, VAL = "train", "val"
_CLASSES = "0:vegetation,1:water,2:bare"
_LAST_DATES, _FIRST_DATES = "20180716,20200831", "20090818,20100629"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What each contestant may use.

    Attributes:
        steps: of `batch` crops of `crop` pixels a side; contestants with other batches or crops take
            as many steps as make the same number of pixels.
        batch: crops in a step.
        crop: side of a crop in pixels.
        base_channels: of the first level of the UNet, wherever its size can be chosen.
        depth: how often it halves the resolution.
        seconds: of training, in place of `steps`; None for no limit.
    """

    steps: int
    batch: int
    crop: int
    base_channels: int
    depth: int
    seconds: float | None = None

    def steps_of(self, batch: int, crop: int) -> int:
        """Steps that see the budget's pixels, at least one."""
        return max(1, self.steps * self.batch * self.crop**2 // (batch * crop**2))

    def to_dict(self) -> dict[str, Any]:
        """As a line of the results holds it."""
        content = asdict(self)
        return content if self.seconds is None else content | {"steps": None}


@dataclass(frozen=True, kw_only=True)
class Task:
    """Something to learn.

    Attributes:
        name: in the tables.
        dataset: prepared, with the splits `train` and `val`.
        budget: of each contestant.
        plain: YAML file with the recipe that does what the plain loop does.
        recommended: YAML file with the recipe that is to be shown.
    """

    name: str
    dataset: Path
    budget: Budget
    plain: Path
    recommended: Path

    @cached_property
    def schema(self) -> Schema:
        """Of the data set."""
        return Schema.read(self.dataset)


def synthetic(folder: Path, tiles: int, side: int) -> Path:
    """Invented fields with the shares of the classes that Agriculture-Vision has, made once.

    Args:
        folder: where data is kept.
        tiles: of all splits together; each field's are in one split.
        side: of a tile in pixels.

    Returns:
        The prepared data set.
    """
    source, dataset = folder / f"fields-{tiles}x{side}", folder / f"synthetic-{tiles}x{side}"
    if not dataset.is_dir():
        if not source.is_dir():
            _agrivision("synthesize", source, "--tiles", tiles, "--size", side, "--seed", 0)
        _agrivision("prepare", source, dataset)
    return dataset


def scenes(folder: Path, source: Path, *, reverse: bool) -> Path:
    """Real scenes of one place, split by date.

    Args:
        folder: where data is kept.
        source: with `scenes/` and `labels/`, files named by date.
        reverse: validate on the first two dates instead of the last two.

    Returns:
        The prepared data set.
    """
    dataset = folder / ("naip-reverse" if reverse else "naip")
    if not dataset.is_dir():
        dates = _FIRST_DATES if reverse else _LAST_DATES
        _agrivision("prepare", source, dataset, "--val", dates, "--classes", _CLASSES)
    return dataset


def _agrivision(*words: object) -> None:
    command = ["agrivision", *map(str, words)]
    say(" ".join(command))
    subprocess.run([sys.executable, "-m", *command], check=True, stdout=sys.stderr)
