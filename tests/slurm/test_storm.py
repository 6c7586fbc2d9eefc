"""A job that goes through a storm, by Slurm's own means, ends with the bits of an undisturbed run.

The invariant mode: the job takes two to four nodes, whatever there is when it starts again.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.cluster import Cluster
from tests.slurm import jobs
from tests.slurm.runs import SLOW, References, Run, hook, rank_pids, train

INVARIANT: dict[str, Any] = {
    "training__epochs": 50,  # a rank on a lost node goes on for half a minute
    "training__evaluate_every_epochs": 10,
    "training__invariant": "true",
    "training__micro_batch_size": 2,
    "data__batch_size": 8,  # five steps an epoch
    "evaluation__batch_size": 1,
}
FAULTS = 6
_PATIENCE = 150.0  # seconds until the job runs again


def test_weather_is_a_function_of_its_seed() -> None:
    assert weather(5) == weather(5)
    assert {name for seed in range(40) for name, _ in weather(seed)} == set(STRIKES)
    assert all(len({name for name, _ in weather(seed)}) == FAULTS for seed in range(40))


@pytest.mark.faults
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1])
def test_a_storm(
    seed: int,
    cluster: Cluster,
    dataset: Path,
    tmp_path: Path,
    references: References,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hook(monkeypatch, slow=SLOW)
    options = ["--partition=preempt", "--nodes=2-4", "--cpus-per-task=4"]
    run = train(cluster, dataset, tmp_path / "run", options, **INVARIANT)
    for name, steps in weather(seed):
        run.reach(max(run.steps, default=0) + steps)
        begun = len(run.attempts)
        STRIKES[name](run)
        if name != "the controller is restarted":
            run.wait(lambda begun=begun: len(run.attempts) > begun, _PATIENCE, f"after: {name}")
        mend(cluster)
    assert run.end(400) == "COMPLETED", run.log
    run.assert_whole(references.get(**INVARIANT))
    assert len({attempt.tasks for attempt in run.attempts}) > 1, "always as many ranks"


def weather(seed: int) -> list[tuple[str, int]]:
    """What strikes, and after how many more steps."""
    chance = random.Random(seed)
    return [(name, chance.randint(2, 8)) for name in chance.sample(sorted(STRIKES), FAULTS)]


def signalled(run: Run) -> None:
    run.cluster.run("scancel", "--signal=USR1", run.number)


def requeued(run: Run) -> None:
    run.cluster.run("scontrol", "requeue", run.number)


def preempted(run: Run) -> None:
    jobs.preempt(run.cluster, run.number)


def one_rank_killed(run: Run) -> None:
    os.kill(max(rank_pids(run).values()), signal.SIGKILL)


def all_ranks_killed(run: Run) -> None:
    for pid in rank_pids(run).values():
        os.kill(pid, signal.SIGKILL)


def node_down(run: Run) -> None:
    run.cluster.set_node(run.attempts[-1].nodes[-1], "down", "the storm says so")


def node_lost(run: Run) -> None:
    """Its rank goes on, and must not write any more once there is another attempt."""
    run.cluster.kill_node(run.attempts[-1].nodes[-1])


def controller_restarted(run: Run) -> None:
    run.cluster.kill_controller()
    run.cluster.start_controller()


STRIKES: dict[str, Callable[[Run], None]] = {
    "a signal": signalled,
    "requeued": requeued,
    "preempted": preempted,
    "one rank killed": one_rank_killed,
    "all ranks killed": all_ranks_killed,
    "a node is set down": node_down,
    "a node is lost": node_lost,
    "the controller is restarted": controller_restarted,
}


def mend(cluster: Cluster) -> None:
    """Bring back what a strike has taken down."""
    for node, state in cluster.states().items():
        if not cluster.runs(node):
            cluster.start_node(node)
        elif state.startswith("down"):
            cluster.set_node(node, "resume", "the storm goes on")
