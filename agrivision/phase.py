"""What this process is doing, and since when: for a profile, and for whoever asks why nothing moves.

A phase is a piece of the main thread's work that has a name: `wait for data`, `backward`, `evaluate`.
Phases lie within one another; the innermost is what the process is at.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch.profiler import record_function


@dataclass(frozen=True)
class Phase:
    """A piece of work.

    Attributes:
        name: as it stands in a profile and in what a watchdog says.
        since: `time.monotonic()` of its beginning, or of the end of the last one within it.
    """

    name: str
    since: float


_OUTSIDE = "start up"
_entered: list[Phase] = [Phase(_OUTSIDE, time.monotonic())]


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Say that the main thread is at this while the block runs; other threads must not."""
    _entered.append(Phase(name, time.monotonic()))
    try:
        with record_function(f"agrivision: {name}"):
            yield
    finally:
        _entered.pop()
        moved()


def moved() -> None:
    """Say that the work within the phase has got on, where nothing else would for long."""
    _entered[-1] = Phase(_entered[-1].name, time.monotonic())


def current() -> Phase:
    """What the main thread is at; any thread may ask."""
    return _entered[-1]
