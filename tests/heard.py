"""Runs commands as ranks, like `tests.ranks`, and hears what each of them says."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.ranks import Disturbance, run

_MARK = "agrivision: error: "


@dataclass(frozen=True)
class Ending:
    """How a rank ended.

    Attributes:
        code: exit code, negative for a signal.
        out: lines on stdout.
        err: lines on stderr.
    """

    code: int
    out: list[str]
    err: list[str]

    @property
    def complaint(self) -> str:
        """The one line that says why; a traceback, no line or a second one fail the test."""
        text = "\n".join(self.err)
        assert "Traceback" not in text, text
        complaints = [line for line in self.err if line.startswith(_MARK)]
        assert len(complaints) == 1, text
        assert self.err[-1] == complaints[0], text
        return complaints[0].removeprefix(_MARK)


def hear(
    argv: Sequence[str | Path],
    ranks: int = 1,
    *,
    disturbance: Disturbance | None = None,
    hook: Callable[[int], None] | None = None,
) -> list[Ending]:
    """Run a command of agrivision on some ranks, as `tests.ranks.run` does it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [str(word) for word in argv]
        listen = partial(_listen, folder, hook)
        codes = run(words, ranks, disturbance=disturbance, hook=listen)
        return [
            Ending(code, _lines(folder / f"{rank}.out"), _lines(folder / f"{rank}.err"))
            for rank, code in enumerate(codes)
        ]


def hear_one(argv: Sequence[str | Path], *, hook: Callable[[int], None] | None = None) -> Ending:
    """Run a command of agrivision alone."""
    return hear(argv, hook=hook)[0]


def refusal(argv: Sequence[str | Path], code: int = 2) -> str:
    """The one line with which a command ends that ends with this exit code."""
    ending = hear_one(argv)
    assert ending.code == code, ending
    return ending.complaint


def _listen(folder: Path, hook: Callable[[int], None] | None, rank: int) -> None:
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        file = os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, stream.fileno())
        os.close(file)
    if hook is not None:
        hook(rank)


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []
