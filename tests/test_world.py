"""Who a process is among its peers, from an environment given as a dict."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agrivision.errors import ConfigurationError
from agrivision.world import World, ending_file, expand_hosts, tasks_by_node


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


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("", []),
        ("n1", ["n1"]),
        ("gpu[007-009,12],cpu1", ["gpu007", "gpu008", "gpu009", "gpu12", "cpu1"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("a-b[9-11].cluster", ["a-b9.cluster", "a-b10.cluster", "a-b11.cluster"]),
    ],
)
def test_node_lists_are_expanded(nodes: str, hosts: list[str]) -> None:
    assert expand_hosts(nodes) == hosts


@given(st.integers(0, 99_999), st.integers(0, 40), st.integers(1, 6))
def test_a_range_of_nodes_keeps_its_zeros(first: int, more: int, digits: int) -> None:
    names = [f"n{number:0{digits}d}" for number in range(first, first + more + 1)]
    assert expand_hosts(f"n[{names[0][1:]}-{names[-1][1:]}]") == names


def test_the_ranks_of_a_step_are_named_by_their_nodes() -> None:
    world = World.from_environment(slurm())
    assert [world.host(rank) for rank in range(5)] == [
        "rank 0 on gpu007",
        "rank 1 on gpu007",
        "rank 2 on gpu008",
        "rank 3 on gpu008",
        "rank 4 on gpu009",
    ]
    assert world.host(7) == "rank 7"


def test_each_start_of_a_job_has_a_name_of_its_own() -> None:
    first, second = (World.from_environment(slurm(SLURM_RESTART_COUNT=count)) for count in "01")
    third = World.from_environment(slurm(SLURM_RESTART_COUNT="1", SLURM_STEP_ID="1"))
    assert [world.attempt for world in (first, second, third)] == [
        "123456.0.0",
        "123456.1.0",
        "123456.1.1",
    ]


@pytest.mark.parametrize("text", ["two", "2(x", "2(x3)1", "x3"])
def test_tasks_by_node_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="tasks by node"):
        tasks_by_node(text)


@given(st.lists(st.tuples(st.integers(1, 99), st.integers(1, 5)), max_size=6))
def test_tasks_by_node(groups: list[tuple[int, int]]) -> None:
    text = ",".join(f"{tasks}(x{nodes})" if nodes > 1 else str(tasks) for tasks, nodes in groups)
    assert tasks_by_node(text) == [tasks for tasks, nodes in groups for _ in range(nodes)]


def test_where_a_rank_says_how_it_ended() -> None:
    assert ending_file({"AGRIVISION_ENDINGS": "/job/endings", "SLURM_PROCID": "3"}) == (
        "/job/endings/rank-3.json"
    )
    assert ending_file({"AGRIVISION_ENDINGS": "/job/endings"}) == ""
    assert ending_file({"SLURM_PROCID": "3"}) == ""
