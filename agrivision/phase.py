"""What this process is at, and whether it gets on: for a profile, and for who asks why nothing moves.

A phase is a piece of the main thread's work that has a name: `wait for data`, `backward`, `evaluate`.
Phases lie within one another; the innermost is what the process is at.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch.profiler import record_function

WAITING = "wait for the other ranks"  # all ranks enter it equally often, in the same order
_OUTSIDE = "start up"


@dataclass(frozen=True, kw_only=True)
class State:
    """What the main thread is at.

    Attributes:
        name: of the innermost phase, as it stands in a profile and in what a watchdog says.
        moves: another number whenever the work has got on.
        meetings: how often the process has begun to wait for the other ranks.
        spent: seconds in each phase so far, without those in the phases within it.
    """

    name: str
    moves: int
    meetings: int
    spent: Mapping[str, float]


class _Diary:
    """The main thread writes it, any thread may read it."""

    def __init__(self) -> None:
        self.names = [_OUTSIDE]
        self.meetings = 0
        self.moves = 0
        self._numbers = itertools.count(1)
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._since = time.monotonic()

    def turn(self) -> None:
        """Book the time up to now to the phase that is left for another."""
        now = time.monotonic()
        self._spent[self.names[-1]] += now - self._since
        self._since = now
        self.move()

    def move(self) -> None:
        self.moves = next(self._numbers)

    def spent(self) -> dict[str, float]:
        # The main thread may turn a page meanwhile: then the last seconds count a moment later.
        spent = dict(self._spent)
        name, since = self.names[-1], self._since
        spent[name] = spent.get(name, 0.0) + time.monotonic() - since
        return spent


_diary = _Diary()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Say that the main thread is at this while the block runs; other threads must not."""
    _diary.turn()
    _diary.names.append(name)
    _diary.meetings += name == WAITING
    try:
        with record_function(f"agrivision: {name}"):
            yield
    finally:
        _diary.turn()
        _diary.names.pop()


def moved() -> None:
    """Say that the work has got on, where no phase would begin or end for long; any thread may."""
    _diary.move()


def current() -> State:
    """What the main thread is at; any thread may ask."""
    return State(
        name=_diary.names[-1], moves=_diary.moves, meetings=_diary.meetings, spent=_diary.spent()
    )
