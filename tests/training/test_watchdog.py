"""Who hangs is named, the attempt ends with 1, and the same command ends as the undisturbed run."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from agrivision import checkpoint
from agrivision.data.loader import TrainLoader
from agrivision.errors import ExitCode
from agrivision.evaluation import evaluate
from agrivision.phase import WAITING
from agrivision.training.trainer import Trainer
from launch import local
from tests.ranks import run
from tests.training.runs import arguments, assert_same, samples

HOOKS = Path(__file__).parents[1] / "slurm" / "hooks.py"
LIMIT = 6.0  # seconds; a healthy step takes a twentieth of one, and this machine may be busy
STALL = {"training__stall_minutes": LIMIT / 60}
SAVED = 6  # steps, when the tests' ranks begin to hang after step 7


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    folder = tmp_path_factory.mktemp("undisturbed")

    @cache
    def make(ranks: int) -> Path:
        assert run(arguments(dataset, folder / str(ranks)), ranks) == [0] * ranks
        return folder / str(ranks)

    return make


def log_of(run_dir: Path, rank: int) -> str:
    return (run_dir / "log" / f"rank-{rank}.log").read_text()


def named(run_dir: Path, rank: int) -> str:
    """What a rank's log says of why the run stood still."""
    lines = [line for line in log_of(run_dir, rank).splitlines() if "stalled: " in line]
    assert lines, log_of(run_dir, rank)
    return lines[0].partition("stalled: ")[2]


def after(owner: type, name: str, calls: int, act: Callable[[], Any]) -> None:
    """Let something be done before the how-manieth call of a method."""
    original = getattr(owner, name)
    count = 0

    def wrapped(*words: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls:
            act()
        return original(*words, **more)

    setattr(owner, name, wrapped)


def dead_disk() -> None:
    time.sleep(3600)


def reads_from_a_dead_disk(rank: int) -> None:
    if rank == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        after(TrainLoader, "next_batch", 8, dead_disk)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_whose_disk_is_dead(
    ranks: int, dataset: Path, tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    command = arguments(dataset, tmp_path, **STALL)
    assert run(command, ranks, hook=reads_from_a_dead_disk) == [ExitCode.FAILED] * ranks
    for rank in range(ranks):
        pattern = (
            rf"rank {ranks - 1} on {os.uname().nodename} \(process \d+\) has been in 'wait for data'"
        )
        assert re.match(pattern, named(tmp_path, rank))
        assert "dead_disk" in log_of(tmp_path, rank) or rank not in (0, ranks - 1)
    assert run(command, ranks) == [0] * ranks
    assert_same(tmp_path, undisturbed(ranks))


def never_ends(*_: Any, **__: Any) -> None:
    time.sleep(3600)


def loses_its_messages(rank: int) -> None:
    def deafen() -> None:
        torch.distributed.all_reduce = never_ends

    after(Trainer, "_agree", 8, deafen)


def test_a_collective_that_never_ends(
    dataset: Path, tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    command = arguments(dataset, tmp_path, **STALL)
    assert run(command, 2, hook=loses_its_messages) == [ExitCode.FAILED] * 2
    for rank in range(2):
        line = named(tmp_path, rank)
        assert line.startswith("a collective does not end: all 2 ranks have been in the same one for")
        assert line.endswith(f"s, in '{WAITING}'")
        assert "never_ends" in log_of(tmp_path, rank)
    assert run(command, 2) == [0, 0]
    assert_same(tmp_path, undisturbed(2))


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped(
    rank: int, dataset: Path, tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    """Nobody can see its stack, but a neighbour sees what the kernel says of it."""
    command = arguments(dataset, tmp_path, **STALL)
    assert in_ranks(f"freeze=7,rank={rank}", command) == ExitCode.FAILED
    line = named(tmp_path, 1 - rank)
    assert line.startswith(f"rank {rank} on ") and "has not been heard of for" in line
    assert re.search(r"process \d+ is T \(stopped\)", log_of(tmp_path, 1 - rank))
    assert checkpoint.entries(tmp_path / "checkpoints")[-1].step == SAVED
    assert run(command, 2) == [0, 0]
    assert_same(tmp_path, undisturbed(2))


@pytest.mark.faults
def test_a_rank_that_keeps_the_interpreters_lock(
    dataset: Path, tmp_path: Path, undisturbed: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its watchdog cannot run either; its stack is dumped without the lock."""
    monkeypatch.setattr(local, "_GRACE_SECONDS", 5.0)
    command = arguments(dataset, tmp_path, **STALL)
    assert in_ranks("hold=7", command) == ExitCode.FAILED
    line = named(tmp_path, 0)
    assert line.startswith("rank 1 on ") and "has not been heard of for" in line
    assert "in hold_the_lock" in log_of(tmp_path, 1)
    assert run(command, 2) == [0, 0]
    assert_same(tmp_path, undisturbed(2))


def in_ranks(hooks: str, command: list[str]) -> int:
    """Run a command on two ranks of the package's own launcher, disturbed; returns its exit code."""
    return local.run_ranks([sys.executable, str(HOOKS), hooks, "-m", "agrivision", *command], 2)


@pytest.mark.faults
def test_torchrun_ends_with_it(
    dataset: Path, tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    command = arguments(dataset, tmp_path, **STALL)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [*torchrun, str(HOOKS), "freeze=7,rank=0", "-m", "agrivision", *command]
    assert subprocess.run(words, check=False, capture_output=True, timeout=240).returncode == 1
    assert named(tmp_path, 1).startswith("rank 0 on ")
    assert re.search(r"process \d+ is T \(stopped\)", log_of(tmp_path, 1))
    assert run(command, 2) == [0, 0]
    assert_same(tmp_path, undisturbed(2))


def is_slow(rank: int) -> None:
    if rank == 1:
        slowed(TrainLoader, "next_batch", 0.1)


def slowed(owner: Any, name: str, seconds: float) -> None:
    original = getattr(owner, name)

    def wrapped(*words: Any, **more: Any) -> Any:
        time.sleep(seconds)
        return original(*words, **more)

    setattr(owner, name, wrapped)


@pytest.mark.faults
def test_a_straggler_is_named_and_not_ended(dataset: Path, tmp_path: Path) -> None:
    slow, whole = tmp_path / "slow", tmp_path / "whole"
    changes = {"training__epochs": 10, "training__evaluate_every_epochs": 0}
    assert run(arguments(dataset, slow, **STALL, **changes), 2, hook=is_slow) == [0, 0]
    warnings = [line for line in log_of(slow, 0).splitlines() if "is slower than the others" in line]
    assert warnings and all("WARNING" in line and "rank 1 on " in line for line in warnings)
    assert warnings[0].endswith("most of it in 'wait for data'")
    assert "slower" not in log_of(slow, 1)
    assert run(arguments(dataset, whole, **changes), 2) == [0, 0]
    assert_same(slow, whole)


def evaluates_slowly(rank: int) -> None:
    if rank == 0:
        slowed(evaluate, "_predict", 2.0)


@pytest.mark.faults
def test_an_evaluation_that_takes_longer_but_gets_on(dataset: Path, tmp_path: Path) -> None:
    """The other rank waits for it for longer than the limit, too."""
    slow, whole = tmp_path / "slow", tmp_path / "whole"
    changes = {"evaluation__batch_size": 1, "training__evaluate_every_epochs": 0}
    begin = time.monotonic()
    assert run(arguments(dataset, slow, **STALL, **changes), 2, hook=evaluates_slowly) == [0, 0]
    assert time.monotonic() - begin > 2 * LIMIT
    assert "stalled" not in log_of(slow, 0) + log_of(slow, 1)
    assert run(arguments(dataset, whole, **changes), 2) == [0, 0]
    assert_same(slow, whole)


def hangs_while_it_saves(rank: int) -> None:
    slowed(checkpoint, "_encode", LIMIT / 3)  # of four or more files
    after(TrainLoader, "next_batch", 9, dead_disk)


@pytest.mark.faults
def test_a_checkpoint_that_is_being_written_is_finished(dataset: Path, tmp_path: Path) -> None:
    changes = {"training__evaluate_every_epochs": 0, "training__checkpoint_every_epochs": 0}
    command = arguments(dataset, tmp_path, **STALL, **changes, training__checkpoint_every_steps=7)
    assert run(command, hook=hangs_while_it_saves) == [ExitCode.FAILED]
    (saved,) = checkpoint.entries(tmp_path / "checkpoints")
    assert saved.step == 7 and checkpoint.load(saved.folder).step == 7
    log = log_of(tmp_path, 0)
    assert log.index("stalled: ") < log.index("step 7 saved in")


def hangs_in_its_log(rank: int) -> None:
    """Its main thread keeps the locks of the log: no other thread can write there."""

    def hang() -> None:
        for handler in logging.getLogger("agrivision").handlers:
            handler.acquire()
        dead_disk()

    after(TrainLoader, "next_batch", 8, hang)


@pytest.mark.faults
def test_a_log_that_hangs_does_not_keep_a_rank(
    dataset: Path, tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    command = arguments(dataset, tmp_path, **STALL)
    assert run(command, hook=hangs_in_its_log) == [ExitCode.FAILED]
    assert run(command) == [0]
    assert_same(tmp_path, undisturbed(1))


def test_no_watchdog_where_none_is_wanted(dataset: Path, tmp_path: Path) -> None:
    changes = {"training__max_steps": 2, "training__stall_minutes": "null"}
    assert run(arguments(dataset, tmp_path, **changes), 2, hook=counts_threads) == [0, 0]
    assert samples(tmp_path)


def counts_threads(rank: int) -> None:
    import threading

    def look() -> None:
        names = {thread.name for thread in threading.enumerate()}
        assert not names & {"watchdog", "notes of the ranks"}, names

    after(Trainer, "_agree", 1, look)
