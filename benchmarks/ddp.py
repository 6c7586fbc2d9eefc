"""T2: what exchanging gradients costs: ranks that train together against the same ranks, each alone.

Without a launcher it starts two ranks on this machine. Under `srun` or `torchrun` it measures the ranks
that it finds, on GPUs where there are any: `benchmarks/bench.sbatch` submits that.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from agrivision.config import Config
from agrivision.distributed import Ranks, connected, pick_device
from agrivision.world import World
from benchmarks.common import Median, Report, interleaved, parser
from benchmarks.training import Loop, config, rate, trainer

_WARM_UP = 3


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the report on rank 0."""
    options = parser(__doc__, rounds=9)
    options.add_argument(
        "--base", type=int, default=32, help="channels of the first level (default 32)"
    )
    options.add_argument("--side", type=int, default=128, help="of the images in pixels (default 128)")
    options.add_argument("--batch", type=int, default=4, help="images a step and rank (default 4)")
    options.add_argument("--steps", type=int, default=3, help="steps a turn (default 3)")
    options.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options.add_argument("--ranks", type=int, default=2, help="to start here, without a launcher")
    args = options.parse_args(argv)
    if args.quick:
        args.base, args.side, args.rounds, args.steps = 4, 32, 2, 1
    world = World.from_environment()
    if world.size > 1:
        _measure(world, args)
    else:
        _start_ranks(args.ranks, sys.argv[1:] if argv is None else list(argv))


def _start_ranks(ranks: int, argv: list[str]) -> None:
    """As launch.local does for `agrivision train`."""
    from launch.local import run_ranks

    code = run_ranks([sys.executable, "-m", "benchmarks.ddp", *argv], ranks)
    if code:
        sys.exit(code)


def _measure(world: World, args: argparse.Namespace) -> None:
    device = pick_device(world)
    if device.type == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))
    # Ranks of a Slurm step meet in the folder that the job was submitted from: names may not resolve.
    with connected(world, device, Path.cwd()) as ranks:
        turns = _turns(args, ranks, device)
        for turn in turns.values():
            for _ in range(_WARM_UP):
                turn()
        rates = interleaved(
            args.rounds,
            {
                name: partial(_together, ranks, partial(rate, turn, args.steps, args.batch, device))
                for name, turn in turns.items()
            },
        )
    if world.is_main:
        _report(args, world, device, rates)


def _together(ranks: Ranks, measure: Callable[[], float]) -> float:
    """All ranks begin at once; the mean of their rates."""
    ranks.largest(0)
    own = measure()
    return float(ranks.sum(torch.tensor([own], dtype=torch.float64))) / ranks.world.size


def _turns(
    args: argparse.Namespace, ranks: Ranks, device: torch.device
) -> dict[str, Callable[[], None]]:
    how = {"deterministic": False, "precision": args.precision}
    alone = config(base=args.base, side=args.side, batch=args.batch, **how)
    size = args.batch * ranks.world.size
    joint = replace(alone, data=replace(alone.data, batch_size=size))
    compressed = replace(joint, training=replace(joint.training, gradient_compression="bf16"))
    return {
        "each alone": Loop(trainer(alone, device)),
        "together, DDP's defaults": _defaults(joint, device, ranks),
        "together, ours": Loop(trainer(joint, device, ranks)),
        "together, ours, gradients in bf16": Loop(trainer(compressed, device, ranks)),
    }


def _defaults(settings: Config, device: torch.device, ranks: Ranks) -> Loop:
    """The same trainer around a network that DDP wraps as its documentation does."""
    made = trainer(settings, device, ranks)
    index = None if device.type == "cpu" else [device.index]
    wrapped: nn.Module = DistributedDataParallel(made.model, device_ids=index)
    made._wrapped = made._network = wrapped
    return Loop(made)


def _report(
    args: argparse.Namespace, world: World, device: torch.device, rates: dict[str, Median]
) -> None:
    report = Report("T2: exchanging gradients", args)
    report.header = ("ranks", "images/s a rank", "cost, %", "spread, %")
    costs = {name: _cost(rates["each alone"], value) for name, value in rates.items()}
    report.rows += [(name, v, costs[name], 100 * v.spread) for name, v in rates.items()]
    report.goal(
        "T2", f"{world.size} ranks against as many alone", costs["together, ours"], at_most=5, unit="%"
    )
    report.notes.append(
        f"{world.size} ranks on {len(world.hosts) or 1} nodes, {device.type},"
        f" {torch.get_num_threads()} threads a rank, UNet-{args.base}, {args.side} x {args.side}"
        f" pixels, batch {args.batch} a rank, {args.precision}; costs are medians over rounds"
    )
    report.finish()


def _cost(alone: Median, other: Median) -> float:
    """By how many per cent a rank is slower, round by round; the median."""
    return Median([100 * (a / b - 1) for a, b in zip(alone.values, other.values, strict=True)])


if __name__ == "__main__":
    main()
