"""The errors that users meet, and the exit codes that schedulers read.

Every error carries one line that says what is wrong, where, and what to do. `agrivision.cli` prints
that line and leaves with the error's code; a traceback therefore always means a bug in this package.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import ClassVar

_PASSWORD = re.compile(r"(\w://)[^/\s@]*@")


class ExitCode(IntEnum):
    """How a command ended: a contract with the launch scripts and with users' own."""

    DONE = 0
    FAILED = 1  # trying again may help: a full disk, a lost peer
    BAD_INPUT = 2  # wrong usage or bad input: somebody has to change something
    STOPPED = 85  # checkpointed on request, wants another turn
    HOPELESS = 86  # failed, and trying again cannot help


_LONGEST = 2000  # characters of a line; what is wrong may come from a file of any content


def one_line(text: str) -> str:
    """The same as one line that any terminal can show: no line breaks, no escapes, not too long."""
    text = _as_codes(re.sub(r"[\n\r\t]", " ", text))
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]} … {text[-half:]}"


def harmless(text: str) -> str:
    """Text without what a terminal obeys: a return begins a line, the rest is shown as codes.

    Names of files, and what stands in them, are strangers' words.
    """
    return _as_codes(re.sub(r"\r\n?", "\n", text), kept="\n\t")


def _as_codes(text: str, kept: str = "") -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


class AgrivisionError(Exception):
    """Base of all errors that are shown to users as one line."""

    exit_code: ClassVar[ExitCode] = ExitCode.FAILED

    def __str__(self) -> str:
        return one_line(super().__str__())


class BadInput(AgrivisionError):
    """What the user gave cannot be used; the message says what to change."""

    exit_code = ExitCode.BAD_INPUT


class ConfigurationError(BadInput):
    """A key, a value or a combination of the configuration."""


class SourceError(BadInput):
    """Imagery or labels that `prepare` or `predict` cannot read."""


class DatasetError(BadInput):
    """A prepared data set that is missing, not whole or not what it says it is."""


class CheckpointError(BadInput):
    """A checkpoint or run directory that is missing, damaged or of another model."""


class RunMismatch(BadInput):
    """A run directory that belongs to another configuration or another data set."""


class NotWritable(BadInput):
    """A place that may not be written: no permission, a read-only file system, no such folder."""


class Untrusted(BadInput):
    """A file or folder that somebody else owns or may write, where that lets them decide something."""


class StorageError(AgrivisionError):
    """Writing failed: a full disk, a quota, a file system that went away."""


class Unfaithful(AgrivisionError):
    """A network that gives other probabilities in its exported form than in the run: not written."""


class PeerLost(AgrivisionError):
    """Another rank of the run failed or disappeared."""


class Busy(AgrivisionError):
    """Another process is at work on the same: once it has ended, the same command goes on."""


class Superseded(AgrivisionError):
    """Another attempt goes on with the run: this one may not write any more."""


class Interrupted(AgrivisionError):
    """Asked to stop before there was anything to save; the same command goes on."""

    exit_code = ExitCode.STOPPED


class Diverged(AgrivisionError):
    """The loss was not finite too often in a row: the same run would do it again."""

    exit_code = ExitCode.HOPELESS


def without_passwords(text: str) -> str:
    """A text for the screen or a log, in which `https://user:password@host` has lost what is secret."""
    return _PASSWORD.sub(r"\1…@", text)
