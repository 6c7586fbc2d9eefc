"""W1: what a run pays for being watched: with TensorBoard and its pictures, without, without anything.

Whole runs of `agrivision train` take turns, each in a process of its own, with the same seed. Timed is
what lies between the first and the last evaluation: whole epochs with their steps, evaluations,
pictures and checkpoints, but neither the start nor the first allocations. A run that is watched writes
what the defaults of `monitor` say.

    python -m benchmarks.watching [--quick] [--dataset DATASET] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from benchmarks.common import Median, Report, fresh, interleaved, parser
from benchmarks.invariant import make_data
from launch.local import run_ranks

BARE = "without anything"
WATCHED: Mapping[str, Mapping[str, object]] = {
    "as by default": {},
    "without curves of precision and recall": {"monitor.pr_curves": False},
    "without TensorBoard": {"monitor.tensorboard": False},
    BARE: {
        "monitor.tensorboard": False,
        "monitor.worst_tiles": 0,
        "monitor.log_every_steps": 1_000_000,
    },
}


def main() -> None:
    """Measure, and print the report."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--dataset", type=Path, help="a prepared data set; default: invented fields")
    options.add_argument("--base", type=int, default=32, help="channels of the first level")
    options.add_argument("--side", type=int, default=256, help="of the invented tiles in pixels")
    options.add_argument("--tiles", type=int, default=720, help="invented tiles over all splits")
    options.add_argument("--epochs", type=int, default=3, help="of each run; the first is not timed")
    options.add_argument("--batch", type=int, default=8, help="tiles a step")
    options.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the steps")
    args = options.parse_args()
    if args.quick:
        args.rounds, args.base, args.side, args.tiles, args.epochs = 1, 4, 64, 24, 2
    with tempfile.TemporaryDirectory() as folder:
        data = args.dataset
        if data is None:
            data = Path(folder) / "dataset"
            fresh(make_data, Path(folder) / "fields", data, args.side, args.tiles)
        turns = {name: partial(seconds, data, args, how) for name, how in WATCHED.items()}
        found = interleaved(args.rounds, turns)
    report(args, found).finish()


def seconds(data: Path, args: argparse.Namespace, how: Mapping[str, object]) -> float:
    """Seconds of an epoch, from the first evaluation of a run to its last."""
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, object] = {
            "data.path": data,
            "data.batch_size": args.batch,
            "model.base_channels": args.base,
            "training.epochs": args.epochs,
            "training.deterministic": False,
            "training.precision": args.precision,
            **how,
        }
        flags = [
            word
            for key, value in options.items()
            for word in (f"--{key}", str(value).lower() if isinstance(value, bool) else str(value))
        ]
        command = [sys.executable, "-m", "agrivision", "train", "--run_dir", folder, *flags]
        code = run_ranks(command, 1)
        if code != 0:
            raise SystemExit(f"{' '.join(command)} ended with {code}")
        lines = (Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "evaluation"]
    return float(rows[-1]["time"] - rows[0]["time"]) / (len(rows) - 1)


def report(args: argparse.Namespace, found: Mapping[str, Median]) -> Report:
    """What is printed.

    Args:
        args: of the command line.
        found: seconds of an epoch by how the run was watched.
    """
    result = Report(
        title="W1: watching",
        options=args,
        packages=("tensorboard",),
        header=("a run", "s an epoch", f"more than {BARE}, %", "spread, %"),
    )
    for name, value in found.items():
        result.rows.append((name, value, more(found, name), 100 * value.spread))
    for name in found:
        if name != BARE:
            result.goal("W1", f"time of a run {name}", more(found, name), at_most=1, unit="%")
    result.notes = [
        f"UNet-{args.base}, batch {args.batch}, {args.precision}, {args.epochs} epochs of"
        f" {args.dataset or f'{args.tiles} invented tiles, {args.side} pixels wide'}, timed from the"
        " first evaluation to the last",
        "as many tiles are drawn of a small split as of a large one: with more tiles the share is less",
    ]
    return result


def more(found: Mapping[str, Median], name: str) -> float:
    """Per cent that an epoch takes longer: the median over the rounds, whose turns are neighbours."""
    pairs = zip(found[name].values, found[BARE].values, strict=True)
    return 100 * (statistics.median(watched / bare for watched, bare in pairs) - 1)


if __name__ == "__main__":
    main()
