"""All checks, one after the other."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from agrivision.doctor.cluster import Wanted, examine_slurm, missing
from agrivision.doctor.data_folder import examine_data
from agrivision.doctor.exchange import examine_exchange
from agrivision.doctor.finding import Finding
from agrivision.doctor.gpus import examine_gpus, read_driver, read_links, read_torch
from agrivision.doctor.machine import examine_node, read_node
from agrivision.doctor.node import examine_on_node
from agrivision.doctor.pace import pace_of
from agrivision.doctor.run_folder import examine_run_folder
from agrivision.doctor.software import examine_software


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What to look at.

    Attributes:
        data: data set, or folder of images; None for none.
        run_dir: folder of a run or of runs; None for none.
        wanted: what jobs will ask for.
        node: whether to run a tiny job.
        wait_seconds: for a node for it.
    """

    data: Path | None = None
    run_dir: Path | None = None
    wanted: Wanted = field(default_factory=Wanted)
    node: bool = False
    wait_seconds: int = 60


def examine(what: Examination) -> Iterator[Finding]:
    """Look at everything, and say each thing as soon as it is known.

    Args:
        what: to look at.
    """
    yield from examine_software()
    gpus = yield from _torch()
    yield from examine_node(read_node(), gpus)
    no_slurm = missing()
    shared = no_slurm is None
    written = None
    if what.run_dir is not None:
        written = yield from examine_run_folder(what.run_dir, shared=shared)
    if what.data is not None:
        yield from examine_data(what.data, gpus=gpus, shared=shared)
    if no_slurm is not None:
        yield no_slurm
        return
    yield from examine_slurm(what.wanted, pace_of(what.run_dir, written))
    if what.node:
        folders = [what.run_dir if what.run_dir is not None else Path.cwd()]
        yield from examine_on_node(what.wanted, folders, what.data, wait_seconds=what.wait_seconds)


def _torch() -> Generator[Finding, None, int]:
    """What stands on torch; returns the number of GPUs."""
    try:
        torch = read_torch()
    except (ImportError, OSError):  # it has been named above
        return 0
    driver = read_driver()
    yield from examine_gpus(torch, driver, read_links() if len(torch.gpus) > 1 else "")
    yield from examine_exchange(len(torch.gpus), os.environ)
    return len(torch.gpus)
