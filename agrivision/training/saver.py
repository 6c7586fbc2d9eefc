"""Checkpoints behind the training: it stands still neither for the disk nor, if it can, for a copy.

`save` copies what is small into memory that is there already, and returns. A thread copies the rest
while the next step computes its gradients, and writes the copy, with all that a checkpoint promises.
`copied` stands before whatever changes the weights. There is never more than one such thread: whoever
saves again before the one before is on the disk, waits for it.

Where the disk refuses, the thread tries again while the training goes on, until the disk takes it or
there is something newer to save; `DiskPatience` says for how long. What the thread meets in the end is
raised by the next `save` or `wait`; until then `failed` says so, so that the ranks may meet soon.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from agrivision import checkpoint
from agrivision.errors import AgrivisionError, StorageError
from agrivision.phase import moved
from agrivision.rundir import RunDirectory, ranked_steps
from agrivision.snapshot import Snapshot, States
from agrivision.training.patience import DiskPatience
from agrivision.training.trainer import SaveClock

_LOOK_SECONDS = 1.0  # so often whoever waits sees whether the disk was tried again

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that is on the disk.

    Attributes:
        step: optimiser steps done.
        epoch: whole epochs done.
        seconds: from the call to the end of its writing.
        stall_seconds: that the training stood still for it.
    """

    step: int
    epoch: int
    seconds: float
    stall_seconds: float


class Saver:
    """Saves a run's checkpoints and removes those that are not wanted any more; only rank 0 uses it.

    From the first `prepare` or `save` on it takes as much of the host's memory as the states do.
    Use it in a `with` statement: however the block ends, what was saved is on the disk then.

    Args:
        run: its directory, held.
        keep_last: how many of the newest checkpoints stay, besides milestones and the best.
        allowed: raises where another attempt has taken over the run.
        attempt: number of this attempt, 1 for the run's first.
        whole: step of the checkpoint that the run goes on from, which was read and found whole.
        patience: with a disk that refuses.
        flush: brings onto the disk what a checkpoint counts on; called before each is written.
        saved: told of each, in the thread that has written it.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        keep_last: int,
        allowed: Callable[[], None],
        attempt: int = 0,
        whole: int | None = None,
        patience: DiskPatience | None = None,
        flush: Callable[[], None] = lambda: None,
        saved: Callable[[Saved], None] = lambda _: None,
    ) -> None:
        self._run, self._keep_last, self._attempt = run, keep_last, attempt
        self._allowed, self._flush, self._saved = allowed, flush, saved
        self._patience = patience or DiskPatience(0)
        self._seen = {} if whole is None else {whole: True}  # see `checkpoint.tidy`
        self._newer = threading.Event()  # the main thread has something newer to save
        self._snapshot: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stood = 0.0  # seconds that the last save has kept the training
        self._standing = threading.Lock()  # held while it stands in `copied`

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception as second:
            if error is None:
                raise
            # The first one says why the run ends.
            log.warning("%s", second, exc_info=not isinstance(second, AgrivisionError))

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written and nobody has been told yet."""
        return self._error is not None

    def prepare(self, states: Callable[[], States]) -> None:
        """Allocate the memory for the copies, unless that was done; the first save then need not.

        Args:
            states: gives what will be saved.
        """
        if self._snapshot is None:
            self._snapshot = Snapshot(states())

    def save(self, states: States, *, step: int, epoch: int, milestone: bool = False) -> None:
        """Copy the states, and write the copy while the training goes on.

        Args:
            states: by name: flat mappings of tensors and JSON values. What a forward pass changes may
                change when this returns (see `Snapshot`), the rest when `copied` has returned.
            step: optimiser steps done.
            epoch: whole epochs done.
            milestone: keep it for good.

        Where the disk still refuses the checkpoint before, that one is given up for this one.

        Raises:
            AgrivisionError: why the checkpoint before could not be written; this one is not.
        """
        begin = time.perf_counter()
        self._newer.set()
        try:
            self.wait()
        except StorageError as refusal:
            if not self._patience.hurries:
                raise
            log.warning("%s; a last try, with what is newer", refusal)
        finally:
            self._newer.clear()
        snapshot = self._room_for(states)
        snapshot.begin(states)
        self._stood = time.perf_counter() - begin

        def write() -> None:
            try:
                copy = snapshot.finish()
                name = self._persist(copy, step=step, epoch=epoch, milestone=milestone)
            except BaseException as error:  # it is raised where somebody waits
                self._error = error
                return
            if name is None:
                log.warning("step %d is not saved: a later one is tried instead", step)
                return
            seconds = time.perf_counter() - begin
            line = "step %d saved in %.1f s, training stood still for %.0f ms: %s"
            with self._standing:
                stood = self._stood
            log.info(line, step, seconds, 1000 * stood, name)
            try:
                self._saved(Saved(step=step, epoch=epoch, seconds=seconds, stall_seconds=stood))
            except AgrivisionError as refusal:  # by the disk of the logs
                self._error = refusal

        self._thread = threading.Thread(target=write, name=f"save step {step}")
        self._thread.start()

    def copied(self) -> None:
        """Wait until what was saved is copied; call it before weights, moments or the average change.

        On a GPU the device waits, not the caller. What goes wrong with a copy is raised by the next
        `save` or `wait`.
        """
        if self._snapshot is None:
            return
        with self._standing:
            begin = time.perf_counter()
            self._snapshot.wait()
            self._stood += time.perf_counter() - begin

    def wait(self) -> None:
        """Wait until what was saved is on the disk.

        Raises:
            AgrivisionError: why it is not, once.
        """
        if self._thread is not None:
            tries = self._patience.tries
            while self._thread.is_alive():
                self._thread.join(_LOOK_SECONDS)
                if self._patience.tries != tries:  # it does not hang: the disk refuses
                    tries = self._patience.tries
                    moved()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _room_for(self, states: States) -> Snapshot:
        if self._snapshot is None or not self._snapshot.fits(states):
            self._snapshot = None  # never two at once
            self._snapshot = Snapshot(states)
        return self._snapshot

    def _persist(self, states: States, *, step: int, epoch: int, milestone: bool) -> str | None:
        """Write a checkpoint, again and again; returns its name, None where it was given up."""
        while True:
            try:
                name = self._write(states, step=step, epoch=epoch, milestone=milestone)
            except StorageError as refusal:
                self._patience.wait(refusal, self._newer.is_set)
                if self._newer.is_set():
                    return None
            else:
                self._patience.served()
                self._tidy()
                return name

    def _write(self, states: States, *, step: int, epoch: int, milestone: bool) -> str:
        self._flush()
        folder = self._run.checkpoints
        self._allowed()
        # Of an attempt before, seen late by a file system that lags: this one has not come there yet.
        checkpoint.set_aside(folder, step)
        path = checkpoint.save(
            folder,
            states,
            step=step,
            epoch=epoch,
            milestone=milestone,
            attempt=self._attempt,
            allowed=self._allowed,
        )
        self._seen[step] = True
        return path.name

    def _tidy(self) -> None:
        """Remove the checkpoints that are not wanted any more, if it is known which these are."""
        folder = self._run.checkpoints
        try:
            saved = {entry.step: entry for entry in checkpoint.entries(folder)}
            ranked = [saved[step] for step in ranked_steps(self._run.evaluations()) if step in saved]
            best = checkpoint.first_whole(ranked, self._seen)  # a damaged one is nobody's best
            checkpoint.tidy(folder, self._keep_last, () if best is None else (best,), self._seen)
        except (OSError, AgrivisionError) as error:
            log.warning("no old checkpoint is removed: %s", error)


@dataclass
class SaveWatch(SaveClock):
    """A clock that also wants a save when one has failed: at the save the ranks learn why.

    Attributes:
        saver: whose failures it sees.
    """

    saver: Saver = field(kw_only=True)

    def passed(self) -> bool:
        """Whether the time is over, or a checkpoint could not be written."""
        return self.saver.failed or super().passed()
