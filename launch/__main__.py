"""`python -m launch`: jobs on a Slurm cluster, from submission to the end."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence

from agrivision.commands.parsing import no_command
from agrivision.console import say
from agrivision.errors import AgrivisionError, ExitCode, without_passwords
from agrivision.options import refuse_passwords
from launch import control, logs, pipeline, status, sweep
from launch.resources import build, describe, find_site, take_apart
from launch.submit import Setting, check_ranks, freeze, locate, name_of, script, submit, warn_of_data


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command of launch.

    Args:
        argv: what follows `python -m launch`; None takes the process's arguments.

    Returns:
        The exit code, see `agrivision.errors.ExitCode`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    mask = os.umask(0o077)  # for everything that is written, submitit's pickles too
    try:
        refuse_passwords(arguments)
        return int(_dispatch(arguments))
    except AgrivisionError as error:
        return _complain(str(error), error.exit_code)
    except ArgumentError as error:
        return _complain(str(error), ExitCode.BAD_INPUT)
    except KeyboardInterrupt:
        return _complain("interrupted", ExitCode.FAILED)
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    finally:
        os.umask(mask)


def _complain(line: str, code: ExitCode) -> int:
    sys.stderr.write(f"launch: error: {without_passwords(' '.join(line.split()))}\n")
    return int(code)


def _dispatch(arguments: list[str]) -> ExitCode:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        say(_usage())
        return ExitCode.DONE
    if name not in _COMMANDS:
        raise no_command(name, _COMMANDS)
    return _COMMANDS[name][1](arguments[1:])


def _usage() -> str:
    lines = [f"  {name:10} {text}" for name, (text, _) in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m launch COMMAND …",
            "",
            *lines,
            "",
            "python -m launch COMMAND --help says more.",
        ]
    )


def _submitting(command: str) -> _Command:
    def submit_one(argv: list[str]) -> ExitCode:
        return _submit(command, argv)

    return submit_one


def _submit(command: str, argv: list[str]) -> ExitCode:
    if not argv or {"-h", "--help"} & set(argv):
        say(
            f"usage: python -m launch {command} [RESOURCES] [--site FILE] [--dry_run]"
            f" {_SYNOPSES[command]}\n\n{describe()}"
            "  --site FILE           site profile; default: $AGRIVISION_SITE, or the user's own\n"
            "  --dry_run             print the batch script, change nothing\n\n"
            f"Everything else goes to `agrivision {command}`, whose --help explains it."
        )
        return ExitCode.DONE
    words = take_apart(argv)
    site = find_site(words.site)
    resources = check_ranks(command, build(*site.layers(command, os.environ), words.resources))
    setting = Setting.of(resources, site)
    job = locate(command, words.rest, parts=resources.parts)
    name = name_of(job, words.rest)
    if command == "train":
        warn_of_data([words.rest])
    if words.dry_run:
        sys.stdout.write(script(job.path, job.code, name, setting))
        return ExitCode.DONE
    freeze(job, command, words.rest, setting)
    number = submit(job, setting, name=name, by="launch")
    say(f"job {number}, in {job.path}")
    return ExitCode.DONE


_SYNOPSES = {
    "train": "--config FILE --run_dir DIR [--section.key value …]",
    "prepare": "SOURCE OUT …",
    "evaluate": "--checkpoint RUN --data DATASET …",
    "predict": "--checkpoint RUN INPUT… --out DIR …",
}

_Command = Callable[[list[str]], ExitCode]
_COMMANDS: dict[str, tuple[str, _Command]] = {
    "train": ("submit a training run", _submitting("train")),
    "prepare": ("submit a preparation", _submitting("prepare")),
    "evaluate": ("submit an evaluation", _submitting("evaluate")),
    "predict": ("submit a prediction", _submitting("predict")),
    "sweep": ("values against one another, as one job array; again: the table", sweep.main),
    "pipeline": ("prepare, train, evaluate and predict, each after the one before", pipeline.main),
    "status": ("what runs, waits and has ended, and how far it is", status.main),
    "logs": ("what a job printed", logs.main),
    "cancel": ("end jobs for good", control.cancel),
    "resume": ("submit again what was interrupted", control.resume),
}


if __name__ == "__main__":
    sys.exit(main())
