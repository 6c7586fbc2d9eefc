"""The runs that go through storms: the demo's, made shorter, and a very little one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.storm.harness import ROOT, Course, Ranks, launched
from tests.training.runs import arguments

_DEMO = {
    "data.crop": 32,
    "model.base_channels": 8,
    "training.epochs": 40,
    "training.invariant": "true",
    "training.micro_batch_size": 4,  # four of them in a batch of 16: up to four ranks
    "training.evaluate_every_epochs": 4,
    "training.checkpoint_every_epochs": 4,
    "training.checkpoint_every_steps": 6,
    "training.keep_last": 4,
    "evaluation.batch_size": 4,  # so that four ranks have some
    "monitor.log_every_steps": 4,  # not in step with the checkpoints
    "monitor.images": 2,
}


def demo(folder: Path, ranks: Ranks = launched) -> Course:
    """The demo's fields and configuration: 200 steps, a checkpoint every 6, a score every 20.

    Args:
        folder: for fields, data set and the run that nothing disturbs; what is there already stays.
        ranks: how they are started.
    """
    fields, dataset = folder / "fields", folder / "dataset"
    if not dataset.exists():
        _agrivision("synthesize", str(fields), "--size", "128")
        _agrivision("prepare", str(fields), str(dataset))
    options = {"config": ROOT / "configs" / "demo.yaml", "data.path": dataset} | _DEMO
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return Course(
        dataset=dataset,
        words=("train", *words),
        steps=200,
        save_every=6,
        evaluate_every=20,
        reference=folder / "undisturbed",
        ranks=ranks,
    )


def little(dataset: Path, folder: Path, ranks: Ranks) -> Course:
    """A network that learns 18 steps in a second: 30 of them, a checkpoint every 2, a score every 10.

    Args:
        dataset: the tests' own, of 48 tiles.
        folder: for the run that nothing disturbs.
        ranks: how they are started.
    """
    options = {
        "data__batch_size": 8,
        "training__epochs": 6,
        "training__invariant": "true",
        "training__micro_batch_size": 2,
        "training__evaluate_every_epochs": 2,
        "training__checkpoint_every_steps": 2,
        "training__keep_last": 4,
        "evaluation__batch_size": 1,
    }
    words = arguments(dataset, folder, **options)
    for name in ("--run_dir", "--data.threads"):
        place = words.index(name)
        del words[place : place + 2]
    return Course(
        dataset=dataset,
        words=tuple(words),
        steps=30,
        save_every=2,
        evaluate_every=10,
        reference=folder / "undisturbed",
        ranks=ranks,
    )


def _agrivision(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "agrivision", *words], check=True, cwd=ROOT)
