"""Small runs, and what two runs must have in common to be the same run."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from agrivision import checkpoint


def arguments(dataset: Path, run_dir: Path, **overrides: Any) -> list[str]:
    """`agrivision train …` for a network that learns 18 steps in a second."""
    options = {
        "data.path": dataset,
        "data.batch_size": 6,
        "data.crop": 32,
        "data.threads": 1,
        "augment.brightness": 0.2,
        "augment.contrast": 0.1,
        "model.base_channels": 4,
        "model.depth": 2,
        "model.dropout": 0.2,
        "training.epochs": 3,
        "training.ema_decay": 0.9,
        "training.checkpoint_every_steps": 5,
        "training.keep_last": 100,
        "monitor.log_samples": "true",
        "monitor.log_every_steps": 3,
        "monitor.images": 1,
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return ["train", "--run_dir", str(run_dir), *flags]


def last_bits(run_dir: Path) -> tuple[int, dict[str, Any]]:
    """Step of the last checkpoint, and its files' checksums: weights, optimiser, EMA, progress."""
    entry = checkpoint.entries(run_dir / "checkpoints")[-1]
    return entry.step, dict(entry.files)


def samples(run_dir: Path) -> dict[tuple[int, int], list[str]]:
    """The keys that all ranks together consumed, in order of the ranks, by (epoch, step)."""
    found: dict[tuple[int, int], list[str]] = defaultdict(list)
    for file in sorted((run_dir / "log").glob("samples-*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            found[row["epoch"], row["step"]] += row["keys"]
    return dict(found)


# What begins so depends on the clock, the machine and the interruptions.
TIMINGS = ("speed/", "gpu/", "checkpoint/", "run/")
_NOT_COMPARED = {
    "time",
    "seconds",
    "images_per_second",
    "megapixels_per_second",
    "waiting_share",
    "memory_gib",
    "gpu",
}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl on steps and scores, without what depends on the clock."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] != "checkpoint"]
    return [{k: v for k, v in row.items() if k not in _NOT_COMPARED} for row in rows]


def assert_same(run_dir: Path, reference: Path) -> None:
    """The run that was disturbed is, bit for bit, the one that never was."""
    assert samples(run_dir) == samples(reference)
    assert metrics(run_dir) == metrics(reference)
    assert last_bits(run_dir) == last_bits(reference)
