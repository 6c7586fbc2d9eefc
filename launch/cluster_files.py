"""What a cluster of one's own is made of: options, Slurm's programs, an address, ports, its files."""

from __future__ import annotations

import os
import pwd
import random
import shutil
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from agrivision.errors import BadInput

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue", "scancel")

_FIRST_PORT, _PORTS = 10_000, 10_000  # the ranks of jobs meet on ports above these
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LEAST = {"nodes": 1, "cpus": 1, "memory_mb": 1, "requeue_wait": 5, "min_job_age": 2}


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """What the cluster is like.

    Attributes:
        nodes: how many, called n1, n2, …
        cpus: of each node, whatever this machine has.
        memory_mb: of each node, in MiB, whatever this machine has.
        gpus: of each node; invented, but handed out in CUDA_VISIBLE_DEVICES as real ones are.
        preempt_send_user_signal: preemption begins with the signal of `--signal` instead of SIGTERM.
        job_requeue: whether jobs may be requeued.
        slurmd_timeout: seconds after which a node that does not answer is lost.
        kill_wait: seconds between SIGTERM and SIGKILL at a job's end.
        grace_time: seconds that the partitions `preempt` and `cancelp` give before that.
        min_job_age: seconds for which an ended job is remembered.
        requeue_wait: seconds, 5 or more, that a requeued job waits; Slurm adds one, and its own default
            is 120.
        any_interface: start also where this machine's name is not that of its loopback. Whoever can
            reach the machine can then run commands as this user.
    """

    nodes: int = 4
    cpus: int = 4
    memory_mb: int = 4000
    gpus: int = 2
    preempt_send_user_signal: bool = False
    job_requeue: bool = True
    slurmd_timeout: int = 15
    kill_wait: int = 5
    grace_time: int = 20
    min_job_age: int = 3600
    requeue_wait: int = 5
    any_interface: bool = False

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < _LEAST.get(name, 0):
                raise BadInput(f"a cluster's {name} is at least {_LEAST.get(name, 0)}, not {value}")

    @property
    def node_names(self) -> list[str]:
        """The names of the nodes: n1, n2 and so on."""
        return [f"n{number}" for number in range(1, self.nodes + 1)]


def find_programs() -> dict[str, str]:
    """Slurm's programs by name: in PATH, or where Debian keeps its daemons.

    Raises:
        BadInput: some are missing.
    """
    folders = [*filter(None, os.environ.get("PATH", "").split(os.pathsep)), "/usr/sbin"]
    found = {name: shutil.which(name, path=os.pathsep.join(folders)) for name in PROGRAMS}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise BadInput(
            f"Slurm is not on this machine ({', '.join(missing)} missing): "
            "install Debian's packages slurmctld, slurmd and slurm-client, or another build of it"
        )
    return {name: path for name, path in found.items() if path is not None}


def find_address(*, any_interface: bool) -> str | None:
    """The loopback address of this machine's name, which Slurm listens on; None for all interfaces.

    Raises:
        BadInput: there is none, and all interfaces are not wanted.
    """
    name = socket.gethostname()
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(name, None, socket.AF_INET)]
    except OSError:
        found = []
    if found and all(address.startswith("127.") for address in found):
        return found[0]
    if any_interface:
        return None
    raise BadInput(
        f"this machine's name {name!r} is not one of 127.0.0.1, and Slurm would listen to the network, "
        f"without passwords: add '127.0.0.1 {name}' to /etc/hosts, or allow it by any_interface"
    )


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on, below those that outgoing connections get."""
    try:
        end = int(_EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError):
        end = _FIRST_PORT + _PORTS
    end = min(end, _FIRST_PORT + _PORTS)
    candidates = list(range(max(1024, end - _PORTS), end))
    random.SystemRandom().shuffle(candidates)  # clusters that start together look in different places
    with ExitStack() as stack:
        ports: list[int] = []
        for port in candidates:
            if len(ports) == count:
                break
            endpoint = stack.enter_context(socket.socket())
            try:
                endpoint.bind(("", port))
            except OSError:
                continue
            ports.append(port)
    if len(ports) < count:
        raise BadInput(f"this machine has no {count} free TCP ports below {end}")
    return ports


def slurm_conf(folder: Path, options: ClusterOptions, address: str | None, ports: Sequence[int]) -> str:
    """The configuration, complete: nothing comes from /etc.

    Args:
        folder: of everything that the daemons write.
        options: what the cluster is like.
        address: of loopback; None listens on all interfaces.
        ports: one for the controller, and one for each node.
    """
    user, loopback = _user(), address or "127.0.0.1"
    gpus = f" Gres=gpu:{options.gpus}" if options.gpus else ""
    settings: Mapping[str, object] = {
        "ClusterName": "agrivision",
        "SlurmctldHost": f"localhost({loopback})",
        "SlurmctldPort": ports[0],
        "CommunicationParameters": "NoCtldInAddrAny,NoInAddrAny" if address else "NoAddrCache",
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthType": "auth/none",
        "CredType": "cred/none",
        "AuthInfo": f"cred_expire={options.requeue_wait}",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool-%n",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "%n.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "%n.log",
        "JobCompType": "jobcomp/filetxt",
        "JobCompLoc": folder / "jobs.txt",
        "MailProg": "/bin/true",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "SlurmdParameters": "config_overrides",  # more CPUs and memory than there are
        "SchedulerParameters": "bf_interval=1,sched_interval=1,sched_min_interval=0",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "JobRequeue": int(options.job_requeue),
        # Not 2: a node that somebody set down would be back at once, and get its job again while the
        # ranks there still save: that is "already running", and the job is held.
        "ReturnToService": 1,
        "KillWait": options.kill_wait,
        "SlurmdTimeout": options.slurmd_timeout,
        "MinJobAge": options.min_job_age,
    }
    if options.preempt_send_user_signal:
        settings = {**settings, "SlurmctldParameters": "preempt_send_user_signal"}
    if gpus:
        settings = {**settings, "GresTypes": "gpu"}
    nodes = [
        f"NodeName={name} NodeHostname=localhost NodeAddr={loopback} Port={port} "
        f"CPUs={options.cpus} RealMemory={options.memory_mb}{gpus}"
        for name, port in zip(options.node_names, ports[1:], strict=True)
    ]
    grace = f"GraceTime={options.grace_time}"
    partitions = [
        "PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=OFF",
        f"PartitionName=preempt Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE {grace}",
        f"PartitionName=cancelp Nodes=ALL PriorityTier=1 PreemptMode=CANCEL {grace}",
        "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF",
    ]
    lines = [f"{name}={value}" for name, value in settings.items()]
    return "\n".join([*lines, *nodes, *partitions, ""])


def gres_conf(folder: Path, options: ClusterOptions) -> str:
    """The nodes' GPUs: links to a character device, for Slurm takes no regular file."""
    if not options.gpus:
        return ""
    files = f"{folder}/gpu[0-{options.gpus - 1}]"
    return "".join(f"NodeName={name} Name=gpu File={files}\n" for name in options.node_names)


def _user() -> str:
    """The current user's name, or number where it has no name, as in some containers."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
