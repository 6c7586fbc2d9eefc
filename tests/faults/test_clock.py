"""Clocks that jump, and names that fall into one second."""

from __future__ import annotations

import signal
import time
from functools import partial
from pathlib import Path

import pytest

from agrivision.errors import ExitCode
from tests.ranks import Disturbance, run
from tests.training.runs import arguments, assert_same
from tests.training.test_resume import curves

pytestmark = pytest.mark.faults


def jump(rank: int, start: float, by: float) -> None:
    """A clock that begins somewhere, and jumps at each look."""
    now = [start]

    def clock() -> float:
        now[0] += by
        return now[0]

    time.time = clock


@pytest.mark.row(34)
@pytest.mark.parametrize(
    "clocks",
    [
        [(1e9, 0.0)] * 3,  # all within one second
        [(2e9, -3600.0), (1e9, -3600.0), (5e8, -3600.0)],  # each node is behind the one before
        [(1e9, 7e7), (3e9, -7e7), (0.0, 0.25)],
    ],
    ids=["one second", "backwards", "wild"],
)
def test_a_clock_that_jumps_changes_nothing(
    clocks: list[tuple[float, float]], dataset: Path, tmp_path: Path
) -> None:
    """Neither bits nor curves, nor which attempt and which event file is the later one."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(arguments(dataset, whole)) == [0]
    command = arguments(dataset, broken, training__checkpoint_every_minutes=1)
    for (start, by), number in zip(clocks, [signal.SIGTERM, signal.SIGKILL, None], strict=True):
        disturbance = number and Disturbance(number, "forward", count=7)
        codes = {None: 0, signal.SIGTERM: ExitCode.STOPPED, signal.SIGKILL: -signal.SIGKILL}
        hook = partial(jump, start=start, by=by)
        assert run(command, disturbance=disturbance, hook=hook) == [codes[number]]
    assert_same(broken, whole)
    assert curves(broken / "tensorboard") == curves(whole / "tensorboard")
