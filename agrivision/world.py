"""Who this process is among the ranks: the only reader of the launcher's environment variables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from agrivision.errors import ConfigurationError

Launcher = Literal["none", "torchrun", "slurm"]

# Linux hands out 32768-60999 to outgoing connections; a port under that cannot be taken by accident.
_FIRST_PORT, _PORTS = 20_000, 12_000


@dataclass(frozen=True, kw_only=True)
class World:
    """The place of one process in a run.

    Attributes:
        rank: 0 … size - 1, unique over all nodes; rank 0 writes what only one may write.
        size: number of processes in the run.
        local_rank: 0 … local_size - 1 on this node.
        local_size: processes of the run on this node.
        master_address: host that the ranks meet at.
        master_port: TCP port there.
        launcher: what started the process.
        rendezvous_file: file that the ranks of one node meet at instead of a port; empty for none.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    master_address: str = "127.0.0.1"
    master_port: int = 29_400
    launcher: Launcher = "none"
    rendezvous_file: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ConfigurationError(f"rank {self.rank} does not exist in a world of {self.size}")
        if not 0 <= self.local_rank < self.local_size <= self.size:
            raise ConfigurationError(
                f"local rank {self.local_rank} of {self.local_size} does not fit a world of {self.size}"
            )

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0 of the whole run (not of the node)."""
        return self.rank == 0

    @property
    def rendezvous(self) -> str:
        """How the ranks find one another, as the `init_method` of torch.distributed."""
        if self.rendezvous_file:
            return f"file://{self.rendezvous_file}"
        if self.launcher == "torchrun":
            return "env://"  # torchrun's own store is open already
        return f"tcp://{self.master_address}:{self.master_port}"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """Read torchrun's variables, else those of a Slurm step, else be alone.

        A batch script without `srun` also sees SLURM_NTASKS and SLURM_PROCID=0; only a step has
        SLURM_STEP_ID, so that a plain `python` inside `sbatch` is one process, not rank 0 of many.

        Args:
            environment: usually `os.environ`; a test passes a dict.

        Raises:
            ConfigurationError: a variable is missing or not a number.
        """
        if "RANK" in environment and "WORLD_SIZE" in environment:
            return cls._from_torchrun(environment)
        if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
            return cls._from_slurm(environment)
        return cls()

    @classmethod
    def _from_torchrun(cls, environment: Mapping[str, str]) -> World:
        size = _integer(environment, "WORLD_SIZE")
        return cls(
            rank=_integer(environment, "RANK"),
            size=size,
            local_rank=_integer(environment, "LOCAL_RANK", default=0),
            local_size=_integer(environment, "LOCAL_WORLD_SIZE", default=1 if size == 1 else None),
            master_address=environment.get("MASTER_ADDR", "127.0.0.1"),
            master_port=_integer(environment, "MASTER_PORT", default=29_400),
            launcher="torchrun",
            rendezvous_file=environment.get("AGRIVISION_RENDEZVOUS_FILE", ""),
        )

    @classmethod
    def _from_slurm(cls, environment: Mapping[str, str]) -> World:
        size = _integer(environment, "SLURM_STEP_NUM_TASKS", default=1)
        job = _integer(environment, "SLURM_JOB_ID", default=0)
        nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
        return cls(
            rank=_integer(environment, "SLURM_PROCID"),
            size=size,
            local_rank=_integer(environment, "SLURM_LOCALID", default=0),
            local_size=_tasks_on_node(environment, size),
            master_address=environment.get("MASTER_ADDR") or _first_host(nodes),
            master_port=_integer(environment, "MASTER_PORT", default=_FIRST_PORT + job % _PORTS),
            launcher="slurm",
        )


def _integer(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None:
        if default is None:
            raise ConfigurationError(
                f"the environment variable {name} is missing: start the ranks with torchrun or srun"
            )
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigurationError(f"the environment variable {name} is {text!r}, not a number") from None


def _tasks_on_node(environment: Mapping[str, str], size: int) -> int:
    """This node's entry of SLURM_STEP_TASKS_PER_NODE, which reads like `2(x3),1`."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE")
    if text is None:
        return size
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ConfigurationError(
                f"the environment variable SLURM_STEP_TASKS_PER_NODE is {text!r}, not like '2(x3),1'"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    node = _integer(environment, "SLURM_NODEID", default=0)
    return counts[node] if node < len(counts) else counts[-1]


def _first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `gpu[007-009,12],cpu1` begins with `gpu007`."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes)
    if match is None:
        return "127.0.0.1"
    return f"{match[1]}{match[2] or ''}{match[3]}"
