"""Runs commands as ranks in processes of their own, and disturbs them at chosen moments.

The processes are forked from a server that has imported torch already: a rank starts in a tenth of a
second instead of four.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_CONTEXT = multiprocessing.get_context("forkserver")
# torch._dynamo and torch._inductor: the first optimiser imports them, which takes seconds.
_CONTEXT.set_forkserver_preload(
    [
        "agrivision.cli",
        "agrivision.training.run",
        "agrivision.inference.scoring",
        "torch._dynamo",
        "torch._inductor.standalone_compile",
    ]
)

Moment = Literal["forward", "backward done", "step done", "saving", "renaming", "evaluating"]


@dataclass(frozen=True)
class Disturbance:
    """A signal that a rank sends itself.

    Attributes:
        number: of the signal.
        moment: where in the work.
        count: at the how-manieth time that this moment comes, 1 for the first.
        rank: which rank.
    """

    number: signal.Signals
    moment: Moment
    count: int
    rank: int = 0


def run(
    argv: Sequence[str],
    ranks: int = 1,
    *,
    disturbance: Disturbance | None = None,
    hook: Callable[[int], None] | None = None,
    timeout: float = 120,
) -> list[int]:
    """Run a command of agrivision on some ranks; returns their exit codes, negative for a signal.

    Args:
        argv: what follows `agrivision`.
        ranks: how many processes.
        disturbance: applied in one of them.
        hook: a function of a module, called with the rank in each process before the command.
        timeout: seconds after which a rank that hangs fails the test.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            mine = disturbance if disturbance is not None and disturbance.rank == rank else None
            environment = _environment(rank, ranks, Path(folder)) if ranks > 1 else {}
            process = _CONTEXT.Process(target=_child, args=(list(argv), environment, rank, mine, hook))
            process.start()
            processes.append(process)
        for process in processes:
            process.join(timeout)
        hanging = [process for process in processes if process.is_alive()]
        for process in hanging:
            process.kill()
            process.join()
        assert not hanging, f"{len(hanging)} of {ranks} ranks hang"
        return [process.exitcode for process in processes]


def _environment(rank: int, ranks: int, folder: Path) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "AGRIVISION_RENDEZVOUS_FILE": str(folder / "rendezvous"),
    }


def _child(
    argv: list[str],
    environment: dict[str, str],
    rank: int,
    disturbance: Disturbance | None,
    hook: Callable[[int], None] | None,
) -> None:
    from agrivision.data import staging

    os.environ.update(environment)
    staging.RESERVED_SHARE = 0.0  # how full this machine's disk is, is no part of a test
    if disturbance is not None:
        _install(disturbance)
    if hook is not None:
        hook(rank)
    from agrivision.cli import main

    sys.exit(main(argv))


def _install(disturbance: Disturbance) -> None:
    """Wrap the function that stands for the moment, so that the signal comes before it runs."""
    from agrivision import checkpoint
    from agrivision.evaluation import evaluate
    from agrivision.training.trainer import Trainer

    owner, name = {
        "forward": (Trainer, "_backward"),
        "backward done": (Trainer, "_agree"),
        "step done": (Trainer, "_fetch"),
        "saving": (checkpoint, "_encode"),
        "renaming": (checkpoint, "sync_tree"),
        "evaluating": (evaluate, "_predict"),
    }[disturbance.moment]
    original = getattr(owner, name)
    calls = 0

    def disturbed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == disturbance.count:
            os.kill(os.getpid(), disturbance.number)
        return original(*args, **kwargs)

    setattr(owner, name, disturbed)
