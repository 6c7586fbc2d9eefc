"""Who a process is, from an environment given as a dict."""

from __future__ import annotations

import pytest

from agrivision.errors import ConfigurationError
from agrivision.world import World


def test_alone() -> None:
    assert World.from_environment({}) == World()


def test_torchrun() -> None:
    world = World.from_environment(
        {
            "RANK": "5",
            "WORLD_SIZE": "8",
            "LOCAL_RANK": "1",
            "LOCAL_WORLD_SIZE": "4",
            "MASTER_ADDR": "n1",
            "MASTER_PORT": "12345",
        }
    )
    assert (world.rank, world.size, world.local_rank, world.local_size) == (5, 8, 1, 4)
    assert world.rendezvous == "env://"
    assert not world.is_main


def slurm(**changes: str) -> dict[str, str]:
    step = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "2",
        "SLURM_STEP_NUM_TASKS": "5",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
        "SLURM_STEP_NODELIST": "gpu[007-009]",
        "SLURM_JOB_ID": "123456",
    }
    return step | changes


def test_slurm_step() -> None:
    world = World.from_environment(slurm())
    assert (world.rank, world.size, world.local_rank, world.local_size) == (2, 5, 0, 2)
    assert world.master_address == "gpu007"
    assert 20_000 <= world.master_port < 32_000
    assert World.from_environment(slurm(SLURM_NODEID="2", SLURM_PROCID="4")).local_size == 1


def test_a_batch_script_without_srun_is_alone() -> None:
    assert World.from_environment({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == World()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[3,5-7]", "n3"),
        ("a[01-02]-ib,b3", "a01-ib"),
        ("", "127.0.0.1"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert World.from_environment(slurm(SLURM_STEP_NODELIST=nodes)).master_address == first


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "rank 2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE"),
        (slurm(SLURM_STEP_TASKS_PER_NODE="two"), "tasks by node reads 'two'"),
    ],
)
def test_wrong_variables_are_named(environment: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        World.from_environment(environment)
