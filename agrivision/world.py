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
PORTS = range(20_000, 32_000)


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
        rendezvous_seconds: how long a rank waits for the others.
        hosts: name of each rank's node, as far as the launcher says; for messages.
        job: Slurm's id of the job, empty outside of one; a requeued job keeps it.
        restart: how often the job was requeued before.
        step_id: of the job's step.
        earlier_jobs: jobs that have ended, and whose run this one goes on with.
        job_dir: folder of the job, shared by its nodes; empty for none.
        signal_seconds: how long before its time limit the job is warned; 0: not known.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    master_address: str = "127.0.0.1"
    master_port: int = 29_400
    launcher: Launcher = "none"
    rendezvous_file: str = ""
    rendezvous_seconds: float = 300.0
    hosts: tuple[str, ...] = ()
    job: str = ""
    restart: int = 0
    step_id: int = 0
    earlier_jobs: tuple[str, ...] = ()
    job_dir: str = ""
    signal_seconds: int = 0

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
    def one_node(self) -> bool:
        """Whether all ranks are on one node."""
        return self.local_size == self.size

    @property
    def rendezvous(self) -> str:
        """How ranks that share no folder find one another: the `init_method` of torch.distributed."""
        if self.rendezvous_file:
            return f"file://{self.rendezvous_file}"
        if self.launcher == "torchrun":
            return "env://"  # torchrun's own store is open already
        return f"tcp://{self.master_address}:{self.master_port}"

    @property
    def attempt(self) -> str:
        """Names this start of this job, also among its requeued starts: `17.2.0`."""
        return f"{self.job}.{self.restart}.{self.step_id}"

    def host(self, rank: int) -> str:
        """A rank as a message names it: `rank 3 on n2`."""
        return f"rank {rank} on {self.hosts[rank]}" if rank < len(self.hosts) else f"rank {rank}"

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
        counts = tasks_by_node(environment.get("SLURM_STEP_TASKS_PER_NODE", "")) or [size]
        node = _integer(environment, "SLURM_NODEID", default=0)
        names = expand_hosts(nodes)
        return cls(
            rank=_integer(environment, "SLURM_PROCID"),
            size=size,
            local_rank=_integer(environment, "SLURM_LOCALID", default=0),
            local_size=counts[node] if node < len(counts) else counts[-1],
            master_address=environment.get("MASTER_ADDR") or (names[0] if names else "127.0.0.1"),
            master_port=_integer(environment, "MASTER_PORT", default=PORTS[job % len(PORTS)]),
            launcher="slurm",
            rendezvous_seconds=_integer(environment, "AGRIVISION_RENDEZVOUS_SECONDS", default=300),
            # Slurm fills node after node unless told otherwise.
            hosts=tuple(name for name, count in zip(names, counts, strict=False) for _ in range(count)),
            job=environment.get("SLURM_JOB_ID", ""),
            restart=_integer(environment, "SLURM_RESTART_COUNT", default=0),
            step_id=_integer(environment, "SLURM_STEP_ID", default=0),
            earlier_jobs=tuple(environment.get("AGRIVISION_EARLIER_JOBS", "").split()),
            job_dir=environment.get("AGRIVISION_JOB_DIR", ""),
            signal_seconds=_integer(environment, "AGRIVISION_SIGNAL_SECONDS", default=0),
        )


def ending_file(environment: Mapping[str, str] = os.environ) -> str:
    """Where this rank says how it ended, for the batch side of its job; empty where nobody asks."""
    folder, rank = environment.get("AGRIVISION_ENDINGS", ""), environment.get("SLURM_PROCID", "")
    return f"{folder}/rank-{rank}.json" if folder and rank.isdigit() else ""


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


def tasks_by_node(text: str) -> list[int]:
    """What Slurm writes as `2(x3),1`, as one number for each node.

    Raises:
        ConfigurationError: it is not written like that.
    """
    counts: list[int] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ConfigurationError(
                f"Slurm's number of tasks by node reads {text!r}, not like '2(x3),1'"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def expand_hosts(nodes: str) -> list[str]:
    """The hosts of a Slurm node list, in its order: `gpu[007-008],cpu1` → gpu007, gpu008, cpu1.

    Slurm itself would say (`scontrol show hostnames`), but a container seldom has its commands.
    """
    found: list[str] = []
    for entry in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        names = [""]
        for text, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", entry):
            endings = [text] if text else [name for part in ranges.split(",") for name in _span(part)]
            names = [name + ending for name in names for ending in endings]
        found += names
    return found


def _span(text: str) -> list[str]:
    """`007-009` → 007, 008, 009; `12` → 12."""
    first, _, last = text.partition("-")
    if not (first.isdigit() and (last or first).isdigit()):
        return [text]
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]


def expand_variables(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """A path with `$NAME` and `${NAME}` replaced by the environment's values; nothing else is special.

    Args:
        text: as in the configuration.
        environment: usually `os.environ`; a test passes a dict.

    Raises:
        ConfigurationError: a variable is not set, or empty.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not environment.get(name):
            raise ConfigurationError(f"the environment variable {name} of {text!r} is not set here")
        return environment[name]

    return re.sub(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", value, text, flags=re.ASCII)
