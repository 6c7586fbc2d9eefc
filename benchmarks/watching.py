"""W1: what a run pays for being watched: with TensorBoard and its pictures, without, without anything.

Whole runs of `agrivision train` take turns, each in a process of its own, with the same seed. Timed are
the epochs after the first: their steps alone, from an evaluation to the next checkpoint, and the whole
with evaluations, pictures and checkpoints. Of a run's epochs the median counts. A run that is watched
writes what the defaults of `monitor` say. Where a machine wavers by more than a per cent, runs that
differ by less say nothing: what the loop spends on writing is therefore timed by itself, too.

    python -m benchmarks.watching [--quick] [--dataset DATASET] [--rounds 5] [--only 'as by default']
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from agrivision.cli import main as agrivision
from agrivision.training.record import Record
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
    watched = [name for name in WATCHED if name != BARE]
    options.add_argument("--only", choices=watched, help=f"compare this alone with a run {BARE}")
    args = options.parse_args()
    if args.quick:
        args.rounds, args.base, args.side, args.tiles, args.epochs = 1, 4, 64, 24, 2
    with tempfile.TemporaryDirectory() as folder:
        data = args.dataset
        if data is None:
            data = Path(folder) / "dataset"
            fresh(make_data, Path(folder) / "fields", data, args.side, args.tiles)
        ways = wanted(args.only)
        epochs: dict[str, list[float]] = {name: [] for name in ways}
        turns = {name: partial(turn, data, args, how, epochs[name]) for name, how in ways.items()}
        steps = interleaved(args.rounds, turns)
        spent = fresh(writing, data, args)
    whole = {name: Median(values) for name, values in epochs.items()}
    report(args, steps, whole, spent).finish()


def wanted(only: str | None) -> Mapping[str, Mapping[str, object]]:
    """The ways of watching that take turns."""
    return WATCHED if only is None else {name: WATCHED[name] for name in (only, BARE)}


def turn(data: Path, args: argparse.Namespace, how: Mapping[str, object], epochs: list[float]) -> float:
    """Seconds of a step in one run; those of a whole epoch are appended to `epochs`."""
    step, epoch = seconds(rows_of(data, args, how))
    epochs.append(epoch)
    return step


def seconds(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Seconds of a step alone and of a whole epoch, each the median over the epochs but the first.

    Args:
        rows: of a run's metrics, in their order.
    """
    ends = [row for row in rows if row["kind"] == "evaluation"]
    saved = {row["step"]: row["time"] - row["seconds"] for row in rows if row["kind"] == "checkpoint"}
    steps, epochs = [], []
    for before, after in itertools.pairwise(ends):
        steps.append((saved[after["step"]] - before["time"]) / (after["step"] - before["step"]))
        epochs.append(after["time"] - before["time"])
    return statistics.median(steps), statistics.median(epochs)


def writing(data: Path, args: argparse.Namespace) -> dict[str, float]:
    """Seconds that a run as by default spends in what writes about it: of a step, of an evaluation."""
    spent = {"step": 0.0, "evaluation": 0.0}
    calls: Counter[str] = Counter()
    of_steps, of_evaluations = ("stepped", "trained", "weights"), ("pictures", "scored", "evaluated")
    for names, kind in ((of_steps, "step"), (of_evaluations, "evaluation")):
        for name in names:
            setattr(Record, name, _timed(getattr(Record, name), name, kind, spent, calls))
    with tempfile.TemporaryDirectory() as folder:
        code = agrivision(["train", *flags(data, args, folder, {})])
    if code != 0:
        raise SystemExit(f"training ended with {code}")
    times = {"step": calls["stepped"], "evaluation": calls["evaluated"]}
    return {kind: seconds / times[kind] for kind, seconds in spent.items()}


def _timed(
    method: Callable[..., Any], name: str, kind: str, spent: dict[str, float], calls: Counter[str]
) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            spent[kind] += time.perf_counter() - start

    return timed


def flags(
    data: Path, args: argparse.Namespace, run_dir: str, how: Mapping[str, object]
) -> Iterator[str]:
    """Options of `agrivision train`."""
    options: dict[str, object] = {
        "run_dir": run_dir,
        "data.path": data,
        "data.batch_size": args.batch,
        "model.base_channels": args.base,
        "training.epochs": args.epochs,
        "training.deterministic": False,
        "training.precision": args.precision,
        **how,
    }
    for key, value in options.items():
        yield from (f"--{key}", str(value).lower() if isinstance(value, bool) else str(value))


def rows_of(data: Path, args: argparse.Namespace, how: Mapping[str, object]) -> list[dict[str, Any]]:
    """Train, and read what the run has noted."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "agrivision", "train", *flags(data, args, folder, how)]
        code = run_ranks(command, 1)
        if code != 0:
            raise SystemExit(f"{' '.join(command)} ended with {code}")
        return [*map(json.loads, (Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines())]


def report(
    args: argparse.Namespace,
    steps: Mapping[str, Median],
    epochs: Mapping[str, Median],
    spent: Mapping[str, float],
) -> Report:
    """What is printed.

    Args:
        args: of the command line.
        steps: seconds of a step by how the run was watched.
        epochs: seconds of a whole epoch.
        spent: seconds of writing alone, as from `writing`.
    """
    result = Report(
        title="W1: watching",
        options=args,
        packages=("tensorboard",),
        header=("a run", "ms a step", "more, %", "spread, %", "s an epoch", "more, %", "spread, %"),
    )
    for name, value in steps.items():
        whole = epochs[name]
        of_step = 1000 * value, more(steps, name), 100 * value.spread
        result.rows.append((name, *of_step, whole, more(epochs, name), 100 * whole.spread))
    for name in steps:
        if name != BARE:
            result.goal("W1", f"time of a step {name}", more(steps, name), at_most=1, unit="%")
    share = 100 * spent["step"] / steps[BARE]
    result.goal("W1", "writing alone, share of a step", share, at_most=1, unit="%")
    result.notes = [
        f"writing alone: {1000 * spent['step']:.2g} ms a step, {spent['evaluation']:.2g} s an"
        " evaluation",
        f"UNet-{args.base}, batch {args.batch}, {args.precision}, {args.epochs} epochs of"
        f" {args.dataset or f'{args.tiles} invented tiles, {args.side} pixels wide'}, timed from the"
        f" first evaluation to the last; more: than {BARE}",
        "as many tiles are drawn of a small split as of a large one: with more tiles the share is less",
    ]
    return result


def more(found: Mapping[str, Median], name: str) -> float:
    """Per cent that one takes longer: the median over the rounds, whose turns are neighbours."""
    pairs = zip(found[name].values, found[BARE].values, strict=True)
    return 100 * (statistics.median(watched / bare for watched, bare in pairs) - 1)


if __name__ == "__main__":
    main()
