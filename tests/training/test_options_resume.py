"""Every option that changes training: resumed = uninterrupted, and the same samples on any world size.

Whoever adds such an option adds it to a row of OPTIONS; a test finds those that are in none.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from agrivision.config import Config, flatten
from agrivision.errors import ExitCode
from agrivision.training.start import _FREE_KEYS
from tests.ranks import Disturbance, run
from tests.training.runs import arguments, assert_same, last_bits, metrics, samples

# Two epochs of three steps, or so, saved and scored where they end.
BASE: dict[str, Any] = {
    "seed": 5,
    "data.batch_size": 12,
    "training.epochs": 2,
    "training.ema_decay": 0.9,
    "training.evaluate_every_epochs": 0,
    "training.checkpoint_every_steps": "null",
    "training.checkpoint_every_epochs": 0,
    "monitor.tensorboard": "false",
    "monitor.images": 0,
}
STOP = 4  # the step, in the second epoch, that a run is stopped in

# What can be had together stands in one row, as each row is several runs.
OPTIONS: dict[str, dict[str, Any]] = {
    "focal and Tversky": {
        "loss.focal_gamma": 2,
        "loss.tversky_alpha": 0.3,
        "loss.tversky_beta": 0.7,
        "loss.tversky_gamma": 1.33,
        "loss.dice_weight": 0.5,
        "loss.class_weights": "effective",
        "loss.effective_beta": 0.99,
        "loss.max_class_weight": 5,
        "schedule.name": "linear",
        "schedule.warmup": 0.2,
        "schedule.final": 0.1,
        "optimizer.weight_decay": 0.1,
        "optimizer.beta1": 0.8,
        "optimizer.beta2": 0.95,
        "optimizer.clip_norm": 0.5,
    },
    "borders and Lovász": {
        "loss.lovasz_weight": 1,
        "loss.border_weight": 5,
        "loss.border_sigma": 2,
        "loss.border_smoothing": 0.2,
        "schedule.name": "trapezoid",
        "schedule.decay": 0.5,
        "augment.rotate": 20,
        "augment.scale": 0.3,
    },
    "residual blocks and gates": {
        "model.block": "residual",
        "model.attention": "gate",
        "model.up": "bilinear",
        "model.norm": "group",
        "model.depth": 2,
        "loss.pnc_weight": 1,
        "optimizer.name": "sgd",
        "optimizer.lr": 0.01,
        "optimizer.momentum": 0.8,
        "optimizer.lr_scaling": "linear",
        "optimizer.reference_batch": 3,
        "schedule.name": "polynomial",
        "schedule.power": 2,
    },
    "deep supervision and an even average": {
        "model.up": "pixel_shuffle",
        "model.deep_supervision": 1,
        "loss.deep_supervision_decay": 0.4,
        "training.ema_decay": 0,
        "training.tail_average": 0.75,
        "augment.contrast": 0.2,
        "augment.band_gain": 0.2,
        "augment.band_shift": 0.2,
    },
    "an encoder": {
        "model.encoder": "test_efficientnet",  # a tiny one
        "optimizer.encoder_lr": 0.1,
        "optimizer.lr_scaling": "sqrt",
        "optimizer.reference_batch": 3,
        "data.normalisation": "range",
    },
    "growing crops and an early end": {
        "data.crop_start": 16,
        "data.crop_growth": 0.7,
        "training.epochs": 3,
        "training.patience": 1,
        "training.min_improvement": 1,  # never: the second evaluation ends the run
        "training.evaluate_every_epochs": 1,
    },
    "indices, by tile, bent": {
        "data.indices": "ndvi",
        "data.normalisation": "tile",
        "augment.elastic": 3,
        "augment.flip": "false",
        "augment.rotate90": "false",
    },
    "rare classes, by field": {
        "data.rare_sampling": 0.5,
        "data.rare_crops": 0.5,
        "data.normalisation": "range+field",
        "data.indices": "ndvi,ndwi",
    },
    "rare classes, in windows": {
        "data.rare_sampling": 0.5,
        "data.shuffle_window": 4,
        "training.channels_last": "false",
    },
}
INVARIANT = {"training.invariant": "true", "training.micro_batch_size": 4}

# Keys that are in no row, and where they are tested, or why there is nothing to be tested.
ELSEWHERE = {
    "data.decoder": "tests/data/test_jpeg_pixels.py: on a GPU",
    "data.train_split": "which tiles there are",
    "data.val_split": "which tiles there are",
    "evaluation.batch_size": "tests/evaluation: the score does not depend on it",
    "model.convolution": "tests/training/test_trainer.py: other crops",
    "model.encoder_weights": "tests/model/test_encoders.py: the checkpoint has them",
    "training.compile": "tests/training/test_speed_options.py: takes a compiler",
    "training.deterministic": "without it there are no same bits",
    "training.gradient_compression": "tests/training/test_speed_options.py",
    "training.max_nonfinite_steps": "tests/training/test_trainer.py",
    "training.max_steps": "tests/training/test_trainer.py",
    "training.precision": "tests/training/test_resume.py",
    "training.sync_batchnorm": "on GPUs",
}


def command(dataset: Path, run_dir: Path, *options: dict[str, Any]) -> list[str]:
    together = {key: value for some in (BASE, *options) for key, value in some.items()}
    return arguments(dataset, run_dir, **together)


def by_step(run_dir: Path) -> dict[tuple[int, int], list[str]]:
    return {step: sorted(keys) for step, keys in samples(run_dir).items()}


def possible(name: str) -> None:
    if "model.encoder" in OPTIONS[name]:
        pytest.importorskip("timm")


@pytest.mark.parametrize("name", OPTIONS)
def test_resumed_is_uninterrupted(name: str, dataset: Path, tmp_path: Path) -> None:
    possible(name)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(command(dataset, whole, OPTIONS[name])) == [0]
    again = command(dataset, broken, OPTIONS[name])
    stop = Disturbance(signal.SIGTERM, "forward", count=STOP)
    assert run(again, disturbance=stop) == [ExitCode.STOPPED]
    assert last_bits(broken)[0] == STOP
    assert run(again) == [0]
    assert_same(broken, whole)
    assert {"model", "optimizer", "ema", "progress"} <= {
        Path(file).stem for file in last_bits(broken)[1]
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_one_and_two_ranks_give_the_same(name: str, dataset: Path, tmp_path: Path) -> None:
    possible(name)
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(command(dataset, one, OPTIONS[name], INVARIANT)) == [0]
    assert run(command(dataset, two, OPTIONS[name], INVARIANT), 2) == [0, 0]
    assert_same(two, one)


# Without the invariant mode ranks have other shares; the options that choose samples matter then.
CHOOSE = {"data.rare_sampling", "data.shuffle_window"}


@pytest.mark.parametrize("name", [name for name, row in OPTIONS.items() if CHOOSE & set(row)])
def test_one_and_two_ranks_see_the_same_samples(name: str, dataset: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for ranks, run_dir in ((1, one), (2, two)):
        assert run(command(dataset, run_dir, OPTIONS[name]), ranks) == [0] * ranks
    assert by_step(two) == by_step(one)


def test_the_early_end_is_one(dataset: Path, tmp_path: Path) -> None:
    """Else its row would prove nothing of it."""
    options = OPTIONS["growing crops and an early end"]
    assert run(command(dataset, tmp_path, options)) == [0]
    assert [row["step"] for row in metrics(tmp_path) if row["kind"] == "end"] == [6]


def test_every_option_that_changes_training_is_in_a_row() -> None:
    keys = {key for key in flatten(Config().to_dict()) if not key.startswith(_FREE_KEYS)}
    shared = {word.removeprefix("--") for word in command(Path(), Path(), INVARIANT) if "--" in word}
    rows = {key for row in OPTIONS.values() for key in row}
    assert rows | set(ELSEWHERE) <= keys
    assert not rows & set(ELSEWHERE)
    assert keys - rows - shared - set(ELSEWHERE) == set()
