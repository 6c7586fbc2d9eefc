"""C1, checkpoints: how long training stands still for one, and what throughput it costs.

The states are those of a UNet with 64 base channels, AdamW and an average (497 MB), in channels-last
layout as they are trained, on the GPU where there is one. Beside ours stand `torch.save`;
`torch.distributed.checkpoint.async_save` as its recipe calls it, and with staging buffers that are kept
from one checkpoint to the next (on a GPU page-locked, by the recipe's writer; without one the recipe's
does not work, and the stager is kept instead); and a bare copy of the bytes, the floor of every
snapshot. Timed is what keeps the training; who writes behind it has all the time that it needs before
the next turn, and the states change in between.

The throughput is that of a UNet that trains, a window without and a window with a save taking turns; a
window with a save lasts until all of it is on the disk. What is lost in it, in seconds of training, is
divided by the minute.

    python -m benchmarks.checkpoint [--quick] [--rounds 7] [--folder DISK] [--windows 4] [--seconds 20]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from agrivision.config import ModelConfig, OptimizerConfig
from agrivision.model.build import build_model
from agrivision.rundir import RunDirectory
from agrivision.storage import sync_folder
from agrivision.training.ema import WeightAverage
from agrivision.training.optimizer import Optimizer
from agrivision.training.saver import Saver
from benchmarks.common import Median, Report, interleaved, parser

BANDS, CLASSES = 4, 9
COPY, SAVE = "a bare copy of the bytes", "torch.save, fsync, rename"
DCP, DCP_KEPT = "DCP async_save", "DCP async_save, staging kept"
OURS = "ours"


def main() -> None:
    """Measure what keeps the training, then what it loses."""
    options = parser(__doc__, rounds=7)
    options.add_argument("--base", type=int, default=64, help="base channels of the UNet that is saved")
    options.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    options.add_argument("--windows", type=int, default=4, help="pairs of windows of training")
    options.add_argument("--seconds", type=float, default=20.0, help="least length of a window")
    args = options.parse_args()
    if args.quick:
        args.rounds, args.base, args.windows, args.seconds = 1, 8, 1, 1.0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        states = Trained(args.base, device)
        times = stand_still(Path(folder), states, args.rounds)
        loss = Loss(Path(folder) / "trained", states, args.seconds)
        rates = interleaved(args.windows, {"without": loss.without, "with": loss.with_a_save})
    report(args, states, times, rates, loss)


class Trained:
    """A model, its optimiser and its average after a step, and a way to change them."""

    def __init__(self, base: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        model = build_model(ModelConfig(base_channels=base), BANDS, CLASSES)
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = Optimizer(self.model, OptimizerConfig())
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.average = WeightAverage(self.model, 0.99)
        self._steps = count(1)
        self.change()

    def change(self) -> None:
        """A step, without the network."""
        step = next(self._steps)
        self.optimizer.step(1e-4)
        self.average.update(self.model, step)
        self.wait()

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def __call__(self) -> dict[str, Mapping[str, Any]]:
        """All that a checkpoint holds, by name."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.average.state_dict(),
            "progress": {"step": 1, "cursor": 16, "sums": {"total": 0.5}},
        }

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        values = [value for state in self().values() for value in state.values()]
        return [value for value in values if isinstance(value, torch.Tensor)]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


# How long training stands still


def stand_still(
    folder: Path, states: Trained, rounds: int
) -> tuple[dict[str, Median], dict[str, Median]]:
    """Seconds that keep the training, and seconds until all is on the disk, by name.

    Args:
        folder: to write into.
        states: to save.
        rounds: turns of each; a first one of each, which allocates, is not counted.
    """
    wholes: dict[str, list[float]] = {}
    with alone(states.device), ours(folder / "ours", states) as save_ours:
        contestants = {
            COPY: bare_copy(states),
            SAVE: partial(torch_save, folder / "plain.pt"),
            DCP: dcp_saver(folder / "dcp"),
            DCP_KEPT: dcp_saver(folder / "dcp-kept", **kept_staging(folder, states.device)),
            OURS: save_ours,
        }
        turns = {
            name: partial(turn, states, save, wholes.setdefault(name, []))
            for name, save in contestants.items()
        }
        interleaved(1, turns)
        for times in wholes.values():
            times.clear()
        stalls = interleaved(rounds, turns)
    return stalls, {name: Median(times) for name, times in wholes.items()}


def turn(
    states: Trained, save: Callable[[Trained], Callable[[], object]], wholes: list[float]
) -> float:
    """Save once; returns the seconds until training may go on, and notes those until the end."""
    states.change()
    os.sync()  # nobody pays for what another one wrote
    begin = time.perf_counter()
    finish = save(states)
    stood = time.perf_counter() - begin
    finish()
    wholes.append(time.perf_counter() - begin)
    return stood


def bare_copy(states: Trained) -> Callable[[Trained], Callable[[], object]]:
    """As many bytes from one place to another that was touched before: what no snapshot can beat."""
    cuda = states.device.type == "cuda"
    source = torch.ones(states.nbytes, dtype=torch.uint8, device=states.device)
    target = torch.ones(states.nbytes, dtype=torch.uint8, pin_memory=cuda)
    middle = states.nbytes // 2

    def copy(_: Trained) -> Callable[[], object]:
        if cuda:
            target.copy_(source)
            return nothing
        to, of = target.numpy(), source.numpy()
        other = threading.Thread(target=np.copyto, args=(to[middle:], of[middle:]))
        other.start()
        np.copyto(to[:middle], of[:middle])
        other.join()
        return nothing

    return copy


def nothing() -> None:
    """Nothing is left to do."""


def torch_save(path: Path, states: Trained) -> Callable[[], object]:
    """As most training loops save, if they care for the disk at all."""
    beside = path.with_suffix(".part")
    with beside.open("wb") as file:
        torch.save(states(), file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)
    return nothing


def dcp_saver(folder: Path, **how: Any) -> Callable[[Trained], Callable[[], object]]:
    """As the recipe on asynchronous saving does it; see torch's documentation."""
    numbers = count()

    def save(states: Trained) -> Callable[[], object]:
        place = folder / str(next(numbers))
        future = dcp.async_save(dict(states()), checkpoint_id=place, **how)

        def finish() -> None:
            future.result()  # type: ignore[union-attr]
            shutil.rmtree(place)

        return finish

    return save


def kept_staging(folder: Path, device: torch.device) -> dict[str, Any]:
    """What makes async_save use the same buffers each time."""
    if device.type == "cuda":
        return {"storage_writer": dcp.FileSystemWriter(folder, cache_staged_state_dict=True)}
    nothing_of_a_gpu = StagingOptions(
        use_pinned_memory=False,
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=False,
    )
    return {"async_stager": DefaultStager(nothing_of_a_gpu)}


@contextmanager
def ours(folder: Path, states: Trained) -> Iterator[Callable[[Trained], Callable[[], object]]]:
    """A saver whose memory is there already."""
    steps = count(1)
    with Saver(RunDirectory(folder), keep_last=1, allowed=nothing) as saver:
        saver.prepare(states)

        def save(states: Trained) -> Callable[[], object]:
            saver.save(states(), step=next(steps), epoch=0)
            return saver.wait

        yield save


@contextmanager
def alone(device: torch.device) -> Iterator[None]:
    """A process group of one rank, which async_save wants."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


# What throughput it costs


class Loss:
    """Windows of training with and without a save.

    Args:
        folder: to save into.
        states: that are saved; they are larger than those of the network that trains on a CPU, which
            would otherwise take seconds for a step.
        seconds: least length of a window.
    """

    def __init__(self, folder: Path, states: Trained, seconds: float) -> None:
        cuda = states.device.type == "cuda"
        self.trained = "UNet-64, 512x512, batch 16" if cuda else "UNet-16, 128x128, batch 4"
        side, batch, base = (512, 16, 64) if cuda else (128, 4, 16)
        self._folder, self._states, self._seconds = folder, states, seconds
        self._network = Trained(base, states.device)
        self._images = torch.randn(batch, BANDS, side, side, device=states.device).contiguous(
            memory_format=torch.channels_last
        )
        self._labels = torch.randint(CLASSES, (batch, side, side), device=states.device)
        self._steps = count(1)
        self._lengths: list[float] = []  # of the windows with a save, in seconds
        for _ in range(3):
            self._step()

    def without(self) -> float:
        """Steps a second."""
        return self._train(lambda: False)

    def with_a_save(self) -> float:
        """Steps a second in a window that begins with a save and ends after its end."""
        done = threading.Event()
        with Saver(
            RunDirectory(self._folder), keep_last=1, allowed=nothing, saved=lambda _: done.set()
        ) as saver:
            saver.prepare(self._states)
            save = partial(saver.save, self._states(), step=next(self._steps), epoch=0)
            begin = time.perf_counter()
            rate = self._train(lambda: not (done.is_set() or saver.failed), save)
            self._lengths.append(time.perf_counter() - begin)
        return rate

    def _train(self, busy: Callable[[], bool], begin_with: Callable[[], None] = nothing) -> float:
        os.sync()
        self._network.wait()
        begin, steps = time.perf_counter(), 0
        begin_with()
        while time.perf_counter() - begin < self._seconds or busy():
            self._step()
            steps += 1
        return steps / (time.perf_counter() - begin)

    def _step(self) -> None:
        self._network.optimizer.zero_grad()
        with torch.autocast(self._network.device.type, torch.bfloat16, enabled=self._cuda):
            loss = torch.nn.functional.cross_entropy(self._network.model(self._images), self._labels)
        loss.backward()
        self._network.change()

    @property
    def _cuda(self) -> bool:
        return self._network.device.type == "cuda"

    def seconds_lost(self, rates: Mapping[str, Median]) -> float:
        """Of training, for each save: the median over the pairs of windows."""
        pairs = zip(rates["without"].values, rates["with"].values, self._lengths, strict=True)
        return statistics.median(length * (1 - rate / free) for free, rate, length in pairs)


def report(
    args: argparse.Namespace,
    states: Trained,
    times: tuple[Mapping[str, Median], Mapping[str, Median]],
    rates: Mapping[str, Median],
    loss: Loss,
) -> None:
    """Print the tables."""
    stalls, wholes = times
    cuda = states.device.type == "cuda"
    device = torch.cuda.get_device_name() if cuda else "CPU"
    size = f"{states.nbytes / 1e6:,.0f} MB"
    found = Report(
        f"Checkpoints of {size} on {device}",
        args,
        packages=("safetensors", "xxhash"),
        header=["saved by", "training stands still, ms", "spread", "until all is on the disk, s"],
    )
    for name, stall in stalls.items():
        found.rows.append([name, 1000 * stall, f"±{stall.spread:.0%}", float(wholes[name])])
    found.goal("C1", f"stall for {size}", 1000 * stalls[OURS], at_most=60 if cuda else 25, unit="ms")
    lost = loss.seconds_lost(rates)
    found.goal("C1", "throughput, one a minute", 100 * lost / 60, at_most=2, unit="%")
    found.notes += [
        f"Beside torch.save: {stalls[SAVE] / stalls[OURS]:.1f} x shorter; beside async_save:"
        f" {stalls[DCP] / stalls[OURS]:.1f} x, with its staging kept:"
        f" {stalls[DCP_KEPT] / stalls[OURS]:.1f} x; a bare copy takes"
        f" {stalls[COPY] / stalls[OURS]:.0%} of ours.",
        f"Throughput: {loss.trained}, {rates['without']:.3g} steps/s without and"
        f" {rates['with']:.3g} with a save in a window of {args.seconds:.0f} s (spread"
        f" ±{rates['without'].spread:.0%} and ±{rates['with'].spread:.0%}): {lost:.2f} s of training"
        f" for each save of {size}.",
        "Until all is on the disk: ours with a checksum of each file, a manifest, fsync of files and"
        " folder, a rename, and the one before removed.",
    ]
    found.finish()


if __name__ == "__main__":
    main()
