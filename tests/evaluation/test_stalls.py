"""`evaluate` and `tune` on ranks of which one hangs: it is named, with its stack, and all leave."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from agrivision.errors import BadInput, ExitCode
from agrivision.evaluation import evaluate
from agrivision.inference import tuning
from agrivision.inference.scoring import evaluate_run
from agrivision.phase import WAITING
from tests.heard import Ending, hear

LIMIT = 6.0  # seconds; a healthy batch takes a hundredth of one, and this machine may be busy
MINUTES = ["--stall_minutes", str(LIMIT / 60)]


def dead_disk(*_: Any, **__: Any) -> Any:
    time.sleep(3600)


def hangs(rank: int) -> None:
    if rank == 1:
        evaluate._predict = dead_disk


def hangs_alone(_: int) -> None:
    evaluate._predict = dead_disk


def loses_its_messages(_: int) -> None:
    def deafen(*_: Any, **__: Any) -> None:
        torch.distributed.all_reduce = dead_disk

    original = evaluate._Found.sum
    evaluate._Found.sum = lambda *words: (deafen(), original(*words))[1]


def hangs_in_a_choice(rank: int) -> None:
    if rank == 1:
        tuning.first_wins = dead_disk


def takes_long(_: int) -> None:
    """Longer than the limit altogether, but not at one tile."""
    original = evaluate._predict

    def slowly(*words: Any, **more: Any) -> Any:
        time.sleep(LIMIT / 4)
        return original(*words, **more)

    evaluate._predict = slowly


def stalls(endings: list[Ending]) -> list[str]:
    """What was said of why, each line once by the rank that speaks."""
    text = [line for ending in endings for line in ending.err]
    return [line.partition("stalled: ")[2] for line in text if "stalled: " in line]


@pytest.mark.parametrize("command", ["evaluate", "tune"])
def test_a_rank_that_hangs_is_named_with_its_stack(
    command: str, trained: Path, dataset: Path, tmp_path: Path
) -> None:
    words = [command, *(["--checkpoint"] if command == "evaluate" else []), trained, "--data", dataset]
    endings = hear([*words, "--json", tmp_path / "scores.json", *MINUTES], 2, hook=hangs)
    assert [ending.code for ending in endings] == [ExitCode.FAILED] * 2, endings
    (line,) = stalls(endings)
    assert re.match(r"rank 1 on \S+ \(process \d+\) has been in 'evaluate' for \d+ s", line)
    assert any("in dead_disk" in line for line in endings[1].err), endings[1]
    assert not any("in dead_disk" in line for line in endings[0].err), endings[0]
    assert not (tmp_path / "scores.json").exists()


def test_one_process_that_hangs(trained: Path, dataset: Path) -> None:
    words = ["evaluate", "--checkpoint", trained, "--data", dataset, *MINUTES]
    (ending,) = hear(words, hook=hangs_alone)
    assert ending.code == ExitCode.FAILED, ending
    assert len(stalls([ending])) == 1 and any("in dead_disk" in line for line in ending.err), ending


def test_a_sum_that_never_ends(trained: Path, dataset: Path) -> None:
    words = ["evaluate", "--checkpoint", trained, "--data", dataset, *MINUTES]
    endings = hear(words, 2, hook=loses_its_messages)
    assert [ending.code for ending in endings] == [ExitCode.FAILED] * 2, endings
    (line,) = stalls(endings)
    assert line.startswith("a collective does not end: all 2 ranks")
    assert line.endswith(f"s, in '{WAITING}'")
    assert any("in dead_disk" in line for line in endings[0].err), endings[0]


def test_a_rank_that_hangs_while_it_chooses(trained: Path, dataset: Path) -> None:
    endings = hear(["tune", trained, "--data", dataset, *MINUTES], 2, hook=hangs_in_a_choice)
    assert [ending.code for ending in endings] == [ExitCode.FAILED] * 2, endings
    (line,) = stalls(endings)
    assert re.match(r"rank 1 on \S+ \(process \d+\) has been in 'choose' for \d+ s", line)
    assert any("in dead_disk" in line for line in endings[1].err), endings[1]
    assert not (trained / "postprocessing.json").exists()


def test_what_takes_long_but_gets_on_is_left_alone(trained: Path, dataset: Path) -> None:
    words = ["evaluate", "--checkpoint", trained, "--data", dataset, "--batch_size", "1", *MINUTES]
    endings = hear(words, 2, hook=takes_long)
    assert [ending.code for ending in endings] == [0, 0], endings
    assert not stalls(endings)


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_minutes_that_nobody_can_wait(minutes: float, trained: Path, dataset: Path) -> None:
    with pytest.raises(BadInput, match="stall_minutes is"):
        evaluate_run(trained, dataset, "val", stall_minutes=minutes)
