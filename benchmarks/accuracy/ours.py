"""`agrivision train` with a recipe, as a process, and the score that `agrivision evaluate` gives it."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from torch import nn

from agrivision.config import Config, flatten
from agrivision.data.schema import Schema
from agrivision.errors import ConfigurationError
from agrivision.inference.scoring import evaluate_run
from agrivision.inference.trained import load_run
from agrivision.options import read_config
from agrivision.rundir import RunDirectory
from benchmarks.accuracy.outcome import Outcome, sizes
from benchmarks.accuracy.task import TRAIN, VAL, Task

_PILOT = 12  # steps that tell how long a step takes
_WARM = 4  # of them that do not count
_SURE = 0.97  # of the time is planned with: the pace wavers
# What changes nothing that is learned, or belongs to the budget.
_ELSEWHERE = ("seed", "data.path", "data.threads", "training.max_steps", "training.epochs", "monitor.")

_QUIET = {
    "data.threads": 1,
    "monitor.tensorboard": False,
    "monitor.images": 0,
    "monitor.worst_tiles": 0,
}


def resolved(task: Task, recipe: Path) -> Config:
    """The configuration of a run, but for its seed and its number of steps.

    Args:
        task: whose budget stands above the recipe.
        recipe: YAML file.

    Raises:
        ConfigurationError: a key or value is wrong; the line names it.
    """
    budget = task.budget
    values = flatten(yaml.safe_load(recipe.read_text("utf-8")) or {})
    values |= {
        **_QUIET,
        "data.path": str(task.dataset),
        "data.batch_size": budget.batch,
        "data.crop": budget.crop,
        "model.base_channels": budget.base_channels,
        "model.depth": budget.depth,
        # One evaluation at the end: no checkpoint is chosen by its score on the validation tiles.
        "training.evaluate_every_epochs": 0,
        "training.checkpoint_every_epochs": 0,
    }
    with TemporaryDirectory() as folder:
        return read_config(_written(Path(folder), values))


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """A configuration with other values of some keys.

    Raises:
        ConfigurationError: a key or value is wrong; the line names it.
    """
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if not hasattr(getattr(config, section, None), name):
            raise ConfigurationError(f"there is no key {key}")
        sections.setdefault(section, {})[name] = value
    new = {name: replace(getattr(config, name), **values) for name, values in sections.items()}
    return replace(config, **new)


def _written(folder: Path, values: Mapping[str, Any]) -> Path:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(tree), "utf-8")
    return file


def settings(config: Config) -> dict[str, Any]:
    """What in a configuration differs from the defaults and decides what is learned."""
    default = flatten(Config().to_dict())
    return {
        key: value
        for key, value in flatten(config.to_dict()).items()
        if value != default.get(key) and not key.startswith(_ELSEWHERE)
    }


def agrivision(
    task: Task, seed: int, changes: Mapping[str, Any], *, symmetric: bool = False
) -> Outcome:
    """Train, and score what the run directory holds.

    Args:
        task: what to learn.
        seed: of the run.
        changes: settings that differ from the defaults, as from `settings`.
        symmetric: score all eight positions of the tiles, too.
    """
    with TemporaryDirectory(prefix="agrivision-accuracy-") as folder:
        run, steps, seconds = train(task, seed, changes, Path(folder))
        found = evaluated(run, task)
        network: nn.Module = load_run(run, torch.device("cpu")).module
        size = sizes(network, _channels(network), min(task.budget.crop, task.schema.tile))
        return Outcome(
            **found,
            steps=steps,
            seconds=seconds,
            **size,
            symmetric=evaluated(run, task, symmetries=True) if symmetric else None,
        )


def train(task: Task, seed: int, changes: Mapping[str, Any], folder: Path) -> tuple[Path, int, float]:
    """Train as much as the budget allows.

    Args:
        task: what to learn.
        seed: of the run.
        changes: settings that differ from the defaults.
        folder: for the run directory.

    Returns:
        The run directory, its steps, and the seconds that the program took as a whole.
    """
    values = {**changes, **_QUIET, "seed": seed, "data.path": str(task.dataset)}
    config, limit = read_config(_written(folder, values)), task.budget.seconds
    if limit is None:
        crop = min(config.data.crop or task.schema.tile, task.schema.tile)
        steps = task.budget.steps_of(config.data.batch_size, crop)
    else:
        steps = _affordable(config, folder / "pilot", limit)
    return folder / "run", steps, _train(config, folder / "run", steps)


def evaluated(run: Path, task: Task, *, symmetries: bool = False) -> dict[str, Any]:
    """`miou` and `iou` of a run on the validation tiles, as `agrivision evaluate` gives them."""
    found = evaluate_run(run, task.dataset, VAL, threads=1, symmetries=symmetries)
    assert found is not None  # one rank
    return {"miou": found["miou"], "iou": found["iou"]}


def _channels(network: nn.Module) -> int:
    """Of the images that a network takes: bands, and what was added to them."""
    return next(m for m in network.modules() if isinstance(m, nn.Conv2d)).in_channels


def _train(config: Config, run: Path, steps: int) -> float:
    """Run the program; returns the seconds that the whole of it took, with start and evaluation."""
    tiles = Schema.read(Path(config.data.path)).split(TRAIN).tiles
    epochs = math.ceil(steps / math.ceil(tiles / config.data.batch_size))
    whole = replace(config, training=replace(config.training, max_steps=steps, epochs=epochs))
    file = run.with_name(f"{run.name}.yaml")
    file.write_text(yaml.safe_dump(whole.to_dict()), "utf-8")
    words = [sys.executable, "-m", "agrivision", "train", "--config", str(file), "--run_dir", str(run)]
    begin = time.perf_counter()
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise RuntimeError(f"agrivision train ended with {done.returncode}: {said[-1]}")
    return time.perf_counter() - begin


def _affordable(config: Config, run: Path, seconds: float) -> int:
    """How many steps fit into so many seconds, beside the start and the evaluation at the end.

    A few steps are run to know; in a run whose crops grow, of the largest ones.
    """
    monitor = replace(config.monitor, log_every_steps=1)
    data = replace(config.data, crop_start=None)
    took = _train(replace(config, data=data, monitor=monitor), run, _PILOT)
    times = [row["time"] for row in RunDirectory(run).rows("training")]
    pace = (times[-1] - times[_WARM - 1]) / (len(times) - _WARM)
    return max(1, int(_SURE * (seconds - (took - len(times) * pace)) / pace))
