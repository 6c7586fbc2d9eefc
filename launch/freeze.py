"""What a job runs is what it was submitted with: the code and the configuration, copied beside it.

A job waits for hours, and is requeued for days; meanwhile somebody edits the checkout. Slurm keeps the
batch script, not what it calls.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

import agrivision
from agrivision.errors import BadInput
from agrivision.options import parse_train
from agrivision.storage import remove_tree, storage_error, sync_folder, sync_tree, write_atomically
from launch.jobdir import JobDirectory

_PACKAGES = ("agrivision", "launch")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def freeze_code(job: JobDirectory, *, again: bool = False) -> None:
    """Copy the packages into the job directory; a copy that is there is kept.

    Args:
        job: made already.
        again: replace the copy by the code of today.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    if job.code.is_dir():
        if not again or _runs_from(job.code):
            return
        remove_tree(job.code)
    beside = job.code.with_name(f".code.{os.getpid()}.part")
    source = Path(agrivision.__file__).resolve().parents[1]
    try:
        shutil.rmtree(beside, ignore_errors=True)
        for package in _PACKAGES:
            shutil.copytree(source / package, beside / package, ignore=_LEFT_OUT)
        sync_tree(beside)
        beside.rename(job.code)
        sync_folder(job.path)
    except OSError as error:
        raise storage_error(job.code, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _runs_from(folder: Path) -> bool:
    return Path(agrivision.__file__).resolve().parents[1] == folder.resolve()


def freeze_train(arguments: Sequence[str]) -> tuple[JobDirectory, Path, tuple[str, ...]]:
    """Check the arguments of `agrivision train`, and write the configuration that they make.

    Args:
        arguments: what follows `agrivision train`.

    Returns:
        The job directory, made; the run directory; and the command that stands for the arguments from
        now on, whatever happens to the files that they name.

    Raises:
        BadInput: an argument or a file is wrong.
        StorageError, NotWritable: the disk refused.
    """
    options = parse_train(arguments)
    run_dir = Path(os.path.abspath(options.run_dir))  # noqa: PTH100 - Path.resolve follows links
    job = JobDirectory.of_run(run_dir)
    job.make()
    tree = options.config.to_dict()
    tree["data"]["path"] = _absolute(tree["data"]["path"])
    text = yaml.safe_dump(tree, sort_keys=False)
    write_atomically(job.config, text.encode())
    command = ["train", "--config", str(job.config), "--run_dir", str(run_dir)]
    if options.resume_with_changes:
        command.append("--resume_with_changes")
    return job, run_dir, tuple(command)


def _absolute(path: str) -> str:
    return os.path.abspath(path) if path else path  # noqa: PTH100


def value_of(arguments: Sequence[str], flag: str) -> str | None:
    """What follows a flag on a command line, `--flag value` or `--flag=value`; the last one counts."""
    found = None
    for place, argument in enumerate(arguments):
        if argument == flag and place + 1 < len(arguments):
            found = arguments[place + 1]
        elif argument.startswith(f"{flag}="):
            found = argument.partition("=")[2]
    return found


def job_directory(command: str, arguments: Sequence[str], task: int | None = None) -> JobDirectory:
    """Where the files of a command's job go: beside what it writes.

    Args:
        command: `prepare`, `evaluate` or `predict`.
        arguments: that follow it.
        task: number in a job array.

    Raises:
        BadInput: the arguments do not say what is written.
    """
    if command == "evaluate":
        run = value_of(arguments, "--checkpoint")
        if run is None:
            raise BadInput("evaluate needs --checkpoint: a run directory or a checkpoint")
        return JobDirectory.beside(Path(f"{_absolute(run)}.evaluate"), task)
    if command == "predict":
        out = value_of(arguments, "--out")
        if out is None:
            raise BadInput("predict needs --out: the folder for the maps")
        return JobDirectory.beside(Path(_absolute(out)), task)
    words = [word for word in arguments[:2] if not word.startswith("-")]
    if len(words) < 2:
        raise BadInput("prepare needs the source and the folder to make, before any option")
    return JobDirectory.beside(Path(_absolute(words[1])), task)


def python_of_this() -> tuple[str, ...]:
    """The interpreter that runs this process."""
    return (sys.executable,)
