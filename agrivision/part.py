"""One task's part of a command's work: what a job array divides, and how a task is asked to stop."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from agrivision.errors import BadInput

Stop = Callable[
    [], bool
]  # whether somebody asked this process to stop; asked between two pieces of work


def never() -> bool:
    """Nobody asks to stop."""
    return False


@dataclass(frozen=True, kw_only=True)
class Part:
    """Part `number` of `of`, as `1/4`; what is at place p of the work belongs to part p modulo `of`.

    Attributes:
        number: 0 … of - 1.
        of: parts altogether.
    """

    number: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise BadInput(f"there is no part {self}: parts are 0/{self.of} to {self.of - 1}/{self.of}")

    @classmethod
    def parse(cls, text: str) -> Part:
        """From `I/N`.

        Raises:
            BadInput: it is something else, or there is no such part.
        """
        match = re.fullmatch(r"([0-9]{1,9})/([1-9][0-9]{0,8})", text)
        if match is None:
            raise BadInput(f"--part is {text!r}: it must be I/N, for example 0/4 to 3/4 for four tasks")
        return cls(number=int(match[1]), of=int(match[2]))

    def takes(self, place: int) -> bool:
        """Whether what is at this place of the work is this part's."""
        return place % self.of == self.number

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


WHOLE = Part()
