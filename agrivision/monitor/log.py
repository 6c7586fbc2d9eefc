"""Where messages go: a line on the screen for people, every line of every rank in a file."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import IO

LOGGER_NAME = "agrivision"


def configure_log(world_rank: int, file: Path | None) -> None:
    """Send the package's messages to the screen and to a file; a second call replaces the first.

    Rank 0 shows INFO and above on stderr, the other ranks only warnings, marked with their rank. The
    file takes everything, and is appended to: a run that was resumed keeps one log.

    Args:
        world_rank: rank in the whole run.
        file: usually `log/rank-N.log` of a run directory; None for commands without one.
    """
    logger = logging.getLogger(LOGGER_NAME)
    _remove_handlers(logger)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False  # a root logger that somebody else configured would double each line
    logger.addHandler(_ScreenHandler(world_rank))
    if file is not None:
        logger.addHandler(_FileHandler(file))


def _remove_handlers(logger: logging.Logger) -> None:
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


class _ScreenHandler(logging.Handler):
    """Lines on stderr, looked up anew each time: a live progress bar replaces `sys.stderr`."""

    def __init__(self, rank: int) -> None:
        super().__init__(logging.WARNING if rank else logging.INFO)
        mark = f"[rank {rank}] " if rank else ""
        self.setFormatter(_ScreenFormatter(f"%(asctime)s {mark}%(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; a closed pipe (`agrivision … | head`) must not end a run."""
        try:
            line = self.format(record)
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
        except (OSError, ValueError):  # ValueError: the stream was closed
            return


class _ScreenFormatter(logging.Formatter):
    """Says `warning:` or `error:` before the message; an ordinary line needs no level."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        if record.levelno >= logging.WARNING:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)


class _FileHandler(logging.Handler):
    """Appends each record with one unbuffered write, and never raises.

    Unbuffered, because lines that wait in a buffer are the ones a killed job would have needed, and
    because a full disk then costs the lines of that time only: later ones are tried again.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._path = path
        self._said = False
        self._file = self._open()

    def _open(self) -> IO[bytes] | None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return self._path.open("ab", buffering=0)
        except OSError as error:
            self._say(error)
            return None

    def emit(self, record: logging.LogRecord) -> None:
        """Append one record; what the disk refuses is lost."""
        if self._file is None:
            return
        try:
            self._file.write(f"{self.format(record)}\n".encode(errors="replace"))
        except OSError as error:
            self._say(error)

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:  # network file systems report a full quota here
                self._say(error)
        super().close()

    def _say(self, error: OSError) -> None:
        """Tell once, on the screen: the log cannot tell of itself."""
        if not self._said and sys.stderr is not None:
            self._said = True
            sys.stderr.write(f"the log {self._path} is not whole: {error.strerror or error}\n")
