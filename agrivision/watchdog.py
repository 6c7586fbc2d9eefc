"""A thread in every rank: the rank that hangs is named, and the attempt ends, to be tried again.

Every few seconds a rank says what its main thread is at (`agrivision.heartbeat`). Rank 0 reads what all
say, judges, and gives its word, which the others read; where that stays the same for too long, it is
rank 0 that is named. When the run has stood still for too long, every rank writes the stacks of all
its threads into its log, the stack of who hangs goes to rank 0's log too, and all leave with the exit
code for "try again". A rank that is stopped, or whose interpreter is held, cannot leave: its launcher
ends it when the others have gone.

Nothing here waits for a device, nor without end for a disk or a store. Time in which the process did
not run at all (a job that Slurm had suspended) does not count.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Self

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from agrivision.ending import report_stall
from agrivision.errors import BadInput, ExitCode
from agrivision.heartbeat import MISSED, Beat, Heard, Straggler, Verdict, find_straggler, judge, table
from agrivision.notes import Notes
from agrivision.phase import WAITING, current
from agrivision.stacks import began, compiling, kernel_view, stacks
from agrivision.world import World

_MOST_MINUTES = 1e8  # more, and timers overflow
_BEATS = 60  # in the time that a rank may be quiet
_LONGEST_PERIOD = 10.0
_STRETCHES = 3  # in that time, in each of which a straggler is looked for
_TELL_SECONDS = 10.0  # for lines to reach a disk that may be the one that hangs
_HEAR_SECONDS = 10.0  # for the stacks of another rank
_SAVE_SECONDS = 15.0  # for a checkpoint that is being written: the launcher soon kills who is left
_PART_SECONDS = 1.0
_SAVING = "save step"  # how the names of such threads begin

_EXCHANGES = {WAITING, "backward", "wait for the device"}  # gradients travel during `backward`
_STEP = ("train", "wait for data", "augment", "forward", "loss", "optimiser")
_LAUNCHES = {"train", "augment", "forward", "loss", "optimiser"}  # where a GPU takes no more work

_WORD, _PART = "word of rank 0", "all has been told"
_POLL_SECONDS = 0.05

log = logging.getLogger(__name__)


class Watchdog:
    """Watches this rank, and on rank 0 all of them; use it in a `with` statement, in the main thread.

    Args:
        world: this rank among them.
        minutes: that a rank may be at one thing without getting on; None watches nothing.

    Attributes:
        minutes: as given.

    Raises:
        BadInput: so many minutes cannot be waited for.
    """

    def __init__(self, world: World, minutes: float | None) -> None:
        if minutes is not None and not 0 < minutes <= _MOST_MINUTES:
            bounds = f"more than 0 and at most {_MOST_MINUTES:g}, or null for no watchdog"
            raise BadInput(f"stall_minutes is {minutes:g}: it must be {bounds}")
        self.minutes = minutes
        self._limit = 60.0 * (minutes or 0.0)
        self._period = min(self._limit / _BEATS, _LONGEST_PERIOD)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        if minutes is not None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._pulse = _Pulse(world, 2 * self._period)
        self._circle = _Circle(world, self._limit, self._period)
        self._world = world
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            self._file.close()

    @contextmanager
    def among(self, store: Store | None) -> Iterator[None]:
        """Hear of the other ranks while the block runs.

        Args:
            store: that all are connected to, on a connection for this alone; None with one rank.
        """
        if self._thread is None or store is None:
            yield
            return
        wanted = range(self._world.size) if self._world.is_main else (0,)
        with Notes(store, [_WORD, *map(_beat_of, wanted)], self._period) as notes:
            self._circle.notes = notes
            try:
                yield
            finally:
                self._circle.notes = None

    def write_to(self, path: Path) -> None:
        """Write this rank's stack there, should even this thread be kept from running."""
        try:
            self._file = path.open("ab", buffering=0)
        except OSError:  # the log has said so
            return

    def _watch(self) -> None:
        while not self._over.wait(self._period):
            self._arm()
            beat = self._pulse.feel()
            verdict = self._circle.judge(beat, self._pulse.now)
            if verdict is not None and not self._over.is_set():
                self._end(verdict)

    def _arm(self) -> None:
        """Have stacks dumped without the interpreter's lock, should somebody keep that for too long."""
        file = self._file or sys.__stderr__
        if file is not None:
            with suppress(OSError, ValueError):  # somebody has closed it
                faulthandler.dump_traceback_later(self._limit + 2 * self._period, file=file)

    def _end(self, verdict: Verdict) -> None:
        """Say why, and leave: the main thread cannot."""
        faulthandler.cancel_dump_traceback_later()
        threads = stacks(self._pulse.main)
        _within(_TELL_SECONDS, lambda: report_stall(verdict.line))
        _within(_TELL_SECONDS, lambda: self._tell(verdict, threads))
        _within(
            _TELL_SECONDS + _HEAR_SECONDS,
            lambda: self._circle.tell(verdict, threads, self._world.rank),
        )
        for thread in threading.enumerate():
            if thread.name.startswith(_SAVING):
                thread.join(_SAVE_SECONDS)
        self._circle.part(verdict)
        os._exit(ExitCode.FAILED)

    def _tell(self, verdict: Verdict, threads: str) -> None:
        speaker = 1 if any(beat.rank == 0 for beat in verdict.culprits) else 0
        speaks = self._world.rank == speaker or self._circle.notes is None
        log.log(logging.ERROR if speaks else logging.DEBUG, "%s", verdict.line)
        log.debug("every rank, as far as this one has heard:\n%s", self._circle.table())
        # Where no file takes the stacks of all ranks, people see those of who hangs; where nobody is to
        # blame, those of who speaks.
        named = any(beat.rank == self._world.rank for beat in verdict.culprits)
        shown = self._file is None and (named or (speaks and not verdict.culprits))
        log.log(
            logging.ERROR if shown else logging.DEBUG, "where this rank's threads are:\n%s", threads
        )


class _Pulse:
    """What this rank says of itself.

    Args:
        world: this rank among the others.
        longest: seconds that count between two looks at most; more, and the process was not run.
    """

    def __init__(self, world: World, longest: float) -> None:
        self.main = threading.get_ident()
        self.now = 0.0  # seconds in which this process was run
        self._world, self._longest = world, longest
        self._looked = time.monotonic()
        self._moves, self._place, self._since = 0, compiling(self.main), 0.0
        self._number = 0
        self._host, self._born = socket.gethostname(), began(os.getpid())

    def feel(self) -> Beat:
        """Look at the main thread."""
        looked = time.monotonic()
        self.now += min(looked - self._looked, self._longest)
        self._looked = looked
        state = current()
        place = compiling(self.main)
        if state.moves != self._moves or place != self._place:
            self._since = self.now
        self._moves, self._place = state.moves, place
        self._number += 1
        return Beat(
            rank=self._world.rank,
            node=_node(self._world, self._world.rank) or self._host,
            host=self._host,
            pid=os.getpid(),
            born=self._born,
            number=self._number,
            phase=state.name,
            waits=self._waits(state.name),
            quiet=self.now - self._since,
            meetings=state.meetings,
            spent={name: state.spent.get(name, 0.0) for name in _STEP},
        )

    def _waits(self, phase: str) -> bool:
        if self._world.size == 1:
            return False
        return phase in _EXCHANGES or (phase in _LAUNCHES and _gpu_in_use())


class _Circle:
    """What is known of all ranks: everything on rank 0, its word on the others.

    Args:
        world: this rank among them.
        limit: seconds that a rank may be quiet.
        period: seconds between two heartbeats.
    """

    def __init__(self, world: World, limit: float, period: float) -> None:
        self.notes: Notes | None = None
        self._world, self._limit, self._period = world, limit, period
        self._now = 0.0
        self._known: dict[int, tuple[Beat, float]] = {}  # the last heartbeat, and when it was new
        self._word, self._word_at = "", 0.0
        self._slow = _Slow(limit)

    def judge(self, mine: Beat, now: float) -> Verdict | None:
        """Who keeps the run waiting for too long, if anybody does."""
        self._now = now
        notes = self.notes
        if notes is None or notes.gone:
            self._known = {mine.rank: (mine, now)}
            self._word_at = now
            return judge(self._heard(), self._limit, self._period)
        notes.leave(_beat_of(mine.rank), mine.encode())
        return self._judge_all(notes, mine) if self._world.is_main else self._trust(notes, mine)

    def _judge_all(self, notes: Notes, mine: Beat) -> Verdict | None:
        for rank in range(self._world.size):
            self._hear(rank, notes)
        self._known[0] = mine, self._now
        ranks = self._heard()
        verdict = judge(ranks, self._limit, self._period)
        word = {"number": mine.number, "verdict": verdict and verdict.encode()}
        notes.leave(_WORD, json.dumps(word))
        straggler = self._slow.look([each.beat for each in ranks], self._now)
        if straggler is not None:
            _within(_TELL_SECONDS, lambda: log.warning("%s", straggler.line))
        return verdict

    def _trust(self, notes: Notes, mine: Beat) -> Verdict | None:
        """The word of rank 0; or, where it gives none, that it is silent."""
        word = notes.read.get(_WORD, "")
        if word != self._word:
            self._word, self._word_at = word, self._now
        if word and (verdict := json.loads(word)["verdict"]):
            return Verdict.decode(verdict)
        self._hear(0, notes)
        self._known = {0: (self._known[0][0], self._word_at), mine.rank: (mine, self._now)}
        if self._now - self._word_at < self._limit:
            return None
        return judge(self._heard()[:1], self._limit, self._period)

    def _hear(self, rank: int, notes: Notes) -> None:
        text = notes.read.get(_beat_of(rank))
        beat = _never_heard(self._world, rank) if text is None else Beat.decode(text)
        before = self._known.get(rank)
        if before is None or before[0].number != beat.number:
            self._known[rank] = beat, self._now

    def _heard(self) -> list[Heard]:
        return [Heard(beat, self._now - when) for _, (beat, when) in sorted(self._known.items())]

    def table(self) -> str:
        """What each rank is at."""
        return table(self._heard())

    def tell(self, verdict: Verdict, threads: str, rank: int) -> None:
        """Let rank 0's log have what can be known of who hangs: its stacks, or what the kernel says."""
        notes = self.notes
        if notes is None:
            return
        notes.hurry()
        for culprit in verdict.culprits:
            if culprit.rank == rank:
                notes.leave(_stacks_of(culprit.rank), threads)
            elif culprit.host == socket.gethostname() and culprit.born == began(culprit.pid):
                said = kernel_view(culprit.pid)
                notes.leave(_seen(culprit.rank), said)
                log.debug("%s: %s", culprit.name, said)
        if rank == 0:
            self._ask(notes, verdict)

    def _ask(self, notes: Notes, verdict: Verdict) -> None:
        names = {
            _stacks_of(beat.rank) if self._is_heard(beat.rank) else _seen(beat.rank): beat
            for beat in verdict.culprits
            if beat.rank
        }
        notes.want(names)
        _until(lambda: names.keys() <= notes.read.keys(), _HEAR_SECONDS)
        for name, beat in names.items():
            text = notes.read.get(name, "nobody can tell")
            log.debug("%s on %s:\n%s", name, beat.node, text)

    def _is_heard(self, rank: int) -> bool:
        return self._now - self._known[rank][1] < MISSED * self._period

    def part(self, verdict: Verdict) -> None:
        """Leave together: whoever went first would take the others along before they have told."""
        notes = self.notes
        if notes is None or any(beat.rank == 0 for beat in verdict.culprits):
            return
        if self._world.is_main:
            notes.leave(_PART, "")
            time.sleep(_PART_SECONDS)  # with this process the store goes, which the others still read
            return
        notes.want([_PART])
        _until(lambda: notes.gone or _PART in notes.read, _TELL_SECONDS + _HEAR_SECONDS + _SAVE_SECONDS)


class _Slow:
    """Looks for a rank that is slower than the others in one stretch of time after another.

    Args:
        limit: seconds that a rank may be quiet; a straggler is named once in that time.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._before: list[Beat] = []
        self._at = 0.0
        self._last = -1
        self._told = -limit

    def look(self, beats: list[Beat], now: float) -> Straggler | None:
        """The rank that was the slowest by far in the last two stretches, if it is time to say so."""
        seconds = now - self._at
        if self._before and seconds < self._limit / _STRETCHES:
            return None
        found = find_straggler(self._before, beats, seconds) if self._before else None
        again = found is not None and found.rank == self._last
        self._before, self._at = beats, now
        self._last = -1 if found is None else found.rank
        if not again or now - self._told < self._limit:
            return None
        self._told = now
        return found


def _gpu_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _node(world: World, rank: int) -> str:
    return world.hosts[rank] if rank < len(world.hosts) else ""


def _never_heard(world: World, rank: int) -> Beat:
    return Beat(
        rank=rank, node=_node(world, rank) or "an unknown node", host="", pid=0, born=0, number=0,
        phase="start up", waits=False, quiet=0.0, meetings=0, spent=dict.fromkeys(_STEP, 0.0),
    )  # fmt: skip


def _beat_of(rank: int) -> str:
    return f"beat {rank}"


def _stacks_of(rank: int) -> str:
    return f"threads of rank {rank}"


def _seen(rank: int) -> str:
    return f"process of rank {rank}"


def _within(seconds: float, act: Callable[[], None]) -> None:
    """Do something that may hang as everything else does, and wait for it only so long."""
    thread = threading.Thread(target=act, name="last words", daemon=True)
    thread.start()
    thread.join(seconds)


def _until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
