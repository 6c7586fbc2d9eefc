"""Crops that grow over the epochs."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agrivision.config import AugmentConfig, Config, DataConfig, TrainingConfig
from agrivision.data.augment import Augment
from agrivision.data.growing import GrowingCrop
from agrivision.data.normalise import Normaliser
from agrivision.errors import ConfigurationError, ExitCode
from agrivision.training.trainer import Trainer
from tests.heard import hear_one
from tests.ranks import run
from tests.training.runs import arguments


@given(
    start=st.integers(1, 300),
    units=st.integers(1, 40),
    unit=st.sampled_from([1, 4, 16, 32]),
    epochs=st.integers(1, 60),
)
def test_sides_grow_in_equal_steps(start: int, units: int, unit: int, epochs: int) -> None:
    crop = GrowingCrop(start=start, end=start + units * unit, unit=unit, epochs=epochs)
    sides = [crop.at(epoch) for epoch in range(epochs + 3)]
    assert sides[0] == start
    assert sides[epochs:] == [crop.end] * 3
    assert all(earlier <= later for earlier, later in pairwise(sides))
    assert all((side - start) % unit == 0 for side in sides)
    assert crop.sides == sorted(set(sides))
    assert len(crop.sides) <= 8
    steps = [later - earlier for earlier, later in pairwise(crop.sides)]
    assert max(steps) - min(steps) <= unit
    assert len(crop.sides) == min(units, epochs, 7) + 1


def test_sides_of_a_known_run() -> None:
    config = Config(
        data=DataConfig(crop=512, crop_start=256, crop_growth=0.4), training=TrainingConfig(epochs=20)
    )
    crop = GrowingCrop.of(config, 16)
    assert crop is not None
    assert crop.epochs == 8
    assert crop.sides == [256, 288, 320, 352, 400, 432, 464, 512]
    assert GrowingCrop.of(Config(data=DataConfig(crop=512)), 16) is None


@pytest.mark.parametrize("warp", [0.0, 0.3])
def test_a_sample_is_changed_as_with_a_fixed_crop_of_that_side(warp: float) -> None:
    random = torch.Generator().manual_seed(0)
    planes = [torch.randint(256, (3, 32, 32, 4), generator=random, dtype=torch.uint8)]
    labels = torch.randint(4, (3, 32, 32), generator=random).to(torch.int16)
    how: dict[str, Any] = {
        "config": AugmentConfig(scale=warp),
        "normaliser": Normaliser(mean=(1.0,) * 4, std=(2.0,) * 4),
        "seed": 3,
    }
    growing = Augment(**how, crop=24, growing=GrowingCrop(start=8, end=24, unit=8, epochs=2))
    for epoch, side in enumerate([8, 16, 24, 24]):
        wanted = Augment(**how, crop=side)(planes, labels, epoch, [5, 6, 7])
        found = growing(planes, labels, epoch, [5, 6, 7])
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine.shape[-1] == side
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"crop_start": 16}, "data.crop_start is 16"),
        ({"crop_start": 32, "crop": 32}, "data.crop_start is 32"),
        ({"crop_start": 0, "crop": 32}, "data.crop_start is 0"),
        ({"crop_growth": 0.0}, "data.crop_growth is 0.0"),
    ],
)
def test_what_does_not_grow_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        DataConfig(**changes)


def keep_sides(folder: Path, rank: int) -> None:
    """Write down, step by step, the side of the images that the network sees."""
    original = Trainer._images

    def images(self: Trainer, batch: Any, part: slice) -> Any:
        found = original(self, batch, part)
        with (folder / f"sides-{rank}").open("a") as file:
            file.write(f"{batch.whole.epoch} {found[0].shape[-1]} {found[1].shape[-1]}\n")
        return found

    Trainer._images = images


GROWING = {
    "data__crop": 32,
    "data__crop_start": 16,
    "training__epochs": 8,
    "monitor__tensorboard": "false",
}


def test_the_network_sees_them(dataset: Path, tmp_path: Path) -> None:
    command = arguments(dataset, tmp_path / "run", **GROWING)
    assert run(command, hook=partial(keep_sides, tmp_path)) == [0]
    seen = {tuple(map(int, line.split())) for line in (tmp_path / "sides-0").read_text().splitlines()}
    sides = [16, 20, 24, 28, 32, 32, 32, 32]
    assert sorted(seen) == [(epoch, side, side) for epoch, side in enumerate(sides)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__crop_start": 18}, "differ by a multiple of 4"),
        ({"data__crop": 30, "data__crop_start": 14}, "data.crop is 30"),
        ({"model__convolution": "valid", "data__crop": 44, "data__crop_start": 36}, "a crop is 36"),
    ],
)
def test_a_crop_that_does_not_fit_is_found_before_anything_is_written(
    changes: dict[str, object], said: str, dataset: Path, tmp_path: Path
) -> None:
    ending = hear_one(arguments(dataset, tmp_path / "run", **(GROWING | changes)))
    assert ending.code == ExitCode.BAD_INPUT
    assert said in ending.complaint
    assert not (tmp_path / "run").exists()
