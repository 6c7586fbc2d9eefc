"""C1, checkpoints: how long training stands still for one, and what throughput it costs.

The states are those of a UNet with 64 base channels, AdamW and an average (497 MB), in channels-last
layout as they are trained, on the GPU where there is one. Beside ours stand `torch.save`;
`torch.distributed.checkpoint.async_save` as its recipe calls it, and with staging buffers that are kept
from one checkpoint to the next (on a GPU page-locked, by the recipe's writer; without one the recipe's
does not work, and the stager is kept instead); and a bare copy of the bytes, the floor of every
snapshot that is made at once. Timed is what keeps the training; who writes behind it has all the time
that it needs before the next turn, and the states change in between.

Ours copies behind the gradients of the next step. It keeps the training while it is called, and again
if the copy is not made when the gradients are: the sum of both counts, with a forward and a backward
pass of the network that is saved in between (on a CPU of one image of 256x256 pixels, a hundredth of a
usual step). "Copied at once" leaves the pass out, so that all of the copy counts.

The throughput is that of a UNet that trains, windows without and with saves taking turns, in pairs. A
window with saves begins one every few seconds and lasts until all are on the disk. What it has lost
beside the other one of its pair, in seconds of training for each save, is divided by the minute; the
median of the pairs counts.

    python -m benchmarks.checkpoint [--quick] [--rounds 7] [--folder DISK]
                                    [--windows 7] [--seconds 15] [--every 5]
"""

from __future__ import annotations

import argparse
import os
import shutil
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
from agrivision.training.ema import WeightAverage, exponential
from agrivision.training.optimizer import Optimizer
from agrivision.training.saver import Saved, Saver
from benchmarks.common import Median, Report, interleaved, parser

BANDS, CLASSES = 4, 9
COPY, SAVE = "a bare copy of the bytes", "torch.save, fsync, rename"
DCP, DCP_KEPT = "DCP async_save", "DCP async_save, staging kept"
OURS, OURS_AT_ONCE = "ours", "ours, copied at once"

Save = Callable[["Trained"], tuple[float, Callable[[], float | None]]]
"""Begins to save; gives the seconds that it has kept the training, and a function that waits until all
is on the disk and may say itself how long that took."""


def main() -> None:
    """Measure what keeps the training, then what it loses."""
    options = parser(__doc__, rounds=7)
    options.add_argument("--base", type=int, default=64, help="base channels of the UNet that is saved")
    options.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    options.add_argument("--windows", type=int, default=7, help="pairs of windows of training")
    options.add_argument("--seconds", type=float, default=15.0, help="least length of a window")
    options.add_argument("--every", type=float, default=5.0, help="seconds from save to save in it")
    args = options.parse_args()
    if args.quick:
        args.rounds, args.base, args.windows, args.seconds, args.every = 1, 8, 1, 1.0, 0.5
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side, batch = (512, 16) if device.type == "cuda" else (64 if args.quick else 256, 1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        states = Trained(args.base, device, side=side, batch=batch)
        times = stand_still(Path(folder), states, args.rounds)
        loss = Loss(Path(folder) / "trained", states, args.seconds, args.every)
        rates = interleaved(args.windows, {"without": loss.without, "with": loss.with_saves})
    report(args, states, times, rates, loss)


class Trained:
    """A model, its optimiser and its average after a step, and both halves of a step.

    Args:
        base: base channels of the UNet.
        device: where it is.
        side: pixels of an image's side.
        batch: images in a step.
    """

    def __init__(self, base: int, device: torch.device, *, side: int, batch: int) -> None:
        torch.manual_seed(0)
        self.device = device
        self.trained = f"UNet-{base}, {side}x{side}, batch {batch}"
        model = build_model(ModelConfig(base_channels=base), BANDS, CLASSES)
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = Optimizer(self.model, OptimizerConfig())
        self.average = WeightAverage(self.model, exponential(0.99))
        self._images = torch.randn(batch, BANDS, side, side, device=device).contiguous(
            memory_format=torch.channels_last
        )
        self._labels = torch.randint(CLASSES, (batch, side, side), device=device)
        self._steps = count(1)
        self.gradients()
        self.change()

    def gradients(self) -> None:
        """The first half of a step: the network forward and backward."""
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = torch.nn.functional.cross_entropy(self.model(self._images), self._labels)
        loss.backward()  # type: ignore[no-untyped-call]

    def change(self) -> None:
        """The second half: weights, moments and average change."""
        step = next(self._steps)
        self.optimizer.step(1e-4)
        self.average.update(self.model, step, step)
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
    with alone(states.device), ours(folder / "ours", states) as (behind, at_once):
        contestants: dict[str, Save] = {
            COPY: all_of_it(bare_copy(states)),
            SAVE: all_of_it(partial(torch_save, folder / "plain.pt")),
            DCP: all_of_it(dcp_saver(folder / "dcp")),
            DCP_KEPT: all_of_it(dcp_saver(folder / "dcp-kept", **kept_staging(folder, states.device))),
            OURS_AT_ONCE: at_once,
            OURS: behind,
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


def turn(states: Trained, save: Save, wholes: list[float]) -> float:
    """Save once; returns the seconds that it kept the training, and notes those until the end."""
    states.change()
    os.sync()  # nobody pays for what another one wrote
    begin = time.perf_counter()
    stood, finish = save(states)
    own = finish()
    wholes.append(time.perf_counter() - begin if own is None else own)
    return stood


def all_of_it(save: Callable[[Trained], Callable[[], object]]) -> Save:
    """All of the time until it returns keeps the training."""

    def timed(states: Trained) -> tuple[float, Callable[[], float | None]]:
        begin = time.perf_counter()
        finish = save(states)
        stood = time.perf_counter() - begin

        def wait() -> None:
            finish()

        return stood, wait

    return timed


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
        future = dcp.async_save(  # type: ignore[attr-defined]
            dict(states()), checkpoint_id=place, **how
        )

        def finish() -> None:
            future.result()  # type: ignore[union-attr]
            shutil.rmtree(place)

        return finish

    return save


def kept_staging(folder: Path, device: torch.device) -> dict[str, Any]:
    """What makes async_save use the same buffers each time."""
    if device.type == "cuda":
        writer = dcp.FileSystemWriter(  # type: ignore[attr-defined]
            folder, cache_staged_state_dict=True
        )
        return {"storage_writer": writer}
    nothing_of_a_gpu = StagingOptions(
        use_pinned_memory=False,
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=False,
    )
    return {"async_stager": DefaultStager(nothing_of_a_gpu)}


@contextmanager
def ours(folder: Path, states: Trained) -> Iterator[tuple[Save, Save]]:
    """A saver whose memory is there already: copies behind the gradients, and at once."""
    steps = count(1)
    wholes: list[Saved] = []
    with Saver(RunDirectory(folder), keep_last=1, allowed=nothing, saved=wholes.append) as saver:
        saver.prepare(states)

        def finish() -> float:
            saver.wait()
            return wholes[-1].seconds

        def behind(states: Trained) -> tuple[float, Callable[[], float]]:
            begin = time.perf_counter()
            saver.save(states(), step=next(steps), epoch=0)
            stood = time.perf_counter() - begin
            states.gradients()
            return stood + seconds_in(saver.copied, states.device), finish

        def at_once(states: Trained) -> tuple[float, Callable[[], float]]:
            begin = time.perf_counter()
            saver.save(states(), step=next(steps), epoch=0)
            saver.copied()
            states.wait()
            return time.perf_counter() - begin, finish

        yield behind, at_once


def seconds_in(wait: Callable[[], None], device: torch.device) -> float:
    """How long a function keeps whoever calls it, or a GPU, where it is the GPU that waits."""
    begin = time.perf_counter()
    if device.type != "cuda":
        wait()
        return time.perf_counter() - begin
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    before.record()
    wait()
    after.record()
    seconds = time.perf_counter() - begin
    after.synchronize()
    return max(seconds, float(before.elapsed_time(after)) / 1000)


@contextmanager
def alone(device: torch.device) -> Iterator[None]:
    """A process group of one rank, which async_save wants."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


# What throughput it costs


class Loss:
    """Windows of training with and without saves.

    Args:
        folder: to save into.
        states: that are saved; they are larger than those of the network that trains on a CPU, which
            would otherwise take seconds for a step.
        seconds: least length of a window.
        every: seconds from save to save, more where one takes longer.
    """

    def __init__(self, folder: Path, states: Trained, seconds: float, every: float) -> None:
        base, side, batch = (64, 512, 16) if states.device.type == "cuda" else (16, 128, 4)
        self.network = Trained(base, states.device, side=side, batch=batch)
        self._folder, self._states = folder, states
        self._seconds, self._every = seconds, every
        self._numbers = count(1)
        self._windows: list[tuple[float, int]] = []  # with saves: seconds, saves
        for _ in range(3):
            self._step(nothing)

    def without(self) -> float:
        """Steps a second."""
        begin, steps = self._begin(), 0
        while time.perf_counter() - begin < self._seconds:
            self._step(nothing)
            steps += 1
        return steps / (time.perf_counter() - begin)

    def with_saves(self) -> float:
        """Steps a second in a window that begins with a save and ends when the last is on the disk."""
        done: list[Saved] = []
        with Saver(
            RunDirectory(self._folder), keep_last=1, allowed=nothing, saved=done.append
        ) as saver:
            saver.prepare(self._states)
            begin, steps, saves = self._begin(), 0, 0
            while (now := time.perf_counter() - begin) < self._seconds or len(done) < saves:
                if saver.failed:
                    saver.wait()  # it says why
                if len(done) == saves and saves * self._every <= now < self._seconds:
                    saver.save(self._states(), step=next(self._numbers), epoch=0)
                    saves += 1
                self._step(saver.copied)
                steps += 1
            seconds = time.perf_counter() - begin
        self._windows.append((seconds, saves))
        return steps / seconds

    def _begin(self) -> float:
        os.sync()
        self.network.wait()
        return time.perf_counter()

    def _step(self, before_change: Callable[[], None]) -> None:
        self.network.gradients()
        before_change()
        self.network.change()

    def seconds_lost(self, rates: Mapping[str, Median]) -> Median:
        """Of training, for each save, in each pair of windows."""
        pairs = zip(rates["without"].values, rates["with"].values, self._windows, strict=True)
        return Median([length * (1 - rate / free) / saves for free, rate, (length, saves) in pairs])


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
    low, high = min(lost.values), max(lost.values)
    found.notes += [
        f"Beside torch.save: {stalls[SAVE] / stalls[OURS]:.1f} x shorter; beside async_save:"
        f" {stalls[DCP] / stalls[OURS]:.1f} x, with its staging kept:"
        f" {stalls[DCP_KEPT] / stalls[OURS]:.1f} x; beside a bare copy:"
        f" {stalls[COPY] / stalls[OURS]:.1f} x, which takes"
        f" {stalls[COPY] / stalls[OURS_AT_ONCE]:.0%} of ours at once.",
        f"Ours: between its two halves the network computes its gradients ({states.trained}).",
        f"Throughput: {loss.network.trained}, {rates['without']:.3g} steps/s without and"
        f" {rates['with']:.3g} with saves (spread ±{rates['without'].spread:.0%} and"
        f" ±{rates['with'].spread:.0%}). A save of {size} costs {lost:.2f} s of training, the median of"
        f" {len(lost.values)} pairs of windows of {args.seconds:.0f} s ({low:.2f} to {high:.2f}).",
        "Until all is on the disk: ours with a checksum of each file, a manifest, fsync of files and"
        " folder, a rename, and the one before removed.",
    ]
    found.finish()


if __name__ == "__main__":
    main()
