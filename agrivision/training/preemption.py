"""Signals set a flag; the loop looks at it between two steps.

Slurm sends SIGTERM before it preempts or at the time limit, and the signal asked for with `--signal`
(here SIGUSR1; SIGUSR2 is submitit's own); a person sends SIGINT. Saving inside of a handler would meet
half-updated weights, and ranks hear of it at different moments, so the handler only remembers, and the
ranks agree at the next step. This module must not import torch: the handlers are installed before
torch is, since a signal without a handler ends the process.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopRequest:
    """Whether somebody asked this process to stop.

    Attributes:
        reason: name of the first signal, or empty.
    """

    def __init__(self) -> None:
        self.reason = ""

    @property
    def made(self) -> bool:
        """Whether to stop at the next step boundary."""
        return bool(self.reason)

    def listen(self) -> StopRequest:
        """Install the handlers; call it once, in the main thread, before torch is imported."""
        self.reason = _early.reason
        for number in _SIGNALS:
            signal.signal(number, self._remember)
        # Slurm sends SIGCONT along with SIGTERM; its default does nothing to a running process.
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.reason = self.reason or signal.Signals(number).name
        if number == signal.SIGINT:
            # A second Ctrl-C ends the process at once. Files appear by rename: none is left half.
            signal.signal(signal.SIGINT, signal.SIG_DFL)


_STOPPABLE = ("train", "prepare", "evaluate", "predict")
_early = StopRequest()


def hear_early(arguments: Sequence[str]) -> None:
    """Remember signals for the StopRequest that the command will make, if it makes one.

    Args:
        arguments: that follow `agrivision`.
    """
    if arguments and arguments[0] in _STOPPABLE and not {"-h", "--help"} & set(arguments):
        _early.listen()
