"""Runs a module as `python -m` does, but disturbed: `python hooks.py slow=0.1,crash=7 -m agrivision …`.

slow=S      every step takes S seconds more
crash=N     the step after step N raises an error that nobody foresaw
leave=N     rank 1 ends after step N, with exit code 0, as if it were done
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from collections.abc import Callable
from typing import Any

from agrivision.training.preemption import StopRequest


def disturb(hooks: dict[str, float]) -> None:
    """Wrap what each step begins with; torch is imported when the handlers of signals are there."""
    listen = StopRequest.listen

    def listen_then_wrap(self: StopRequest) -> StopRequest:
        listen(self)
        from agrivision.training.trainer import Trainer

        original: Callable[..., Any] = Trainer._accumulate

        def accumulate(trainer: Trainer, *arguments: Any) -> Any:
            requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
            time.sleep(hooks.get("slow", 0) + (0 if requeued else hooks.get("first", 0)))
            if trainer.progress.step == hooks.get("crash"):
                raise RuntimeError("invented")
            if trainer.progress.step == hooks.get("leave") and trainer._ranks.world.rank == 1:
                os._exit(0)
            return original(trainer, *arguments)

        Trainer._accumulate = accumulate  # type: ignore[method-assign]
        return self

    StopRequest.listen = listen_then_wrap  # type: ignore[method-assign]


if __name__ == "__main__":
    pairs = (word.split("=") for word in sys.argv[1].split(","))
    disturb({name: float(value) for name, value in pairs})
    sys.argv[:] = sys.argv[3:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
