"""Faults of ranks that need no Slurm: a loader's thread dies, memory ends, their number changes."""

from __future__ import annotations

import os
import signal
from collections import Counter
from functools import partial
from itertools import count
from pathlib import Path
from threading import current_thread
from typing import Any, Literal

import pytest

from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.errors import ExitCode
from tests.heard import hear
from tests.ranks import Disturbance, run
from tests.training.runs import arguments, assert_same, last_bits, samples
from tests.training.test_invariant_runs import INVARIANT

pytestmark = pytest.mark.faults

Death = Literal["killed", "bug", "memory"]
PLAIN = {"data__threads": 2, "training__evaluate_every_epochs": 0}
TILES = 40  # the rank decodes the fourteenth batch: it is in its eleventh step at least, and has saved


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by two ranks."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(arguments(dataset, run_dir, **PLAIN), 2) == [0, 0]
    return run_dir


def lose_a_thread(rank: int, *, death: Death) -> None:
    """One of rank 1's decoding threads does not come to the end of a tile."""
    if rank != 1:
        return
    from agrivision.data.loader import Frames

    original, tiles = Frames.decode, count(1)

    def decode(self: Frames, *arguments: Any) -> None:
        assert current_thread().name.startswith("decode")
        if next(tiles) == TILES:
            if death == "killed":  # as the operating system does it: a thread takes its process along
                os.kill(os.getpid(), signal.SIGKILL)
            raise MemoryError if death == "memory" else RuntimeError("invented")
        original(self, *arguments)

    Frames.decode = decode  # type: ignore[method-assign]


@pytest.mark.row(28)
@pytest.mark.parametrize(
    ("death", "code", "said"),
    [
        ("killed", -signal.SIGKILL, ""),
        ("bug", ExitCode.FAILED, "RuntimeError: invented"),
        ("memory", ExitCode.HOPELESS, "out of memory: use smaller batches, crops or tiles"),
    ],
)
def test_a_thread_of_the_loader_dies(
    death: Death, code: int, said: str, dataset: Path, tmp_path: Path, undisturbed: Path
) -> None:
    command = arguments(dataset, tmp_path, **PLAIN)
    other, loser = hear(command, 2, hook=partial(lose_a_thread, death=death))
    assert (other.code, loser.code) == (ExitCode.FAILED, code)
    assert other.complaint.startswith("lost the other ranks")
    assert said in "\n".join(loser.err[-1:])
    assert last_bits(tmp_path)[0] >= 5
    assert run(command, 2) == [0, 0]
    assert_same(tmp_path, undisturbed)


def use_up_memory(rank: int) -> None:
    """The GPU of rank 1 is full at its twelfth step."""
    if rank == 1:
        import torch

        from agrivision.training.trainer import Trainer

        original, steps = Trainer._backward, count(1)

        def backward(self: Trainer, *arguments: Any) -> Any:
            if next(steps) == 12:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return original(self, *arguments)

        Trainer._backward = backward  # type: ignore[method-assign]


@pytest.mark.row(27)
def test_one_rank_has_no_memory_left(dataset: Path, tmp_path: Path, undisturbed: Path) -> None:
    """Both leave, with one line each; where there is more memory, the same command goes on."""
    command = arguments(dataset, tmp_path, **PLAIN)
    other, loser = hear(command, 2, hook=use_up_memory)
    assert (other.code, loser.code) == (ExitCode.FAILED, ExitCode.HOPELESS)
    assert other.complaint.startswith("lost the other ranks")
    assert loser.complaint.startswith("out of GPU memory: use smaller batches")
    assert last_bits(tmp_path)[0] >= 5
    assert run(command, 2) == [0, 0]
    assert_same(tmp_path, undisturbed)


@pytest.mark.row(5)
@pytest.mark.row(6)
@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGKILL, 3), (signal.SIGTERM, 4)])
def test_gradients_of_many_ranks_are_added_in_the_same_order_after_a_resume(
    number: signal.Signals, ranks: int, dataset: Path, tmp_path: Path
) -> None:
    """A sum of two has one order only: it takes three ranks to see another."""
    assert run(arguments(dataset, tmp_path / "whole"), ranks) == [0] * ranks
    command = arguments(dataset, tmp_path / "broken")
    codes = run(command, ranks, disturbance=Disturbance(number, "forward", count=7, rank=1))
    assert 0 not in codes
    assert run(command, ranks) == [0] * ranks
    assert_same(tmp_path / "broken", tmp_path / "whole")


def interrupted_on_other_ranks(command: list[str]) -> None:
    """Four ranks, one of which is killed; two, one of which is asked to stop; three, to the end."""
    kill = Disturbance(signal.SIGKILL, "forward", count=7, rank=2)
    codes = run(command, 4, disturbance=kill)
    assert codes[2] == -signal.SIGKILL and ExitCode.DONE not in codes
    stop = Disturbance(signal.SIGTERM, "forward", count=3, rank=1)
    assert run(command, 2, disturbance=stop) == [ExitCode.STOPPED] * 2
    assert run(command, 3) == [0] * 3


@pytest.mark.row(29)
def test_four_then_two_then_three_ranks_see_the_same_samples(
    dataset: Path, tmp_path: Path, undisturbed: Path
) -> None:
    interrupted_on_other_ranks(arguments(dataset, tmp_path))
    mine, reference = samples(tmp_path), samples(undisturbed)
    assert {step: sorted(keys) for step, keys in mine.items()} == {
        step: sorted(keys) for step, keys in reference.items()
    }
    reader = SplitReader(dataset, Schema.read(dataset), "train")
    everything = Counter(reader.key(tile) for tile in range(len(reader)))
    for epoch in range(3):
        assert everything == Counter(
            key for (when, _), keys in mine.items() if when == epoch for key in keys
        )


@pytest.mark.row(29)
def test_four_then_two_then_three_ranks_have_the_same_bits(dataset: Path, tmp_path: Path) -> None:
    """In the invariant mode, where they are those of one rank."""
    options = INVARIANT | {"training__epochs": 3}
    assert run(arguments(dataset, tmp_path / "alone", **options)) == [0]
    interrupted_on_other_ranks(arguments(dataset, tmp_path / "run", **options))
    assert last_bits(tmp_path / "run") == last_bits(tmp_path / "alone")
    assert_same(tmp_path / "run", tmp_path / "alone")
