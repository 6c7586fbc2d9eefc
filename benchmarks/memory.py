"""L8: what twenty epochs do to the memory, and what a loader leaves behind when it is killed.

Memory is the resident set of the process and all that it started, at the end of each epoch; the growth
is the slope of a least-squares line, as a share of its mean. Then each loader is killed with SIGKILL in
the middle of its work, as the kernel does when memory runs out, and after some seconds it is looked
which of its processes still run, and what lies in /dev/shm and in its temporary folder.

    python -m benchmarks.memory
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import Report, confine, family, fresh, missing, parser, say
from benchmarks.contestants import CONTESTANTS, OURS
from benchmarks.contestants.samples import WORKERS
from benchmarks.data import Data, add_options, make

PEERS = ("folder", "webdataset-tuned", "mosaicml-tuned", "litdata-tuned")
SHARED = Path("/dev/shm")  # noqa: S108 - this is what is looked at
_LOADING = "loading"
_MOSAICML = re.compile(r"\d{6}_\w+")  # how its names in /dev/shm look


def resident(pid: int) -> float:
    """MiB that a process and all that it started keep in memory; what they share counts once."""
    kibibytes = 0
    for one in family(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{one}/smaps_rollup").read_text("utf-8").splitlines():
                if line.startswith("Pss:"):
                    kibibytes += int(line.split()[1])
    return kibibytes / 1024


def epochs(name: str, data: Data, number: int) -> list[float]:
    """MiB at the end of each of some epochs."""
    confine(WORKERS)
    torch.set_num_threads(1)
    tiles = len(data.reader)
    batches, done = CONTESTANTS[name].batches(data), 0
    sizes: list[float] = []
    while len(sizes) < number:
        done += len(next(batches)[0])
        if done >= tiles * (len(sizes) + 1):
            sizes.append(resident(os.getpid()))
    return sizes


def growth(sizes: Sequence[float]) -> float:
    """Per cent of the mean by which memory grows an epoch: the slope of a least-squares line.

    The first epoch fills caches and pools, and is left out.
    """
    later = np.asarray(sizes[1:])
    slope = np.polyfit(np.arange(len(later)), later, 1)[0]
    return float(100 * slope / later.mean())


@dataclass(frozen=True, kw_only=True)
class Left:
    """What a killed loader left behind.

    Attributes:
        processes: that still ran.
        shared: names in /dev/shm.
        temporary: names in its temporary folder.
    """

    processes: int
    shared: int
    temporary: int

    @property
    def things(self) -> int:
        """All together."""
        return self.processes + self.shared + self.temporary


def kill(name: str, options: Sequence[str], patience: float) -> Left:
    """Kill a loader in the middle of its work, and look what is left after some seconds."""
    before = set(SHARED.iterdir())
    with tempfile.TemporaryDirectory() as temporary, tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, "-m", "benchmarks.memory", "--load", name, *options]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=said,  # workers whose parent was killed have much to say
            text=True,
            env=os.environ | {"TMPDIR": temporary},
            start_new_session=True,
        )
        assert process.stdout is not None
        if process.stdout.readline().strip() != _LOADING:
            said.seek(0)
            raise RuntimeError(f"{name} ended before it delivered batches: {said.read()[-2000:]}")
        started = family(process.pid)[1:]
        process.kill()
        process.wait()
        process.stdout.close()
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and any(map(_runs, started)):
            time.sleep(0.1)
        left = Left(
            processes=sum(map(_runs, started)),
            shared=len(set(SHARED.iterdir()) - before),
            temporary=sum(1 for _ in Path(temporary).rglob("*")),
        )
        for pid in filter(_runs, started):
            os.kill(pid, signal.SIGKILL)
    for path in set(SHARED.iterdir()) - before:
        if _MOSAICML.fullmatch(path.name):  # it would be in the way of its next run
            path.unlink()
    return left


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"  # ended, and only its parent has not asked yet


def load(name: str, data: Data) -> None:
    """Load until killed; says so after some batches."""
    batches = CONTESTANTS[name].batches(data)
    for number, _ in enumerate(batches):
        if number == 8:
            print(_LOADING, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the tables."""
    parsed = add_options(parser(__doc__))
    parsed.add_argument("--epochs", type=int, default=20, help="to watch the memory (default 20)")
    parsed.add_argument("--peers", action="store_true", help="watch the peers' memory, too: minutes")
    parsed.add_argument("--load", metavar="NAME", help="only load, to be killed")
    chosen = parsed.parse_args(argv)
    peers = [name for name in PEERS if not missing(*CONTESTANTS[name].needs)]
    formats = {form for name in peers for form in CONTESTANTS[name].formats}
    data = make(chosen, tuple(formats))
    if chosen.load:
        load(chosen.load, data)
        return
    report = Report("Memory", chosen, ("webdataset", "mosaicml-streaming", "litdata"))
    for name in PEERS:
        if lacking := missing(*CONTESTANTS[name].needs):
            report.left_out(CONTESTANTS[name].title, lacking)
    number = 4 if chosen.quick else chosen.epochs
    grown = {}
    for name in (OURS, *(peers if chosen.peers else [])):
        say(f"{number} epochs: {name}")
        sizes = fresh(epochs, name, data, number)
        grown[name] = (growth(sizes), sizes)
    where = ["--folder", str(chosen.folder), *(["--quick"] if chosen.quick else [])]
    where += ["--source", chosen.source] if chosen.source else []
    where += ["--dataset", chosen.dataset] if chosen.dataset else []
    left = {}
    for name in (OURS, *peers):
        say(f"killing {name}")
        left[name] = kill(name, where, patience=12.0)  # torch's workers look every five seconds
    report.header = [
        "loader",
        "MiB after the first epoch",
        "after the last",
        "growth an epoch",
        "left: processes",
        f"in {SHARED}",
        "temporary files",
    ]
    for name, found in left.items():
        sizes = grown[name][1] if name in grown else []
        report.rows.append(
            [
                CONTESTANTS[name].title,
                *([sizes[0], sizes[-1], f"{grown[name][0]:+.3f} %"] if sizes else ["", "", ""]),
                found.processes,
                found.shared,
                found.temporary,
            ]
        )
    what = f"growth an epoch, over {number} epochs"
    report.goal("L8", what, abs(grown[OURS][0]), at_most=1.0, unit="%")
    report.goal("L8", "left behind after SIGKILL", left[OURS].things, at_most=0, unit="things")
    report.notes.append("Memory is the proportional set size of the process and all that it started.")
    report.notes.append(
        "What appears in /dev/shm meanwhile counts: nothing else may run that makes files there."
    )
    report.finish()


if __name__ == "__main__":
    main()
