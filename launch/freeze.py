"""What a job runs is what it was submitted with: the code and the configuration, copied beside it.

A job waits for hours, and is requeued for days; meanwhile somebody edits the checkout. Slurm keeps the
batch script, not what it calls.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import agrivision
from agrivision.commit import FILE as COMMIT
from agrivision.commit import commit
from agrivision.errors import BadInput
from agrivision.locks import FileLock, Patience
from agrivision.options import parse_train, refuse_passwords, to_yaml
from agrivision.part import never
from agrivision.storage import (
    make_private,
    remove_tree,
    storage_error,
    sync_folder,
    sync_tree,
    write_atomically,
)
from launch.entry import job_folder, value_of
from launch.jobdir import JobDirectory, JobSpec
from launch.place import Place
from launch.turn import earlier_jobs

__all__ = ["freeze_code", "freeze_submission", "freeze_train", "job_directory", "value_of"]

_PACKAGES = ("agrivision", "launch")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
_MISSING = {
    "train": "train needs --run_dir: the folder of the run",
    "prepare": "prepare needs the source and the folder to make, before any option",
    "evaluate": "evaluate needs --checkpoint: a run directory or a checkpoint",
    "predict": "predict needs --out: the folder for the maps",
}


def freeze_submission(
    words: Sequence[str],
    place: Place,
    say: Callable[[str], None],
    environment: Mapping[str, str] = os.environ,
) -> JobDirectory:
    """The job directory of a plain `sbatch`: made when the job first starts, later found.

    Args:
        words: the command and its arguments, as sbatch was given them.
        place: of the job.
        say: called with a line for the user.
        environment: usually `os.environ`; a test passes a dict.

    Raises:
        BadInput: an argument or a file is wrong, or another job of the directory runs.
        StorageError, NotWritable: the disk refused.
    """
    refuse_passwords(words)
    command, arguments = (words[0], words[1:]) if words else ("", ())
    if command not in _MISSING:
        raise BadInput(f"give a command ({', '.join(_MISSING)}) and its arguments")
    job = job_directory(command, arguments, place.task)
    if _frozen(job, place):
        return job
    if os.pathsep in str(job.path):
        raise BadInput(
            f"{job.path} has a {os.pathsep} in it, which PYTHONPATH cannot hold: choose another"
        )
    if command == "train":
        parse_train(arguments)  # nothing is made of what is wrong
    job.make()
    job.require_own()
    with _alone(job):
        earlier_jobs(job, place, say)
        if not _frozen_by_array(job, place):
            freeze_code(job, again=True)
        _freeze_spec(job, place, (command, *arguments), environment)
    return job


def _frozen(job: JobDirectory, place: Place) -> bool:
    # A cluster that is set up anew counts its jobs from 1 again: a known number alone says nothing.
    known = place.restart > 0 and place.job in job.jobs()
    return known and job.spec_file.is_file() and job.code.is_dir()


def _frozen_by_array(job: JobDirectory, place: Place) -> bool:
    """Whether another task of the same array has brought the code: its ranks run from it."""
    array = place.job.partition("_")[0]
    return place.task is not None and any(name.startswith(f"{array}_") for name in job.jobs())


@contextmanager
def _alone(job: JobDirectory) -> Iterator[None]:
    """The tasks of an array start at the same time, and share the directory."""
    patience = Patience(f"another task of the array makes {job.path}", never)
    with FileLock(job.path / ".lock") as lock:
        while not lock.take(alone=True):
            patience.wait()
        yield


def _freeze_spec(
    job: JobDirectory, place: Place, command: tuple[str, ...], environment: Mapping[str, str]
) -> None:
    run_dir = ""
    if command[0] == "train":
        _, path, command = freeze_train(command[1:])
        run_dir = str(path)
    python = shlex.split(environment.get("AGRIVISION_PYTHON", "")) or python_of_this()
    spec = JobSpec(
        command=command,
        python=tuple(python),
        srun=tuple(shlex.split(environment.get("AGRIVISION_SRUN", ""))),
        run_dir=run_dir,
        cwd=str(Path.cwd()),
        # Somebody who submits again grants the whole number of attempts again.
        max_attempts=len(job.attempts()) + _number(environment, "AGRIVISION_MAX_ATTEMPTS", 100),
        signal_seconds=_number(environment, "AGRIVISION_SIGNAL_SECONDS", 0),
    )
    job.write_spec(spec)
    job.submitted(place.job, "sbatch")


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    if text and not text.isdigit():
        raise BadInput(f"the environment variable {name} is {text!r}, not a whole number")
    return int(text) if text else default


def freeze_code(job: JobDirectory, *, again: bool = False) -> None:
    """Copy the packages into the job directory; a copy that is there is kept.

    Args:
        job: made already.
        again: replace the copy by the code of today.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    if again and job.code.is_symlink():  # a sweep's element: the others keep theirs
        job.code.unlink()
    if job.code.is_dir():
        if not again or runs_from(job.code):
            return
        remove_tree(job.code)
    beside = job.code.with_name(f".code.{os.getpid()}.part")
    source = Path(agrivision.__file__).resolve().parents[1]
    try:
        shutil.rmtree(beside, ignore_errors=True)
        for package in _PACKAGES:
            shutil.copytree(source / package, beside / package, ignore=_LEFT_OUT)
        if which := commit():
            (beside / COMMIT).write_text(f"{which}\n")
        sync_tree(beside)
        beside.rename(job.code)
        sync_folder(job.path)
    except OSError as error:
        raise storage_error(job.code, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def runs_from(folder: Path) -> bool:
    """Whether this process's code is that of a folder."""
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
    make_private(run_dir)  # refuses somebody else's, who could put another job in the place of this one
    job = JobDirectory.of_run(run_dir)
    job.make()
    tree = options.config.to_dict()
    tree["data"]["path"] = _absolute(tree["data"]["path"])
    write_atomically(job.config, to_yaml(tree).encode())
    command = ["train", "--config", str(job.config), "--run_dir", str(run_dir)]
    if options.resume_with_changes:
        command.append("--resume_with_changes")
    if options.profile:
        command.append("--profile")
    return job, run_dir, tuple(command)


def _absolute(path: str) -> str:
    return os.path.abspath(path) if path else path  # noqa: PTH100


def job_directory(command: str, arguments: Sequence[str], task: int | None = None) -> JobDirectory:
    """Where the files of a command's job go: in its run directory, or beside what it writes.

    Args:
        command: `train`, `prepare`, `evaluate` or `predict`.
        arguments: that follow it.
        task: number in a job array.

    Raises:
        BadInput: the arguments do not say what is written.
    """
    folder = job_folder(command, arguments)
    if not folder:
        raise BadInput(_MISSING[command])
    return JobDirectory(Path(folder), task)


def python_of_this() -> tuple[str, ...]:
    """The interpreter that runs this process."""
    return (sys.executable,)
