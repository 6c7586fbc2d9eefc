"""What a target is, and what counts as a right answer to bytes from elsewhere.

A reader may return what is right, which each target checks against something slower and simpler, or
refuse with one of our errors, whose text is one line that names the file. Anything else is a finding.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agrivision.data.sources.source import Flaw
from agrivision.errors import AgrivisionError
from tests.fuzz.mutations import Mutate, mutate_bytes

LONGEST_LINE = 4000  # characters of an error: what is wrong may be shown, but not all of it


@dataclass(frozen=True, kw_only=True)
class Target:
    """A reader and its oracle.

    Attributes:
        seeds: good inputs.
        run: tries one input; whatever it raises is a finding.
        mutate: makes an input from the seeds and a program, see `mutations`.
    """

    seeds: tuple[bytes, ...]
    run: Callable[[bytes], None]
    mutate: Mutate = mutate_bytes


class Refusal:
    """What stands for a result where a reader refused."""


REFUSED = Refusal()


def answer(read: Callable[[], Any], *names: Path | str) -> Any:
    """What a reader returns, or REFUSED where it refused as it should.

    Args:
        read: calls the reader.
        names: one of them must be named in the refusal; none where the caller of the reader adds it.
    """
    try:
        return read()
    except (AgrivisionError, Flaw) as error:
        line = str(error)
        assert len(line.splitlines()) == 1, f"not one line: {line!r}"
        assert len(line) <= LONGEST_LINE, f"{len(line)} characters: {line[:200]}"
        assert not names or any(str(name) in line for name in names), f"no file named: {line}"
        return REFUSED


def place_of(error: BaseException) -> str:
    """Where an error came from, to tell findings apart: the two innermost lines of this repository."""
    root = str(Path(__file__).parents[2])
    frames = [
        f"{Path(frame.filename).name}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(root)
    ]
    return f"{type(error).__name__} at {' < '.join(reversed(frames[-2:]))}"
