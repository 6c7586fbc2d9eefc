"""G: one GPU: images/s, what data and augmentation cost, and the naive loop beside it.

Without a GPU it runs a tiny version on the CPU and says what it would measure.
`benchmarks/bench.sbatch` submits it. With `--data DATASET` (a prepared one) real data takes turns
with data that is ready.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from agrivision.config import Config
from agrivision.data.loader import TrainLoader
from agrivision.data.order import Order
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.distributed import Ranks
from agrivision.training.trainer import Trainer
from agrivision.world import World
from benchmarks.common import Median, Report, interleaved, parser, say
from benchmarks.training import (
    Loop,
    Ready,
    augmentation,
    config,
    contiguous,
    network,
    plain,
    rate,
    trainer,
)

_TERAFLOP_512 = 1.1565  # forward and backward of UNet-64 on one image of 512 x 512 pixels
_PEAK = 989.0  # TFLOP/s of an H200 in dense bf16, as its maker states
_EPOCH = 56_944  # training tiles of Agriculture-Vision 2021
_WARM_UP = 12


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the report."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--batch", type=int, default=32, help="images a step (default 32)")
    options.add_argument("--steps", type=int, default=20, help="steps a turn (default 20)")
    options.add_argument(
        "--data", type=Path, default=None, help="a prepared data set of 512 x 512 tiles"
    )
    options.add_argument("--threads", type=int, default=2, help="of the loader (default 2)")
    args = options.parse_args(argv)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    base, side = (64, 512) if cuda and not args.quick else (4, 64)
    if base == 4:
        args.batch, args.steps, args.rounds = 2, 1, 2
    report = Report("G: one GPU", args)
    if not cuda:
        report.notes.append(
            "no GPU here: a UNet-4 on 64 x 64 pixels shows that the script runs; with one it measures"
            " a UNet-64 on 512 x 512 pixels in bf16"
        )
    torch.backends.cudnn.benchmark = True
    settings = config(base=base, side=side, batch=args.batch, precision="bf16", deterministic=False)
    turns = _turns(settings, device, args, compiled=cuda)
    for name, turn in turns.items():
        say(f"warming up: {name}")
        for _ in range(_WARM_UP if cuda else 1):
            turn()
    rates = interleaved(
        args.rounds,
        {name: partial(rate, turn, args.steps, args.batch, device) for name, turn in turns.items()},
    )
    report.header = ("loop", "images/s", "% of peak", "spread, %")
    scale = _TERAFLOP_512 * (base / 64) ** 2 * (side / 512) ** 2
    report.rows += [
        (name, value, 100 * value * scale / _PEAK, 100 * value.spread) for name, value in rates.items()
    ]
    _goals(report, rates, device)
    share = _augmentation_share(settings, device, rates)
    report.goal("G4", "augmentation and normalisation, share of a step", share, at_most=3, unit="%")
    report.finish()


def _turns(
    settings: Config, device: torch.device, args: argparse.Namespace, *, compiled: bool
) -> dict[str, Callable[[], None]]:
    fused = replace(settings, training=replace(settings.training, compile=True))
    side = settings.data.crop or 512
    naive = network(contiguous(settings), device)
    turns: dict[str, Callable[[], None]] = {
        "naive bf16 loop": plain(naive, device, side=side, batch=args.batch, precision="bf16"),
        "ours": Loop(trainer(settings, device)),
    }
    if compiled:
        turns["ours, compiled"] = Loop(trainer(fused, device))
    if args.data is not None:
        turns["ours, real data"] = Loop(_on_data(fused if compiled else settings, device, args))
    return turns


def _on_data(settings: Config, device: torch.device, args: argparse.Namespace) -> Trainer:
    schema = Schema.read(args.data)
    reader = SplitReader(args.data, schema, "train")
    loader = TrainLoader(
        reader,
        Order(size=len(reader), batch_size=args.batch, seed=0),
        World(),
        threads=args.threads,
        prefetch=4,
        pinned=device.type == "cuda",
    )
    return trainer(settings, device, Ranks(World()), loader)


def _goals(report: Report, rates: dict[str, Median], device: torch.device) -> None:
    ours = {name: value for name, value in rates.items() if name in ("ours", "ours, compiled")}
    best = max(ours, key=lambda name: ours[name])
    report.goal("G1", f"{best}, images/s", rates[best], at_least=340, unit="images/s")
    report.goal(
        "G2", f"{best} against the naive loop", rates[best] / rates["naive bf16 loop"], at_least=1.6
    )
    if "ours, real data" in rates:
        ready = rates.get("ours, compiled", rates["ours"])
        real = rates["ours, real data"]
        report.goal("G3", "real data against data that is ready", real / ready, at_least=0.98)
        report.goal("G3", f"an epoch of {_EPOCH:,} tiles", _EPOCH / real, at_most=170, unit="s")
    else:
        report.notes.append("no --data: real data was not measured")
    if device.type != "cuda":
        report.notes.append("the goals are those of one H200: on this CPU they mean nothing")


def _augmentation_share(settings: Config, device: torch.device, rates: dict[str, Median]) -> float:
    """Per cent of a step's time that augmentation takes by itself."""
    side, samples = settings.data.crop or 512, settings.data.batch_size
    augment = augmentation(settings, side)
    order = Order(size=samples, batch_size=samples, seed=0)
    pixels = Ready(order, World(), side, pinned=device.type == "cuda").pixels.to(device)

    def once() -> None:
        augment(pixels.planes, pixels.labels, 0, range(samples))

    once()
    seconds = 1 / rate(once, 5, 1, device)
    return 100 * seconds * rates["ours"] / samples


if __name__ == "__main__":
    main()
