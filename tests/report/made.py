"""Run directories as the training leaves them, without a training."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from tests.pages import Parsed

BEGAN = 1_800_000_000  # 2027-01-15 08:00:00 UTC
CLASSES = ("background", "water", "weed_cluster")
CONFUSION = [[900, 30, 0], [50, 70, 0], [50, 0, 0]]
CONFIG = {
    "seed": 0,
    "data": {"path": "nowhere", "batch_size": 8, "train_split": "train", "val_split": "val"},
    "optimizer": {"lr": 0.001, "name": "adamw"},
    "training": {"epochs": 4, "precision": "fp32"},
}
EVIL = "<script>alert(1)</script>\"'&$\\frac{\n\u202e"


def training(step: int, **more: Any) -> dict[str, Any]:
    return {
        "kind": "training",
        "step": step,
        "epoch": 0,
        "total": 2 / step,
        "cross_entropy": 1.5 / step,
        "dice": 0.5 / step,
        "gradient_norm": 1.0,
        "learning_rate": 0.001,
        "quarantined": 0,
        "images_per_second": 20.0,
        "waiting_share": 0.25,
        "memory_gib": 3.0,
    } | more


def evaluation(step: int, miou: float | None, **more: Any) -> dict[str, Any]:
    iou = {"background": 0.875, "water": 0.4666, "weed_cluster": None}
    return {
        "kind": "evaluation",
        "step": step,
        "epoch": step // 10,
        "miou": miou,
        "iou": iou,
        "left_out": 0,
        "seconds": 2.0,
    } | more


def whole_evaluation(step: int, miou: float, **more: Any) -> dict[str, Any]:
    return evaluation(
        step,
        miou,
        precision={"background": 0.9678, "water": 0.5833, "weed_cluster": None},
        recall={"background": 0.9, "water": 0.7, "weed_cluster": None},
        f1={"background": 0.9326, "water": 0.6364, "weed_cluster": None},
        loss={"total": 0.5, "cross_entropy": 0.3, "dice": 0.2},
        confusion=CONFUSION,
        **more,
    )


def attempt(started: int, from_step: int, **more: Any) -> dict[str, Any]:
    minutes = started // 60
    return {
        "started": f"2027-01-15T{8 + minutes // 60:02}:{minutes % 60:02}:{started % 60:02}Z",
        "from_step": from_step,
        "agrivision": "0.1.0",
        "commit": "abc",
        "python": "3.11.7",
        "packages": {"torch": "2.11", "onnx": None},
        "host": "node1",
        "ranks": 4,
        "launcher": "slurm",
        "device": "NVIDIA H200",
        "data_fingerprint": "f" * 64,
    } | more


def log(endings: list[tuple[int, int, int, str]], zone: int = 0) -> str:
    """The log of rank 0: of each attempt when it began and ended, its first step, what it said."""
    lines = []
    for began, ended, step, said in endings:
        word = "going on from" if step else "starting at"
        start = f"agrivision.training.run: runs/x: 4 ranks on NVIDIA H200, {word} step {step}"
        for seconds, line in ((began, start), (ended, said)):
            at = seconds + zone
            stamp = f"2027-01-15 {8 + at // 3600:02}:{at // 60 % 60:02}:{at % 60:02},123"
            lines.append(f"{stamp} INFO {line}\n")
    return "".join(lines)


def make_run(
    folder: Path,
    rows: list[dict[str, Any]],
    *,
    attempts: list[dict[str, Any]] | None = None,
    config: dict[str, Any] | None = CONFIG,
    said: str = "",
) -> Path:
    (folder / "log").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    if attempts is not None:
        (folder / "provenance.json").write_text(json.dumps({"attempts": attempts}))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    if said:
        (folder / "log" / "rank-0.log").write_text(said)
    return folder


DONE = "agrivision.training.loop: done after 40 steps; results in runs/x"


def stopped(step: int, why: str) -> str:
    return f"agrivision.training.loop: stopped at step {step} ({why}); the same command goes on"


def interrupted_run(folder: Path, **more: Any) -> Path:
    """A run of 40 steps with three interruptions: by a signal, without a word, by an error."""
    attempts = [attempt(0, 0), attempt(600, 10), attempt(1200, 20), attempt(1800, 30)]
    said = log(
        [
            (0, 300, 0, stopped(10, "SIGTERM")),
            (600, 700, 10, "agrivision.training.saver: step 20 saved in 0.1 s"),
            (1200, 1500, 20, "agrivision.training.run: leaving with 1: rank 2 is gone"),
            (1800, 2400, 30, DONE),
        ],
        zone=2 * 3600,
    )
    rows = [training(step) for step in range(2, 41, 2)]
    rows += [whole_evaluation(20, 0.6), whole_evaluation(40, 0.5)]
    return make_run(folder, rows, attempts=attempts, said=said, **more)


def attributes_that_fetch(parsed: Parsed) -> list[str]:
    """What a browser would load or lead to, of all elements."""
    names = ("src", "srcset", "href", "data", "action", "poster")
    return [value for _, attributes in parsed.elements for name, value in attributes.items()
            if name in names or re.match("on", name)]  # fmt: skip
