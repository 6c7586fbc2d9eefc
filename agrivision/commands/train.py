"""`agrivision train`."""

from __future__ import annotations

from agrivision.commands.parsing import Command
from agrivision.errors import ExitCode
from agrivision.options import parse_train, train_parser
from agrivision.training.preemption import StopRequest


def _run(argv: list[str]) -> ExitCode:
    if {"-h", "--help"} & set(argv) or any(word.startswith("--print_config") for word in argv):
        train_parser().parse_args(argv)  # prints and exits
    stop = StopRequest().listen()
    options = parse_train(argv)
    from agrivision.training.run import train

    return train(
        options.config,
        options.run_dir,
        stop=stop,
        resume_with_changes=options.resume_with_changes,
        profile=options.profile,
    )


COMMAND = Command(summary="train, or go on with a run", parser=train_parser, run=_run)
