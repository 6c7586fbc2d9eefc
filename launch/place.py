"""Where in the cluster the batch side of a job is: what Slurm says of its nodes and ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from agrivision.errors import BadInput
from agrivision.world import expand_hosts, tasks_by_node


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process is.

    Attributes:
        job: id by which Slurm's commands know the job: `17`, or `17_3` in an array.
        raw_job: SLURM_JOB_ID, which differs from it in an array.
        task: in an array, else None.
        restart: how often the job was requeued before.
        nodes: names.
        tasks_per_node: ranks on each node.
        cpus_per_task: for each rank; 0: srun decides.
        overcommit: there are fewer CPUs than ranks.
    """

    job: str
    raw_job: str
    task: int | None
    restart: int
    nodes: tuple[str, ...]
    tasks_per_node: int
    cpus_per_task: int = 0
    overcommit: bool = False

    @property
    def tasks(self) -> int:
        """Ranks on all nodes."""
        return len(self.nodes) * self.tasks_per_node

    @property
    def ranks(self) -> tuple[str, ...]:
        """Each rank as a message names it: `rank 3 on n2`."""
        return tuple(
            f"rank {rank} on {self.nodes[rank // self.tasks_per_node]}" for rank in range(self.tasks)
        )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Place:
        """Read the variables that Slurm sets in a batch script.

        Raises:
            BadInput: this is no Slurm job, or its nodes have different numbers of ranks.
        """
        raw = environment.get("SLURM_JOB_ID", "")
        if not raw:
            raise BadInput(
                "this is the batch side of a Slurm job: submit it with sbatch, or use launch"
            )
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        each, cpus = _tasks_per_node(environment), environment.get("SLURM_CPUS_PER_TASK", "")
        asked = each == _asked(environment)
        # Ranks that were not asked for share what one task of Slurm's on the node would have.
        share = 0 if asked else _fewest_cpus(environment) // each
        return cls(
            job=f"{array}_{task}" if array and task else raw,
            raw_job=raw,
            task=int(task) if task else None,
            restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
            nodes=tuple(expand_hosts(environment.get("SLURM_JOB_NODELIST", ""))),
            tasks_per_node=each,
            cpus_per_task=int(cpus) if asked and cpus.isdigit() else share,
            overcommit=not asked and each > 1 and share == 0,
        )


def _tasks_per_node(environment: Mapping[str, str]) -> int:
    """Ranks on each node: as many as were asked for, else one for each GPU, else one."""
    own, gpus = (
        environment.get("AGRIVISION_RANKS_PER_NODE", ""),
        environment.get("SLURM_GPUS_ON_NODE", ""),
    )
    if own and not (own.isdigit() and int(own)):
        raise BadInput(f"the environment variable AGRIVISION_RANKS_PER_NODE is {own!r}, not a number")
    if own:
        return int(own)
    asked = _asked(environment)
    if "SLURM_NTASKS_PER_NODE" not in environment and asked in (None, 1) and gpus.isdigit():
        return int(gpus) or 1
    return asked or 1


def _asked(environment: Mapping[str, str]) -> int | None:
    """Tasks on each node, as sbatch was told; None where it was not, and Slurm counts CPUs perhaps."""
    told = environment.get("SLURM_NTASKS_PER_NODE", "")
    if told.isdigit():
        return int(told)
    if "SLURM_NTASKS" not in environment:
        return None
    counts = set(tasks_by_node(environment.get("SLURM_TASKS_PER_NODE", "")))
    if len(counts) > 1:
        raise BadInput("the nodes have different numbers of tasks: ask for them with --ntasks-per-node")
    return counts.pop() if counts else None


def _fewest_cpus(environment: Mapping[str, str]) -> int:
    """CPUs of the job on the node that has the fewest."""
    return min(tasks_by_node(environment.get("SLURM_JOB_CPUS_PER_NODE", "")), default=0)
