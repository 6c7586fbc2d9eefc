"""Ranks find one another without names or ports that can be trusted, or say who is missing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import pytest

import tests.ranks  # noqa: F401 - has torch in the memory that the ranks are forked from
from agrivision.world import PORTS, World

CONTEXT = multiprocessing.get_context("forkserver")
JOB = 4321
FIRST_PORT = PORTS[JOB % len(PORTS)]


class Rank(NamedTuple):
    """A process that meets the others, and what it says: a line when it listens, one at its end."""

    process: BaseProcess
    output: Connection

    def said(self) -> tuple[int | None, str]:
        """The exit code, and the last line."""
        line = self.output.recv() if self.output.poll(120) else "nothing"
        self.process.join(60)
        return self.process.exitcode, line


def start(folder: Path, rank: int, size: int, *, nodes: str, seconds: int = 60) -> Rank:
    """Start a rank as Slurm would, each on a node of its own; it listens to signals by then."""
    variables = {
        "SLURM_JOB_ID": str(JOB),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_TASKS_PER_NODE": f"1(x{size})",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(rank),
        "AGRIVISION_RENDEZVOUS_SECONDS": str(seconds),
    }
    ours, its = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=meet, args=(variables, folder, its))
    process.start()
    its.close()
    assert ours.poll(120) and ours.recv() == "listening"
    return Rank(process, ours)


def meet(variables: dict[str, str], folder: Path, output: Connection) -> None:
    """What a rank does: it meets the others and adds up their numbers."""
    from agrivision.training.preemption import StopRequest

    stop = StopRequest().listen()
    output.send("listening")
    import torch

    from agrivision.distributed import connected
    from agrivision.errors import AgrivisionError

    os.environ.update(variables)
    world = World.from_environment()
    try:
        with connected(world, torch.device("cpu"), folder, lambda: stop.made) as ranks:
            output.send(str(int(ranks.sum(torch.tensor(world.rank + 1)))))
    except AgrivisionError as error:
        output.send(str(error))
        raise SystemExit(int(error.exit_code)) from None


@pytest.mark.row(31)
@pytest.mark.row(32)
def test_names_that_do_not_resolve_and_a_port_that_is_taken(tmp_path: Path) -> None:
    with pytest.raises(socket.gaierror):
        socket.gethostbyname("n1.invalid")
    with socket.socket() as other:
        other.bind(("0.0.0.0", FIRST_PORT))
        other.listen()
        ranks = [start(tmp_path, rank, 2, nodes="n1.invalid,n2.invalid") for rank in range(2)]
        assert [rank.said() for rank in ranks] == [(0, "3"), (0, "3")]
    assert not list(tmp_path.glob(".rendezvous*"))


def ports_of(process: int) -> set[int]:
    """The ports at which a process listens."""
    folder = Path(f"/proc/{process}/fd")
    sockets = {str(each.readlink()) for each in folder.iterdir() if each.is_symlink()}
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]
    ]
    return {
        int(row[1].rpartition(":")[2], 16)
        for row in rows
        if row[3] == "0A" and f"socket:[{row[9]}]" in sockets
    }


def stay(rank: int, file: Path, output: Connection) -> None:
    """A rank that meets the other, and says when it is through, and what it then still hears."""
    import torch

    from agrivision.distributed import connected

    world = World(rank=rank, size=2, local_rank=rank, local_size=2, rendezvous_file=str(file))
    with connected(world, torch.device("cpu")) as ranks:
        assert ranks.store is not None
        ranks.sum(torch.tensor(1))
        output.send("met")
        output.recv()
        ranks.store.set(f"note {rank}", f"of {rank}")
        total = int(ranks.sum(torch.tensor(rank + 1)))
        output.send(f"{total} {ranks.store.get(f'note {1 - rank}').decode()}")
        output.recv()


def test_the_port_is_closed_once_all_have_met(tmp_path: Path) -> None:
    file = tmp_path / "rendezvous"
    pipes = [CONTEXT.Pipe() for _ in range(2)]
    ranks = [
        CONTEXT.Process(target=stay, args=(rank, file, its)) for rank, (_, its) in enumerate(pipes)
    ]
    for rank in ranks:
        rank.start()
    for ours, _ in pipes:
        assert ours.poll(120) and ours.recv() == "met"
    for rank in ranks:
        assert rank.pid is not None
        # Gloo's own sockets remain, at ports that the kernel chose.
        assert not ports_of(rank.pid) & set(PORTS)
    assert not file.exists()
    for ours, _ in pipes:
        ours.send("go on")
    for rank, (ours, _) in enumerate(pipes):
        assert ours.poll(120) and ours.recv() == f"3 of {1 - rank}"
        ours.send("leave")
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0


def test_missing_ranks_are_named(tmp_path: Path) -> None:
    ranks = [start(tmp_path, rank, 3, nodes="n[1-3]", seconds=3) for rank in (0, 2)]
    main, other = (rank.said() for rank in ranks)
    assert main == (1, "waited 3 s for 1 of 3 ranks (rank 1 on n2): see the job's log for them")
    assert other[0] == 1
    assert "rank 0 to see all the others" in other[1] or "lost the other ranks" in other[1]


def test_a_missing_rank_0_is_named(tmp_path: Path) -> None:
    code, line = start(tmp_path, 1, 2, nodes="n[1-2]", seconds=1).said()
    assert code == 1
    assert line.startswith("waited 1 s for rank 0 on n1, which says where it listens in")


def test_asked_to_stop_while_waiting(tmp_path: Path) -> None:
    rank = start(tmp_path, 0, 2, nodes="n[1-2]")
    assert rank.process.pid is not None
    os.kill(rank.process.pid, signal.SIGTERM)
    assert rank.said() == (85, "asked to stop before the ranks had met: nothing to save yet")
