"""Runs a module as `python -m` does, but disturbed: `python hooks.py slow=0.1,crash=7 -m agrivision …`.

slow=S      every step takes S seconds more
first=S     the same, but only until the job is requeued
crash=N     the step after step N raises an error that nobody foresaw
memory=N    after step N rank 1 has no memory left
leave=N     until the job is requeued, rank 1 ends after step N, with exit code 0, as if it were done
freeze=N    until the job is requeued, a rank stops (SIGSTOP) after step N: rank 1, or what rank=R says
hold=N      the same, but it keeps the interpreter's lock
deaf=N      until the job is requeued, the ranks' sum after step N never ends
linger=S    saving and evaluating begin with S seconds of nothing, and a file that says so: see `moment`
batch=S     so does every batch of a prediction; its file is `task 1 batch 3-0`
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from agrivision.training.preemption import StopRequest

MOMENTS = "AGRIVISION_TEST_MOMENTS"


def moment(name: str, restart: int) -> str:
    """The file that an attempt makes in the folder MOMENTS when it begins with `saving`, …"""
    return f"{name}-{restart}"


def disturb(hooks: dict[str, float]) -> None:
    """Wrap what is to be disturbed; torch is imported when the handlers of signals are there."""
    listen = StopRequest.listen

    def listen_then_wrap(self: StopRequest) -> StopRequest:
        listen(self)
        StopRequest.listen = listen  # type: ignore[method-assign]
        _wrap(hooks, int(os.environ.get("SLURM_RESTART_COUNT", "0")))
        return self

    StopRequest.listen = listen_then_wrap  # type: ignore[method-assign]


def _wrap(hooks: dict[str, float], restart: int) -> None:
    import torch

    from agrivision import checkpoint
    from agrivision.evaluation import evaluate
    from agrivision.inference.trained import TrainedModel
    from agrivision.training.trainer import Trainer

    batches = count(1)
    slow = hooks.get("slow", 0) + (0 if restart else hooks.get("first", 0))

    def at_step(trainer: Trainer, *_: Any) -> None:
        step, rank = trainer.progress.step, trainer._ranks.world.rank
        time.sleep(slow)
        if step == hooks.get("crash"):
            raise RuntimeError("invented")
        if step == hooks.get("memory") and rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 1 has …")
        if step == hooks.get("leave") and rank == 1 and not restart:
            os._exit(0)
        if step == hooks.get("freeze") and rank == hooks.get("rank", 1) and not restart:
            os.kill(os.getpid(), signal.SIGSTOP)
        if step == hooks.get("hold") and rank == hooks.get("rank", 1) and not restart:
            hold_the_lock()
        if step == hooks.get("deaf") and not restart:
            torch.distributed.all_reduce = never_ends

    def linger(name: str) -> Callable[..., None]:
        def wait(*_: Any) -> None:
            if "linger" in hooks:
                mark(name, hooks["linger"])

        return wait

    def at_batch(*_: Any) -> None:
        if "batch" in hooks:
            task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
            mark(f"task {task} batch {next(batches)}", hooks["batch"])

    def mark(name: str, seconds: float) -> None:
        Path(os.environ[MOMENTS], moment(name, restart)).touch()
        time.sleep(seconds)

    _before(Trainer, "_accumulate", at_step)
    _before(checkpoint, "_encode", linger("saving"))
    _before(evaluate, "_predict", linger("evaluating"))
    _before(TrainedModel, "probabilities", at_batch)


def hold_the_lock() -> None:
    """Sleep as a library does that does not know of Python's threads."""
    ctypes.PyDLL(None).sleep(3600)


def never_ends(*_: Any, **__: Any) -> None:
    """What a collective does whose messages are lost."""
    time.sleep(3600)


def _before(owner: Any, name: str, act: Callable[..., None]) -> None:
    """Let something be done before a function, with its positional arguments."""
    original: Callable[..., Any] = getattr(owner, name)

    def wrapped(*arguments: Any, **more: Any) -> Any:
        act(*arguments)
        return original(*arguments, **more)

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    pairs = (word.split("=") for word in sys.argv[1].split(","))
    disturb({name: float(value) for name, value in pairs})
    sys.argv[:] = sys.argv[3:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
