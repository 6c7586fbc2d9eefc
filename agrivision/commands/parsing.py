"""What the commands have in common: their parsers, and options that several of them take."""

from __future__ import annotations

import difflib
import os
import re
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jsonargparse

from agrivision.errors import BadInput, ExitCode

Parser = jsonargparse.ArgumentParser

SYMMETRIES_HELP = "look from all eight sides and average: 8 x the work"
PART_HELP = "I/N: this task's share of the work, beside N - 1 other tasks"


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of `agrivision`.

    Attributes:
        summary: what it does, in a few words.
        parser: of what follows its name.
        run: does it; takes what follows its name, and may raise what `agrivision.cli.main` answers.
    """

    summary: str
    parser: Callable[[], Parser]
    run: Callable[[list[str]], ExitCode]


class _Formatter(RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Leaves the lines of examples as they are."""


def make_parser(command: str, description: str, examples: Sequence[str]) -> Parser:
    """A parser whose help ends with examples.

    Args:
        command: its name.
        description: what it does.
        examples: what follows `agrivision` in each.
    """
    lines = "\n".join(f"  agrivision {command} {example}" for example in examples)
    return Parser(
        prog=f"agrivision {command}",
        description=description,
        epilog=f"examples:\n{lines}",
        formatter_class=_Formatter,
        exit_on_error=False,
    )


def no_command(name: str, commands: Iterable[str]) -> BadInput:
    """There is no such command; which may have been meant, and which there are."""
    known = list(commands)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f": did you mean {close[0]}?" if close else ""
    return BadInput(f"there is no command {name!r}{hint}; the commands are {', '.join(known)}")


def flags(parser: Parser) -> list[str]:
    """The options of a parser, with their dashes."""
    return [flag for action in parser._actions for flag in action.option_strings]


def hinted(line: str, parser: Parser) -> str:
    """What a parser complains of, with the option that was meant and dashes before those it misses."""
    known = flags(parser)
    for word in re.findall(r"(?<=\s)--[^\s=]+", line.partition("unrecognized arguments:")[2]):
        if close := difflib.get_close_matches(word, known, n=1):
            return f"{line} (did you mean {close[0]}?)"
    start, wanted, names = line.partition("arguments are required: ")
    dashed = [f"--{name}" if f"--{name}" in known else name for name in names.split(", ")]
    return f"{start}{wanted}{', '.join(dashed)}"


def add_checkpoint(parser: Parser) -> None:
    """The network, and how it is run over tiles."""
    parser.add_argument("--checkpoint", type=str, required=True, help="run directory or checkpoint")
    parser.add_argument("--batch_size", type=int, default=8, help="tiles in one forward pass")
    add_network(parser)


def add_network(parser: Parser) -> None:
    """How a network is run."""
    parser.add_argument("--threads", type=int, default=2, help="decoding threads")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network")


def add_stall_minutes(parser: Parser) -> None:
    """Where ranks wait for one another."""
    parser.add_argument(
        "--stall_minutes",
        type=float | None,
        default=15.0,
        help="name a rank that does not get on for so long, and end; null: wait for ever",
    )


def add_postprocess(parser: Parser) -> None:
    """What `tune` chose."""
    parser.add_argument(
        "--postprocess",
        type=str,
        nargs="?",
        const="",
        default=None,
        metavar="FILE",
        help="with the factors and least areas that `tune` chose for the run, or that a file holds",
    )


def add_allow_vrt(parser: Parser) -> None:
    """Rasters that lead to other files."""
    parser.add_argument(
        "--allow_vrt", action="store_true", help="take VRTs, too, whose sources are plain files"
    )


def add_json(parser: Parser, what: str) -> None:
    """A file for programs beside the table for people."""
    parser.add_argument("--json", type=str, default=None, help=f"write {what} to this file")


def names(text: str) -> tuple[str, ...]:
    """`a, b` → `("a", "b")`."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))
