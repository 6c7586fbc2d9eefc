"""Inside of a rank: faults that strike at named moments, and gauges that are read at every step.

`python -m tests.storm.chaos PLAN -m agrivision train …` runs a rank as `python -m agrivision train …`
does; `python -m tests.storm.chaos --ranks N PLAN …` starts N of them with the launcher of this machine.

A rank that meets the moment of the fault whose turn it is writes down what it is at, and sends the
signals itself: nobody has to aim from outside, and what was never hit is seen.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.abc
import json
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agrivision.training.preemption import StopRequest
from tests.storm.weather import START, Fault, Moment

_WRAPPED: dict[Moment, tuple[str, str]] = {
    "claiming": ("agrivision.fence", "write_atomically"),
    "loading": ("agrivision.checkpoint", "_decode"),
    "forgetting": ("agrivision.training.record", "detach"),
    "forward": ("agrivision.training.trainer", "Trainer._backward"),
    "backward done": ("agrivision.training.trainer", "Trainer._agree"),
    "adding up": ("agrivision.training.invariant", "CanonicalGradients.finish"),
    "optimiser": ("agrivision.training.optimizer", "Optimizer.step"),
    "average": ("agrivision.training.ema", "WeightAverage.update"),
    "step done": ("agrivision.training.trainer", "Trainer._fetch"),
    "copying": ("agrivision.snapshot", "Snapshot.finish"),
    "saving": ("agrivision.checkpoint", "_encode"),
    "writing": ("agrivision.checkpoint", "_write"),
    "syncing": ("agrivision.checkpoint", "sync_tree"),
    "renamed": ("agrivision.checkpoint", "sync_folder"),
    "tidying": ("agrivision.checkpoint", "tidy"),
    "removing": ("shutil", "rmtree"),
    "evaluating": ("agrivision.evaluation.evaluate", "_predict"),
    "scored": ("agrivision.training.record", "Record.evaluated"),
    "drawing": ("agrivision.training.loop", "draw_panels"),
}
# The moment comes when the function has ended, and before anything else is done.
_AFTERWARDS: dict[Moment, tuple[str, str]] = {"renaming": _WRAPPED["syncing"]}


@dataclass(frozen=True)
class Plan:
    """What happens to an attempt, and where it is written down.

    Attributes:
        folder: of the attempt's notes.
        faults: one after the other.
    """

    folder: Path
    faults: tuple[Fault, ...]

    @property
    def file(self) -> Path:
        return self.folder / "plan.json"

    @property
    def strikes(self) -> Path:
        """One row for each fault that has struck."""
        return self.folder / "strikes.jsonl"

    def gauges(self, rank: int) -> Path:
        """One row for each step of a rank, and one before the first."""
        return self.folder / f"gauges-{rank}.jsonl"

    @property
    def pids(self) -> Path:
        """A file for each process of a rank that has begun, named after it."""
        return self.folder / "pids"

    def write(self) -> Path:
        self.pids.mkdir(parents=True)
        self.file.write_text(json.dumps([asdict(fault) for fault in self.faults]))
        return self.file

    @classmethod
    def read(cls, file: Path) -> Plan:
        faults = json.loads(file.read_text())
        return cls(
            file.parent, tuple(Fault(**row | {"signals": tuple(row["signals"])}) for row in faults)
        )


def rows(file: Path) -> list[dict[str, Any]]:
    """The whole rows of a file of notes; none where nobody has written."""
    if not file.exists():
        return []
    lines = file.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def note(file: Path, row: dict[str, Any]) -> None:
    """Append a row in one piece; it outlives the process."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, f"{json.dumps(row)}\n".encode())
    finally:
        os.close(descriptor)


class Chaos:
    """The faults of one rank's process."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self._plan, self._rank = plan, rank
        self._trainer: Any = None
        self._one = threading.Lock()  # checkpoints are written by a thread of their own
        (plan.pids / str(os.getpid())).touch()

    def meet(self, moment: Moment) -> None:
        """The process is at this moment: strike, if that is whose turn it is."""
        if all(fault.moment != moment or fault.rank != self._rank for fault in self._plan.faults):
            return
        with self._one:
            turn = len(rows(self._plan.strikes))
            if turn == len(self._plan.faults):
                return
            fault = self._plan.faults[turn]
            due = moment in START or self._step >= fault.step
            if fault.moment == moment and fault.rank == self._rank and due:
                self._strike(fault)

    def _strike(self, fault: Fault) -> None:
        row = {"pid": os.getpid(), "step": self._step, "phase": _phase(), "time": time.time()}
        note(self._plan.strikes, row)
        others = [int(path.name) for path in self._plan.pids.iterdir()] if fault.everybody else []
        for name in fault.signals:
            for pid in sorted(others, key=lambda pid: pid == os.getpid()) or [os.getpid()]:
                _send(pid, signal.Signals[name])

    @property
    def _step(self) -> int:
        return -1 if self._trainer is None else int(self._trainer.progress.step)

    def install(self) -> None:
        """Wrap the functions that stand for the moments, and the step that the gauges are read at."""
        for moment, place in _WRAPPED.items():
            self._wrap(place, before=moment)
        for moment, place in _AFTERWARDS.items():
            self._wrap(place, after=moment)
        if "RANK" in os.environ:
            self._wrap(("torch.distributed", "init_process_group"), before="meeting")
        from agrivision.training.trainer import Trainer

        original = Trainer._fetch

        def fetch(trainer: Any) -> Any:
            self._trainer = trainer
            self._gauge()
            return original(trainer)

        Trainer._fetch = fetch  # type: ignore[assignment, method-assign]

    def _wrap(
        self, place: tuple[str, str], *, before: Moment | None = None, after: Moment | None = None
    ) -> None:
        owner: Any = importlib.import_module(place[0])
        *outer, name = place[1].split(".")
        for attribute in outer:
            owner = getattr(owner, attribute)
        original: Callable[..., Any] = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                self.meet(before)
            answer = original(*args, **kwargs)
            if after is not None:
                self.meet(after)
            return answer

        setattr(owner, name, wrapped)

    def _gauge(self) -> None:
        """What this process holds between two steps."""
        status = Path("/proc/self/status").read_text().splitlines()
        fields = {key: value.split() for key, _, value in (line.partition(":") for line in status)}
        row = {
            "pid": os.getpid(),
            "step": self._step,
            "kib": int(fields["VmRSS"][0]),
            "threads": int(fields["Threads"][0]),
            "files": len(os.listdir("/proc/self/fd")) - 1,  # noqa: PTH208 - one is the listing's own
            "shared": "/dev/shm/" in Path("/proc/self/maps").read_text(),
        }
        note(self._plan.gauges(self._rank), row)


def _phase() -> str:
    module = sys.modules.get("agrivision.phase")  # it imports torch
    return "imports" if module is None else str(module.current().name)


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it has ended already
        return


class _Importing(importlib.abc.MetaPathFinder):
    """Hears when torch is looked for, and finds nothing."""

    def __init__(self, chaos: Chaos) -> None:
        self._chaos = chaos

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "torch._tensor":  # in the midst of it
            self._chaos.meet("importing")


def in_forked(file: Path, rank: int) -> None:
    """In a rank that was forked with everything imported: from now on faults strike.

    Args:
        file: of the plan.
        rank: of this process.
    """
    Chaos(Plan.read(file), rank).install()


def _as_rank(file: Path, words: Sequence[str]) -> None:
    """Be `python -m agrivision …`, disturbed."""
    chaos = Chaos(Plan.read(file), int(os.environ.get("RANK", "0")))
    chaos.meet("starting")
    sys.meta_path.insert(0, _Importing(chaos))
    listen = StopRequest.listen

    def listen_then_install(self: StopRequest) -> StopRequest:
        listen(self)
        if "agrivision.cli" in sys.modules:  # the command's own; before, nothing may import torch
            chaos.install()
        return self

    StopRequest.listen = listen_then_install  # type: ignore[method-assign]
    sys.argv[:] = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def main(argv: Sequence[str]) -> int:
    """Be a rank, or the launcher of some."""
    parser = argparse.ArgumentParser(prog="python -m tests.storm.chaos")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("plan", type=Path)
    parser.add_argument("words", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    if args.ranks is None:
        _as_rank(args.plan, args.words[1:])
        return 0
    from launch.local import run_ranks

    rank = [sys.executable, "-m", "tests.storm.chaos", str(args.plan), "-m", "agrivision", *args.words]
    return run_ranks(rank, args.ranks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
