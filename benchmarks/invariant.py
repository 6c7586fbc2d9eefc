"""T3, the invariant mode: the same SHA-256 of the weights on 1, 2 and 4 ranks, and what that costs.

Everything goes through `agrivision train`. Bits: six AdamW steps of a BatchNorm UNet with dropout,
augmentation and a moving average, on 1, 2 and 4 gloo ranks; the digest is that of the checkpoint's
model, optimiser and average. The same without the mode shows that they are not equal anyway. Price:
runs with and without the mode take turns, with the same micro-batches and one thread a rank; two ranks
without it are DistributedDataParallel, which sends gradients while the last micro-batch is on its way
back.

    python -m benchmarks.invariant [--quick] [--crop 256] [--rounds 3]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from agrivision import checkpoint
from agrivision.cli import main as agrivision
from benchmarks.common import Median, Report, fresh, interleaved, parser, say
from launch.local import run_ranks

RANKS = (1, 2, 4)
PRICED = (1, 2)  # more ranks than cores measure the scheduler
MODES = {"plain": False, "invariant": True}
STATES = ("model", "optimizer", "ema")
BATCH, MICRO_BATCH = 8, 2


def main() -> None:
    """Compare the bits, measure the price, print both."""
    options = parser(__doc__, rounds=3)
    options.add_argument("--base", type=int, default=32, help="first channels of the priced UNet")
    options.add_argument("--crop", type=int, default=128, help="side of the priced images in pixels")
    options.add_argument("--steps", type=int, default=6, help="timed steps of a turn, after a first")
    args = options.parse_args()
    if args.quick:
        args.rounds, args.base, args.crop, args.steps = 1, 4, 64, 2
    os.environ["OMP_NUM_THREADS"] = "1"  # with another number the kernels give other bits
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "dataset"
        fresh(make_data, Path(folder) / "fields", data, max(args.crop, 64))
        digests = {
            mode: [digest(data, ranks, invariant=invariant) for ranks in RANKS]
            for mode, invariant in MODES.items()
        }
        turns = {
            f"{mode}, {ranks}": partial(rate, data, ranks, args, invariant=invariant)
            for ranks in PRICED
            for mode, invariant in MODES.items()
        }
        rates = interleaved(args.rounds, turns)
    report(args, digests, rates).finish()


def report(
    args: argparse.Namespace, digests: Mapping[str, list[str]], rates: Mapping[str, Median]
) -> Report:
    """What is printed.

    Args:
        args: of the command line.
        digests: by mode, for each of RANKS.
        rates: images a second by mode and ranks.
    """
    result = Report(
        title="The invariant mode",
        options=args,
        header=["ranks", "SHA-256 plain", "invariant", "images/s plain", "invariant", "price"],
    )
    for ranks, *hashes in zip(RANKS, *(digests[mode] for mode in MODES), strict=True):
        cells: list[object] = ["", "", ""]
        if ranks in PRICED:
            cells = [rates[f"{mode}, {ranks}"] for mode in MODES]
            cells.append(f"{slower(rates, ranks):+.1f} %")
        result.rows.append([str(ranks), *(found[:12] for found in hashes), *cells])
    different = len(set(digests["invariant"]))
    result.goal("T3", "different SHA-256 on 1, 2, 4 ranks", different, at_most=1, unit="digests")
    for ranks in PRICED:
        what = f"invariant slower than plain, ranks: {ranks}"
        result.goal("T3", what, slower(rates, ranks), at_most=15, unit="%")
    result.notes = [
        f"UNet-{args.base}, {args.crop} x {args.crop}, fp32, channels-last, global batch {BATCH}"
        f" in micro-batches of {MICRO_BATCH}, one thread a rank; median of {args.rounds} turns"
        f" of {args.steps} steps each",
        "SHA-256: first 12 digits, of model, optimiser and average after 6 steps of a UNet-16",
        f"SHA-256 in the invariant mode: {', '.join(sorted(set(digests['invariant'])))}",
    ]
    return result


def make_data(source: Path, out: Path, side: int, tiles: int = 48) -> None:
    """Invented fields, prepared: so many tiles of `side` pixels over all splits."""
    for command in (
        ["synthesize", str(source), "--tiles", str(tiles), "--size", str(side), "--seed", "0"],
        ["prepare", str(source), str(out), "--workers", "1"],
    ):
        with contextlib.redirect_stdout(sys.stderr):  # stdout is the report's
            code = agrivision(command)
        if code != 0:
            raise SystemExit(f"could not make the data: agrivision {' '.join(command)}")


def digest(data: Path, ranks: int, *, invariant: bool) -> str:
    """SHA-256 of everything that six steps change, on some ranks."""
    with tempfile.TemporaryDirectory() as folder:
        train(
            data,
            Path(folder),
            ranks,
            {
                "data.crop": 64,
                "model.base_channels": 16,
                "model.dropout": 0.2,
                "augment.brightness": 0.2,
                "augment.contrast": 0.1,
                "training.max_steps": 6,
                "training.ema_decay": 0.9,
                "training.invariant": invariant,
            },
        )
        entry = checkpoint.entries(Path(folder) / "checkpoints")[-1]
        hasher = hashlib.sha256()
        for name in sorted(entry.files):
            if name.partition(".")[0] in STATES:
                hasher.update((entry.folder / name).read_bytes())
    say(f"{'invariant' if invariant else 'plain'} on {ranks}: {hasher.hexdigest()}")
    return hasher.hexdigest()


def rate(data: Path, ranks: int, args: argparse.Namespace, *, invariant: bool) -> float:
    """Images a second of all ranks together: the median over the steps after the first."""
    with tempfile.TemporaryDirectory() as folder:
        train(
            data,
            Path(folder),
            ranks,
            {
                "data.crop": args.crop,
                "model.base_channels": args.base,
                "training.max_steps": args.steps + 1,
                "training.invariant": invariant,
            },
        )
        lines = (Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "training"]
    rates: list[float] = [row["images_per_second"] for row in rows[1:]]
    return statistics.median(rates)


def train(data: Path, run_dir: Path, ranks: int, options: Mapping[str, object]) -> None:
    """`agrivision train` on some ranks of this machine; ends the script where that fails."""
    common = {
        "data.path": data,
        "data.batch_size": BATCH,
        "data.threads": 1,
        "training.epochs": 100,
        "training.evaluate_every_epochs": 0,
        "training.checkpoint_every_epochs": 0,
        "training.micro_batch_size": MICRO_BATCH,
        "monitor.log_every_steps": 1,
        "monitor.tensorboard": False,
        "monitor.images": 0,
    }
    flags = [
        word
        for key, value in {**common, **options}.items()
        for word in (f"--{key}", str(value).lower() if isinstance(value, bool) else str(value))
    ]
    command = [sys.executable, "-m", "agrivision", "train", "--run_dir", str(run_dir), *flags]
    code = run_ranks(command, ranks)
    if code != 0:
        raise SystemExit(f"{' '.join(command)} on {ranks} ranks ended with {code}")


def slower(rates: Mapping[str, Median], ranks: int) -> float:
    """Per cent that a step takes longer: the median over the rounds, whose turns are neighbours."""
    plain, invariant = (rates[f"{mode}, {ranks}"].values for mode in MODES)
    return 100 * (statistics.median(p / i for p, i in zip(plain, invariant, strict=True)) - 1)


if __name__ == "__main__":
    main()
