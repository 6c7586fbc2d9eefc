"""How long a run goes on whose disk refuses what must be saved.

A full disk is emptied, a quota raised, a server started again, often within minutes; a run that ended
at once would give its nodes away for that. But a run that cannot save works in vain, and the longer the
more: so it tries again, says so each time, and ends when it was refused for too long.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from agrivision.errors import StorageError
from agrivision.part import Stop, never

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds; each is twice as long as the one before
_POLL_SECONDS = 0.1

log = logging.getLogger(__name__)


class DiskPatience:
    """Counts the time since the disk first refused; one for all that a process saves.

    Args:
        seconds: that a disk may go on refusing; 0 takes the first refusal as the last word.
        stop: whether this process was asked to end; then there is one more try, and no other.
        clock: seconds since any moment.
        sleep: waits for so many seconds.

    Attributes:
        tries: how often the disk has refused.
    """

    def __init__(
        self,
        seconds: float,
        stop: Stop = never,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._seconds, self._stop, self._clock, self._sleep = seconds, stop, clock, sleep
        self._since: float | None = None  # the first refusal
        self._pause = _FIRST_PAUSE
        self._last_try = False
        self.tries = 0

    @property
    def hurries(self) -> bool:
        """Whether this process was asked to end, so that there is no time to wait."""
        return self._stop()

    def wait(self, refusal: StorageError, enough: Stop = never) -> None:
        """Wait before the next try.

        Args:
            refusal: what the disk said.
            enough: whether to stop waiting.

        Raises:
            StorageError: the refusal, where this was the last try.
        """
        now = self._clock()
        self.tries += 1
        if self._since is None:
            self._since = now
        left = self._since + self._seconds - now
        if left <= 0 or self._last_try:
            raise refusal
        log.warning("%s; trying again for %.0f more minutes, then the run ends", refusal, left / 60)
        end = now + min(self._pause, left)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        while not enough() and self._clock() < end:
            if self._stop():
                self._last_try = True
                return
            self._sleep(_POLL_SECONDS)

    def served(self) -> None:
        """The disk has taken everything."""
        if self._since is not None:
            log.warning("the disk takes what is saved again")
        self._since, self._pause, self._last_try = None, _FIRST_PAUSE, False

    def persist(self, act: Callable[[], None], moved: Callable[[], None] = lambda: None) -> None:
        """Do something that the disk may refuse, again and again.

        Args:
            act: what to do; it can be repeated.
            moved: called before each further try.

        Raises:
            StorageError: it was refused for too long.
            Whatever else it raises, at once.
        """
        while True:
            try:
                act()
            except StorageError as refusal:
                self.wait(refusal)
                moved()
            else:
                self.served()
                return
