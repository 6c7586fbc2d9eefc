"""The node itself: cores, memory, descriptors, as far as this process may use them."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from agrivision.doctor.finding import Finding, Topic

_MACHINE = Topic("Machine")
_GIB = 1 << 30
# docs/performance.md: one modern core decodes for a GPU that trains 340 images a second; the program,
# NCCL and the driver take the others.
_CORES_FOR_GPU = 3
# A copy of the largest network's state is 0.5 GB, torch with CUDA 3 GB, and batches are decoded ahead.
_ENOUGH_MEMORY, _LEAST_MEMORY = 8 * _GIB, 3 * _GIB
# The loader keeps an eighth of them as shards, up to 256; libraries and connections need a hundred.
_ENOUGH_FILES, _LEAST_FILES = 1024, 256


@dataclass(frozen=True, kw_only=True)
class Node:
    """What a process may use of its node.

    Attributes:
        cores: that it may run on.
        all_cores: of the node.
        quota: cores' worth of time that its control group allows; None for no limit.
        threads: that OMP_NUM_THREADS asks of torch; None where it is not set.
        memory: bytes, of the node or of the control group, whichever is less.
        files: that it may have open.
        most_files: up to which it may raise that itself.
    """

    cores: int
    all_cores: int
    quota: float | None
    threads: int | None
    memory: int
    files: int
    most_files: int


def read_node(environment: Mapping[str, str] = os.environ) -> Node:
    """What this process may use."""
    quota, limit = control_group(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup"))
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    threads = environment.get("OMP_NUM_THREADS", "").partition(",")[0]
    files, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Node(
        cores=len(os.sched_getaffinity(0)),
        all_cores=os.cpu_count() or 1,
        quota=quota,
        threads=int(threads) if threads.isdigit() else None,
        memory=physical if limit is None else min(limit, physical),
        files=_limit(files),
        most_files=_limit(most_files),
    )


def _limit(value: int) -> int:
    return 1 << 20 if value == resource.RLIM_INFINITY else value


def control_group(membership: str, root: Path) -> tuple[float | None, int | None]:
    """Cores' worth of time and bytes of memory that the control groups of a process allow.

    Args:
        membership: content of /proc/self/cgroup.
        root: where control groups are mounted.
    """
    quotas: list[float] = []
    limits: list[int] = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(",") if controllers else ["", "unified"]:
            # A container sees its own group as the root, whatever its name is outside.
            own = [root / name / path.lstrip("/"), *(root / name / path.lstrip("/")).parents]
            for folder in (each for each in own if each.is_relative_to(root)):
                quotas += _quota(folder)
                limits += _memory(folder)
    return min(quotas, default=None), min(limits, default=None)


def _quota(folder: Path) -> list[float]:
    text = _read(folder / "cpu.max") or " ".join(
        [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
    )
    words = text.split()
    if len(words) != 2 or not all(word.isdigit() for word in words):  # `max`, or -1
        return []
    return [int(words[0]) / int(words[1])]


def _memory(folder: Path) -> list[int]:
    texts = (_read(folder / name) for name in ("memory.max", "memory.limit_in_bytes"))
    return [int(text) for text in texts if text.isdigit()]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def examine_node(node: Node, gpus: int) -> Iterator[Finding]:
    """Whether a node has what its ranks need.

    Args:
        node: what this process may use of it.
        gpus: that it sees; one rank for each.
    """
    ranks = max(1, gpus)
    yield _cores(node, ranks)
    threads = node.threads
    if threads is not None and threads * ranks > node.cores:
        yield _MACHINE.careful(
            f"OMP_NUM_THREADS is {threads}, and {node.cores} cores are for {ranks} ranks",
            f"export OMP_NUM_THREADS={max(1, node.cores // ranks)}",
        )
    yield _MACHINE.graded(
        node.memory,
        ranks * _ENOUGH_MEMORY,
        ranks * _LEAST_MEMORY,
        f"{node.memory / _GIB:.0f} GiB of memory for {ranks} {_ranks(ranks)}",
        f"ask for {ranks * _ENOUGH_MEMORY // _GIB} GiB or more (--mem); else smaller batches",
    )
    yield _files(node)


def _cores(node: Node, ranks: int) -> Finding:
    usable = node.cores if node.quota is None else min(node.cores, node.quota)
    allowed = (
        "" if node.quota is None or node.quota >= node.cores else f", worth {node.quota:.1f} of time"
    )
    what = f"{node.cores} of {node.all_cores} cores{allowed}"
    if ranks == 1 and node.quota is not None and math.ceil(node.quota) < node.cores:
        return _MACHINE.careful(
            what, f"more threads than {max(1, int(node.quota))} only wait: set OMP_NUM_THREADS"
        )
    if usable >= ranks:
        wanted = _CORES_FOR_GPU * ranks if ranks > 1 else 1
        return _MACHINE.graded(
            usable,
            wanted,
            ranks,
            what,
            f"ask for {_CORES_FOR_GPU} cores a GPU or more (--cpus-per-task)",
        )
    return _MACHINE.bad(
        f"{what} for {ranks} ranks", f"ask for {_CORES_FOR_GPU} cores a GPU (--cpus-per-task)"
    )


def _files(node: Node) -> Finding:
    what = f"{node.files} files may be open at once"
    if node.most_files > node.files:
        advice = f"ulimit -n {min(node.most_files, 4096)}, in the job too: Slurm hands the limit on"
    else:
        advice = "ask for a higher limit (`nofile` in limits.conf, or of the container)"
    return _MACHINE.graded(node.files, _ENOUGH_FILES, _LEAST_FILES, what, advice)


def _ranks(count: int) -> str:
    return "rank" if count == 1 else "ranks"
