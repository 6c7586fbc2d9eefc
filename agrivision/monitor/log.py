"""Where messages go: a line on the screen for people, every line of every rank in a file."""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path

from agrivision.errors import harmless

LOGGER_NAME = "agrivision"
_MOST_BYTES = 1 << 20  # of lines that wait for a disk that refuses


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


class _Formatter(logging.Formatter):
    """Leaves out what a terminal would obey: messages name files of strangers."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))


class _ScreenFormatter(_Formatter):
    """Says `warning:` or `error:` before the message; an ordinary line needs no level."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        if record.levelno >= logging.WARNING:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)


class _FileHandler(logging.Handler):
    """Appends each record with one unbuffered write, and never raises.

    Unbuffered, because lines that wait in a buffer are the ones a killed job would have needed. Those
    that a full disk refuses are kept and written before the next one; where they become too many, the
    oldest are dropped, and a line in their place says how many.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._path = path
        self._waiting: deque[bytes] = deque()
        self._bytes = 0  # of the lines that wait
        self._dropped = 0
        self._torn = 0  # bytes of a line at the end of the file that was not taken whole
        self._refusing = False
        self._file: int | None = None
        try:
            self._open()
        except OSError as error:
            self._say(error)

    def _open(self) -> int:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._file = os.open(self._path, flags, 0o666)
        return self._file

    def emit(self, record: logging.LogRecord) -> None:
        """Append one record, now or before the next one."""
        self._keep(f"{self.format(record)}\n".encode(errors="replace"))
        try:
            self._send(self._open())
        except OSError as error:
            self._say(error)

    def _keep(self, line: bytes) -> None:
        self._waiting.append(line)
        self._bytes += len(line)
        while self._bytes > _MOST_BYTES:
            self._bytes -= len(self._waiting.popleft())
            self._dropped += 1

    def _send(self, file: int) -> None:
        if self._torn:
            os.ftruncate(file, os.fstat(file).st_size - self._torn)
            self._torn = 0
        if self._dropped:
            self._write(
                file, f"{self._dropped} lines are missing here: the disk refused them\n".encode()
            )
            self._dropped = 0
        while self._waiting:
            self._write(file, self._waiting[0])
            self._bytes -= len(self._waiting.popleft())
        self._refusing = False

    def _write(self, file: int, line: bytes) -> None:
        while self._torn < len(line):
            self._torn += os.write(file, line[self._torn :])
        self._torn = 0

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            try:
                self._send(file)
            except OSError as error:
                self._say(error)
            try:
                os.close(file)
            except OSError as error:  # network file systems report a full quota here
                self._say(error)
        super().close()

    def _say(self, error: OSError) -> None:
        """Tell on the screen, once for each time of trouble: the log cannot tell of itself."""
        if not self._refusing:
            self._refusing = True
            with suppress(OSError, ValueError, AttributeError):  # the screen may be gone as well
                sys.stderr.write(f"the log {self._path} cannot be written: {error.strerror or error}\n")
