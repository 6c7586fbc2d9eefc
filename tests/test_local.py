"""Launchers on one machine: exit codes, signals, no process left behind, and always the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from agrivision import checkpoint
from agrivision.errors import ExitCode
from launch import local
from tests.ranks import run
from tests.training.runs import arguments, assert_same

ROOT = Path(__file__).parents[1]
PATIENCE = 120.0  # seconds until a process that hangs fails a test


def program(*codes: str) -> list[str]:
    """A command of which each rank runs its own line of Python."""
    lines = ["import os, signal, sys, time", "rank = int(os.environ['RANK'])"]
    lines += [f"if rank == {rank}: {code}" for rank, code in enumerate(codes)]
    return [sys.executable, "-S", "-c", "\n".join(lines)]


WAITS = "time.sleep(1000)"
LEAVES_WHEN_ASKED = f"signal.signal(signal.SIGTERM, lambda *_: os._exit(85)); {WAITS}"


@pytest.mark.parametrize(
    ("codes", "wanted"),
    [
        (["sys.exit(0)"], 0),
        (["sys.exit(0)", "sys.exit(0)", "sys.exit(0)"], 0),
        (["sys.exit(85)", "sys.exit(85)"], 85),
        (["sys.exit(0)", "sys.exit(85)"], 85),
        (["sys.exit(2)", LEAVES_WHEN_ASKED], 2),
        ([LEAVES_WHEN_ASKED, LEAVES_WHEN_ASKED, "sys.exit(86)"], 86),
        ([WAITS, "sys.exit(1)"], 1),
        ([WAITS, "os.kill(os.getpid(), signal.SIGKILL)"], 128 + signal.SIGKILL),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else None,
)
def test_the_code_is_that_of_the_rank_that_failed_first(codes: list[str], wanted: int) -> None:
    before = children(os.getpid())
    assert local.run_ranks(program(*codes), len(codes)) == wanted
    assert children(os.getpid()) == before


def test_a_rank_that_is_stopped_does_not_keep_the_launcher_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local, "_GRACE_SECONDS", 10 * PATIENCE)
    before = children(os.getpid())
    stops = "os.kill(os.getpid(), signal.SIGSTOP)"
    assert local.run_ranks(program(stops, "sys.exit(1)", LEAVES_WHEN_ASKED), 3) == 1
    assert children(os.getpid()) == before


def test_who_waits_for_a_rank_that_was_asked_to_stop_is_asked_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It may have left before the ranks had met."""
    monkeypatch.setattr(local, "_FOLLOW_SECONDS", 0.5)
    late = (
        f"signal.signal(signal.SIGTERM, lambda *_: open({str(tmp_path / 'asked')!r}, 'a').write('x'));"
        " [time.sleep(0.1) for _ in range(30)]; sys.exit(85)"
    )
    begin = time.monotonic()
    assert local.run_ranks(program("time.sleep(1); sys.exit(85)", LEAVES_WHEN_ASKED, late), 3) == 85
    assert time.monotonic() - begin < PATIENCE
    assert (tmp_path / "asked").read_text() == "x"  # once: it may be saving


def test_ranks_know_their_place(tmp_path: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    line = (
        f"open({str(tmp_path)!r} + '/' + str(rank), 'w').write("
        f"' '.join(os.environ[name] for name in {names}))"
    )
    assert local.run_ranks(program(line, line, line), 3) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == [
        f"{r} {r} 3 3" for r in range(3)
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_all_ranks(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    line = (
        f"signal.signal({int(number)}, lambda *_: os._exit(85));"
        f" open({str(tmp_path)!r} + '/' + str(rank), 'w'); {WAITS}"
    )

    def send() -> None:
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    assert local.run_ranks(program(line, line), 2) == ExitCode.STOPPED
    thread.join()
    assert signal.getsignal(number) == before


def test_a_signal_while_the_ranks_are_being_started_reaches_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    popen = subprocess.Popen

    def start_and_be_told(*args: object, **kwargs: object) -> object:
        process = popen(*args, **kwargs)
        if kwargs["env"]["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(local.subprocess, "Popen", start_and_be_told)
    # None has its handler yet; whichever way they end, they end.
    assert local.run_ranks(program(WAITS, WAITS), 2) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    "words", [[], ["--ranks", "2"], ["--ranks", "0", "train"], ["--ranks", "two", "train"]]
)
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        local.main(words)
    assert caught.value.code == ExitCode.BAD_INPUT
    assert "--ranks" in capsys.readouterr().err


def test_interrupted_under_one_launcher_after_another_it_is_the_same_run(
    dataset: Path, tmp_path: Path
) -> None:
    changes = {"training__max_steps": 30, "training__epochs": 10, "training__checkpoint_every_steps": 1}
    changes |= {"monitor__tensorboard": "false", "training__evaluate_every_epochs": 0}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(arguments(dataset, whole, **changes), 2) == [0, 0]
    command = arguments(dataset, broken, **changes)
    local_command = [sys.executable, "-m", "launch.local", "--ranks", "2", *command]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    torchrun += ["-m", "agrivision", *command]

    with started(local_command) as launcher:
        before = wait_for_a_step(broken, after=newest(broken))
        ranks = children(launcher.pid)
        launcher.terminate()
        assert launcher.wait(PATIENCE) == ExitCode.STOPPED
        assert not any(alive(rank) for rank in ranks)
        assert newest(broken) >= before

    with started(torchrun) as launcher:
        before = wait_for_a_step(broken, after=newest(broken) + 4)
        ranks = children(launcher.pid)
        launcher.terminate()
        assert launcher.wait(PATIENCE) != 0  # torchrun has one code for all that is not well
        assert not any(alive(rank) for rank in ranks)
        assert before <= newest(broken) < 30
        checkpoint.load(checkpoint.folders(broken / "checkpoints")[-1])

    assert run(command, 2) == [0, 0]
    assert_same(broken, whole)


@contextmanager
def started(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A command that is running; it and its children are gone after the block, whatever happened."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def newest(run_dir: Path) -> int:
    """The last step that is saved, 0 for none."""
    found = checkpoint.entries(run_dir / "checkpoints")
    return found[-1].step if found else 0


def wait_for_a_step(run_dir: Path, after: int) -> int:
    """Wait until a later step than this one is saved; returns it."""
    wait_for(lambda: newest(run_dir) > after)
    return newest(run_dir)


def wait_for(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)


def children(process: int) -> list[int]:
    """Process ids of the children, in the order of these ids."""
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return sorted(found)


def alive(process: int) -> bool:
    return Path(f"/proc/{process}").exists()
