"""`agrivision completion`: what a shell needs to complete the other commands."""

from __future__ import annotations

from collections.abc import Mapping

import shtab

from agrivision.commands.parsing import Command, Parser, make_parser
from agrivision.errors import ExitCode

_SUMMARY = "print a script with which a shell completes these commands"
_EXAMPLES = ["bash > ~/.local/share/bash-completion/completions/agrivision"]
_PATHS = {
    "checkpoint",
    "config",
    "data",
    "dataset",
    "fields",
    "figures",
    "inputs",
    "json",
    "out",
    "page",
    "predictions",
    "run_dir",
    "runs",
    "socket",
    "source",
}  # what names a file or a folder


def _parser() -> Parser:
    made = make_parser("completion", _SUMMARY, _EXAMPLES)
    made.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="that is to complete")
    return made


def script(commands: Mapping[str, Command], shell: str) -> str:
    """A script that completes `agrivision`, its commands, their options and files.

    Args:
        commands: by name.
        shell: bash, zsh or tcsh.
    """
    whole = Parser(prog="agrivision")
    below = whole.add_subcommands(dest="command")
    for name, command in commands.items():
        parser = command.parser()
        for action in parser._actions:
            if action.dest in _PATHS:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        below.add_subcommand(name, parser, help=command.summary)
    made: str = shtab.complete(whole, shell)
    return made


def completion(commands: Mapping[str, Command]) -> Command:
    """The command that knows the others."""

    def run(argv: list[str]) -> ExitCode:
        from agrivision.console import say

        say(script({**commands, "completion": made}, _parser().parse_args(argv).shell))
        return ExitCode.DONE

    made = Command(summary=_SUMMARY, parser=_parser, run=run)
    return made
