"""From words on the command line to a command, and from what it raises to a line and an exit code.

Importing this module does not import torch: `agrivision train` must have its signal handlers in place
before that takes its seconds.
"""

from __future__ import annotations

import sys
import traceback
from argparse import ArgumentError
from collections.abc import Sequence

from agrivision import __version__
from agrivision.commands import (
    doctor,
    evaluate,
    export,
    inspect,
    models,
    predict,
    prepare,
    report,
    score,
    synthesize,
    tensorboard,
    train,
    tune,
)
from agrivision.commands.completion import completion
from agrivision.commands.parsing import hinted, no_command
from agrivision.ending import report_ending
from agrivision.errors import AgrivisionError, ExitCode, without_passwords
from agrivision.options import refuse_passwords, shortened

_COMMANDS = {
    "synthesize": synthesize.COMMAND,
    "prepare": prepare.COMMAND,
    "inspect": inspect.COMMAND,
    "train": train.COMMAND,
    "evaluate": evaluate.COMMAND,
    "tune": tune.COMMAND,
    "score": score.COMMAND,
    "predict": predict.COMMAND,
    "export": export.COMMAND,
    "models": models.COMMAND,
    "report": report.COMMAND,
    "tensorboard": tensorboard.COMMAND,
    "doctor": doctor.COMMAND,
}
_COMMANDS["completion"] = completion(_COMMANDS)

_OUT_OF_MEMORY = "out of memory: use smaller batches, crops or tiles, fewer channels, or fewer workers"
_CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate"  # torch says so in a plain RuntimeError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: what follows `agrivision`; None takes the process's arguments.

    Returns:
        The exit code, see `agrivision.errors.ExitCode`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        refuse_passwords(arguments)
        code = _dispatch(arguments)
    except AgrivisionError as error:
        return _complain(str(error), error.exit_code)
    except ArgumentError as error:
        line = hinted(str(shortened(error)), _COMMANDS[arguments[0]].parser())
        return _complain(line, ExitCode.BAD_INPUT)
    except KeyboardInterrupt:
        return _complain("interrupted", ExitCode.FAILED)
    except Exception as error:
        if isinstance(error, MemoryError) or _CPU_ALLOCATOR in str(error):
            return _complain(_OUT_OF_MEMORY, ExitCode.HOPELESS)
        if type(error).__name__ == "OutOfMemoryError":  # torch's; naming the class would import torch
            line = "out of GPU memory: use smaller batches or crops, or training.micro_batch_size"
            return _complain(line, ExitCode.HOPELESS)
        report_ending(ExitCode.FAILED, f"{type(error).__name__}: {error}", traceback.format_exc())
        raise
    report_ending(code, "")
    return int(code)


def _complain(line: str, code: ExitCode) -> int:
    line = without_passwords(" ".join(line.split()))
    sys.stderr.write(f"agrivision: error: {line}\n")
    report_ending(code, line)
    return int(code)


def _dispatch(arguments: list[str]) -> ExitCode:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        sys.stdout.write(_usage())
        return ExitCode.DONE
    if name == "--version":
        sys.stdout.write(f"agrivision {__version__}\n")
        return ExitCode.DONE
    if name not in _COMMANDS:
        raise no_command(name, _COMMANDS)
    return _COMMANDS[name].run(arguments[1:])


def _usage() -> str:
    lines = [f"  {name:12} {command.summary}" for name, command in _COMMANDS.items()]
    return "\n".join(
        ["usage: agrivision COMMAND …", "", *lines, "", "agrivision COMMAND --help says more.\n"]
    )
