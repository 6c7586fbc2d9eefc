"""Checkpoints behind the training: it stands still neither for the disk nor, if it can, for a copy.

`save` copies what is small into memory that is there already, and returns. A thread copies the rest
while the next step computes its gradients, and writes the copy, with all that a checkpoint promises.
`copied` stands before whatever changes the weights. There is never more than one such thread: whoever
saves again before the one before is on the disk, waits for it. What the thread meets is raised by the
next `save` or `wait`; until then `failed` says so, so that the ranks may meet soon.
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
from agrivision.errors import AgrivisionError
from agrivision.rundir import RunDirectory, best_step
from agrivision.snapshot import Snapshot, States
from agrivision.training.trainer import SaveClock

log = logging.getLogger(__name__)


class Saver:
    """Saves a run's checkpoints and removes those that are not wanted any more; only rank 0 uses it.

    From the first `prepare` or `save` on it takes as much of the host's memory as the states do.
    Use it in a `with` statement: however the block ends, what was saved is on the disk then.

    Args:
        run: its directory, held.
        keep_last: how many of the newest checkpoints stay, besides milestones and the best.
        allowed: raises where another attempt has taken over the run.
        flush: brings onto the disk what a checkpoint counts on; called before each is written.
        saved: told how many seconds each took, from the call to the end of its writing.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        keep_last: int,
        allowed: Callable[[], None],
        flush: Callable[[], None] = lambda: None,
        saved: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._run, self._keep_last = run, keep_last
        self._allowed, self._flush, self._saved = allowed, flush, saved
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

        Raises:
            AgrivisionError: why the checkpoint before could not be written; this one is not.
        """
        begin = time.perf_counter()
        self.wait()
        snapshot = self._room_for(states)
        snapshot.begin(states)
        self._stood = time.perf_counter() - begin

        def write() -> None:
            try:
                name = self._write(snapshot.finish(), step=step, epoch=epoch, milestone=milestone)
            except BaseException as error:  # it is raised where somebody waits
                self._error = error
                return
            seconds = time.perf_counter() - begin
            line = "step %d saved in %.1f s, training stood still for %.0f ms: %s"
            with self._standing:
                stood = self._stood
            log.info(line, step, seconds, 1000 * stood, name)
            self._saved(seconds)

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
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _room_for(self, states: States) -> Snapshot:
        if self._snapshot is None or not self._snapshot.fits(states):
            self._snapshot = None  # never two at once
            self._snapshot = Snapshot(states)
        return self._snapshot

    def _write(self, states: States, *, step: int, epoch: int, milestone: bool) -> str:
        """Write a checkpoint and remove those that are not wanted any more; returns its name."""
        self._flush()
        folder = self._run.checkpoints
        path = checkpoint.save(
            folder, states, step=step, epoch=epoch, milestone=milestone, allowed=self._allowed
        )
        saved = {entry.step for entry in checkpoint.entries(folder)}
        scored = self._run.evaluations()
        best = best_step({step: score for step, score in scored.items() if step in saved})
        checkpoint.tidy(folder, self._keep_last, () if best is None else (best,))
        return path.name


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
