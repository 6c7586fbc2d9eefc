"""Freeze a job and hand it to Slurm, through submitit.

submitit writes the batch script and a pickle beside it; the pickle holds the job directory's path and
nothing else, so a requeued job finds on disk what it has to do. The script runs one process on the
first node, `launch.batch`, which starts the ranks and stays when they are told to stop. submitit's own
handling of signals is not used: it knows nothing of a preemption that sends SIGTERM alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shlex
import sys
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse
import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from agrivision import cli
from agrivision.config import Config, flatten
from agrivision.data.schema import FILE_NAME
from agrivision.errors import BadInput, one_line
from agrivision.options import parse_train
from agrivision.storage import make_private
from launch import batch, slurm
from launch.freeze import freeze_code, freeze_train, job_directory, value_of
from launch.jobdir import JobDirectory, JobSpec, guard
from launch.resources import Resources, Site, check_known, check_text

_ALIVE = frozenset(
    {"PENDING", "RUNNING", "SUSPENDED", "CONFIGURING", "COMPLETING", "STOPPED", "REQUEUED", "RESIZING"}
)
_ALIVE |= {"REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "SIGNALING", "STAGE_OUT"}
# Slurm and submitit both replace %j and its like; sbatch reads a backslash as an escape, and PYTHONPATH
# has no way to write a colon.
_NOT_IN_PATHS = "%\\:"
_SUBMITIT = ("gpus_per_node", "gpus_per_task", "cpus_per_task", "mem", "partition", "account", "qos",
             "constraint", "exclude", "nodelist", "gres", "comment", "mail_user", "mail_type",
             "dependency")  # fmt: skip
_TRAIN_FLAGS = ("config", "run_dir", "resume_with_changes", "profile", "print_config", "help", "seed")
_ALONE = ("prepare", "predict")  # one process a part, which uses all cores or one GPU


@dataclass(frozen=True)
class Attempts:
    """What submitit pickles: where the job's directory is.

    Attributes:
        folder: path of the job directory.
        task: number in a job array whose tasks share the directory.
    """

    folder: str
    task: int | None = None

    def __call__(self) -> None:
        """Run one attempt, in the batch job."""
        # Leaving so also after success keeps submitit from pickling a result, which nobody reads; a
        # file that a kill left half-written there would make the next attempt fail.
        job = JobDirectory(Path(self.folder), self.task)
        sys.exit(batch.main(["run", str(job.spec_file)]))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a job is submitted.

    Attributes:
        resources: what it asks for.
        setup: lines of shell that its script runs first.
        python: program and options that run Python in its step.
    """

    resources: Resources
    setup: tuple[str, ...]
    python: tuple[str, ...]

    @classmethod
    def of(cls, resources: Resources, site: Site) -> Setting:
        """With a site's lines and Python."""
        return cls(resources=resources, setup=site.setup, python=site.python)

    def waiting_for(self, jobs: Sequence[str]) -> Setting:
        """The same, for a job that waits until others have ended well."""
        if not jobs:
            return self
        own = self.resources.dependency
        parts = [own] if own else []
        dependency = ",".join([*parts, f"afterok:{':'.join(jobs)}"])
        return dataclasses.replace(
            self, resources=dataclasses.replace(self.resources, dependency=dependency)
        )

    def attempts(self, job: JobDirectory) -> int:
        """Somebody who submits again grants the whole number of attempts again."""
        return len(job.attempts()) + self.resources.max_attempts

    def noted(self) -> dict[str, Any]:
        """For job.json, and for `resume`, which waits for nothing; that of a plain sbatch is empty."""
        given = {"nodes": self.resources.nodes} | self.resources.given()
        given.pop("dependency", None)
        return given | ({"setup": list(self.setup)} if self.setup else {})


def locate(
    command: str, arguments: Sequence[str], *, inputs: bool = True, parts: int = 1
) -> JobDirectory:
    """Check a command's arguments as its own parser does, and find the directory of its job.

    Nothing is written.

    Args:
        command: `train`, `prepare`, `evaluate` or `predict`.
        arguments: that follow it.
        inputs: look whether what it reads is there; not for a job that waits for another's output.
        parts: tasks of a job array that divide it.

    Raises:
        BadInput: an argument is wrong.
    """
    for word in arguments:
        check_text("an argument", word)
    if parts > 1 and value_of(arguments, "--part") is not None:
        raise BadInput("--parts gives each task of the array its --part: give only one of the two")
    if command == "train":
        sections = {key.partition(".")[0] for key in flatten(Config().to_dict())}
        check_known(arguments, "train", [*_TRAIN_FLAGS, *sorted(sections - {"seed"})])
        run_dir = os.path.abspath(parse_train(arguments).run_dir)  # noqa: PTH100 - follows no links
        job = JobDirectory.of_run(Path(run_dir))
    else:
        options = _options(command, arguments)
        if inputs:
            _check_inputs(command, options)
        job = job_directory(command, arguments)
    check_path(job.path)
    return job


def _options(command: str, arguments: Sequence[str]) -> jsonargparse.Namespace:
    """What the command's own parser makes of the arguments, without running the command."""
    parser = jsonargparse.capture_parser(cli.main, [command, *arguments])
    own = [option[2:] for action in parser._actions for option in action.option_strings]
    check_known(arguments, command, sorted(name for name in own if name))
    try:
        return parser.parse_args(list(arguments))
    except ArgumentError as error:
        raise BadInput(f"{command}: {' '.join(str(error).split())}") from None


def _check_inputs(command: str, options: jsonargparse.Namespace) -> None:
    named = {
        "prepare": [("source", options.get("source"))],
        "evaluate": [("checkpoint", options.get("checkpoint")), ("data set", options.get("data"))],
        "predict": [
            *(("checkpoint", path) for path in options.get("checkpoint") or []),
            *(("input", path) for path in options.get("inputs") or []),
        ],
    }
    for what, path in named[command]:
        if path is not None and not Path(path).exists():
            raise BadInput(f"{command}: there is no {what} {path}")


def warn_of_data(calls: Iterable[Sequence[str]]) -> None:
    """Say on stderr which data sets of runs cannot be seen from here; their nodes may see them.

    Args:
        calls: the arguments of `agrivision train`, for each run.
    """
    for path in dict.fromkeys(parse_train(arguments).config.data.path for arguments in calls):
        if not path:
            problem = "no --data.path is given: the job will fail"
        elif not os.access(Path(path) / FILE_NAME, os.R_OK):
            problem = (
                f"{path} has no {FILE_NAME}, seen from here: the job will fail unless its nodes see it"
            )
        else:
            continue
        sys.stderr.write(f"{one_line(f'launch: warning: {problem}')}\n")


def check_path(path: Path) -> None:
    """Refuse a job directory whose path a batch script cannot hold.

    Raises:
        BadInput: it has such a character.
    """
    check_text("the path", str(path))
    for char in _NOT_IN_PATHS:
        if char in str(path):
            raise BadInput(
                f"{path} has a {char} in it, which means something else to Slurm or Python:"
                " choose another folder"
            )


def check_ranks(command: str, resources: Resources) -> Resources:
    """Refuse several ranks for a command that is one process, and several parts for any other.

    Returns:
        The resources; GPUs do not multiply the ranks of such a command.

    Raises:
        BadInput: several ranks or parts are asked for.
    """
    if command not in _ALONE:
        if resources.parts > 1:
            raise BadInput(f"--parts divides a preparation or a prediction, and {command} is neither")
        return resources
    if resources.most_nodes > 1 or (resources.tasks_per_node or 1) > 1:
        raise BadInput(
            f"{command} is one process, which uses all cores of its node: give --nodes 1 and no"
            " --tasks_per_node, or divide it with --parts"
        )
    return dataclasses.replace(resources, tasks_per_node=1)


def parts_of(job: JobDirectory, setting: Setting) -> list[JobDirectory]:
    """The directory of a job; where it is an array, the same one as each of its tasks sees it."""
    count = setting.resources.parts
    return [JobDirectory(job.path, task) for task in range(count)] if count > 1 else [job]


def freeze(job: JobDirectory, command: str, arguments: Sequence[str], setting: Setting) -> None:
    """Write down what a job runs, and copy the code that runs it.

    Args:
        job: that `locate` found.
        command: `train`, `prepare`, `evaluate` or `predict`.
        arguments: that follow it.
        setting: how it is submitted.

    Raises:
        BadInput: an argument or a file is wrong, or a job of the directory is in the queue.
        StorageError, NotWritable: the disk refused.
    """
    parts = parts_of(job, setting)
    refuse_if_queued(job)
    run_dir, frozen = "", (command, *arguments)
    if command == "train":
        _, folder, frozen = freeze_train(arguments)
        run_dir = str(folder)
    job.make()
    job.require_own()
    freeze_code(job, again=True)
    for part in parts:
        share = ("--part", f"{part.task}/{len(parts)}") if part.task is not None else ()
        spec = specify(part, setting, command=(*frozen, *share), run_dir=run_dir, cwd=str(Path.cwd()))
        part.write_spec(spec)
    for file in {job.spec_file, *job.path.glob("job-*.json")} - {part.spec_file for part in parts}:
        file.unlink(missing_ok=True)  # of an earlier submission with another number of parts


def specify(
    job: JobDirectory, setting: Setting, *, command: Sequence[str], run_dir: str, cwd: str
) -> JobSpec:
    """What job.json says of a job."""
    resources = setting.resources
    return JobSpec(
        command=tuple(command),
        python=setting.python,
        srun=tuple(shlex.split(resources.srun_args or "")),
        run_dir=run_dir,
        cwd=cwd,
        max_attempts=setting.attempts(job),
        signal_seconds=resources.signal_seconds,
        resources=setting.noted(),
    )


def make_folder(path: Path) -> None:
    """Make a folder for its owner alone; one that is there already stays as open as it is.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    if not path.is_dir():
        make_private(path)


def queued(job: JobDirectory) -> list[slurm.QueuedJob]:
    """The jobs of a directory that wait or run.

    Raises:
        SlurmError: Slurm does not answer.
    """
    jobs = job.jobs()
    found = slurm.queue(sorted({name.partition("_")[0] for name in jobs}))
    return [found[name] for name in dict.fromkeys(jobs) if name in found and alive(found[name])]


def alive(job: slurm.QueuedJob) -> bool:
    """Whether a job waits or runs."""
    return job.state in _ALIVE


def refuse_if_queued(job: JobDirectory) -> None:
    """Two jobs in one directory would write the same files.

    Raises:
        BadInput: one of its jobs waits or runs.
        SlurmError: Slurm does not answer.
    """
    slurm.require()
    for found in queued(job):
        raise BadInput(
            f"job {found.id} of {job.path} is {found.state}: wait for it, or end it with"
            f" `python -m launch cancel`"
        )


def script(folder: Path, code: Path, name: str, setting: Setting, *, array: str = "") -> str:
    """The batch script.

    Args:
        folder: job directory, which takes the log and what submitit writes.
        code: that the job runs.
        name: of the job, where the resources give none.
        setting: how it is submitted.
        array: of the job array, as sbatch takes it; empty for a job by itself, or its parts.
    """
    parts = setting.resources.parts
    array = array or array_of(parts, parts)
    executor = _executor(folder, code, name, setting, array=array)
    return str(executor._make_submission_file_text(executor._submitit_command_str, "")) + "\n"


class _Executor(submitit.SlurmExecutor):  # type: ignore[misc, unused-ignore]
    """submitit's, which can also write a script where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _executor(
    folder: Path, code: Path, name: str, setting: Setting, *, array: str = "", parallel: int = 0
) -> submitit.SlurmExecutor:
    executor = _Executor(JobDirectory(folder).submitit)
    log = "slurm-%A_%a.out" if array else "slurm-%j.out"
    extra = _further(setting.resources) | {"output": str(folder / log)}
    if array:
        extra["array"] = array
    executor.update_parameters(
        **_known(setting.resources),
        job_name=_escaped(setting.resources.job_name or _safe(name)),
        setup=_setup(folder, code, setting.setup) + _ranks(setting.resources),
        use_srun=False,
        stderr_to_stdout=True,
        wckey=None,  # submitit's default would be refused where such keys are checked
        array_parallelism=parallel or 1,
        additional_parameters=extra,
    )
    return executor


def _known(resources: Resources) -> dict[str, Any]:
    """What submitit has parameters for."""
    # nodes may be a range, which submitit would multiply: see _further.
    given = {
        "nodes": resources.most_nodes,
        "ntasks_per_node": resources.ranks_per_node,
        "time": resources.minutes,
        "exclusive": resources.exclusive or None,
    }
    for name in _SUBMITIT:
        given[name] = _escaped(getattr(resources, name))
    if resources.elastic:
        # Tasks would be counted once, for the nodes of the first start, and a requeued job would wait
        # for as many again: the batch side is told instead, and Slurm only the CPUs that they need.
        del given["ntasks_per_node"], given["cpus_per_task"]
    return given


def _further(resources: Resources) -> dict[str, Any]:
    """What submitit has none for, or another opinion of."""
    given: dict[str, Any] = {
        "nodes": resources.nodes,
        # To the ranks, not to the batch shell, which could not tell them in time.
        "signal": f"USR1@{resources.signal_seconds}",
        "requeue": True,
    }
    if resources.reservation is not None:
        given["reservation"] = _escaped(resources.reservation)
    if resources.elastic:
        given["mincpus"] = resources.ranks_per_node * (resources.cpus_per_task or 1)
    return given


def _escaped(value: Any) -> Any:
    """To sbatch a backslash is an escape even between the single quotes that submitit sets."""
    return value.replace("\\", "\\\\") if isinstance(value, str) else value


def _safe(name: str) -> str:
    return re.sub(r"[^\w.=+-]", "_", name, flags=re.ASCII) or "job"


def _setup(folder: Path, code: Path, lines: Sequence[str]) -> list[str]:
    return [
        "umask 077",
        "trap : TERM USR1 USR2  # bash stays until Python has decided; its children get the default",
        *lines,
        *guard(folder, code),
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1  # else the folder that the job was submitted in comes first",
        "export SUBMITIT_PREEMPT_SIGNAL=USR1",
    ]


def _ranks(resources: Resources) -> list[str]:
    return [f"export AGRIVISION_RANKS_PER_NODE={resources.ranks_per_node}"] if resources.elastic else []


def submit(job: JobDirectory, setting: Setting, *, name: str, by: str) -> str:
    """Submit a frozen job, or all parts of one as a job array.

    Args:
        job: its directory, with its specification.
        setting: how.
        name: of the job, where the resources give none.
        by: `launch` or `resume`, for the directory's list.

    Returns:
        Slurm's id; an array's stands for all its tasks.

    Raises:
        SlurmError: sbatch refused.
        StorageError, NotWritable: the disk refused.
    """
    parts = parts_of(job, setting)
    if len(parts) > 1:
        numbers = submit_array(job.path, parts, setting, name=name, parallel=len(parts))
        return numbers[0].partition("_")[0]
    executor = _executor(job.path, job.code, name, setting)
    with _submitting(job.path):
        number = str(executor.submit(Attempts(str(job.path), job.task)).job_id)
    job.submitted(number, by=by)
    return number


def submit_array(
    folder: Path, jobs: Sequence[JobDirectory], setting: Setting, *, name: str, parallel: int
) -> list[str]:
    """Submit frozen jobs as one job array.

    Args:
        folder: that takes the logs and holds the code.
        jobs: their directories.
        setting: how each is submitted.
        name: of the array, where the resources give none.
        parallel: so many at a time.

    Returns:
        Slurm's ids.

    Raises:
        SlurmError: sbatch refused.
        StorageError, NotWritable: the disk refused.
    """
    array = array_of(len(jobs), parallel)
    shared = JobDirectory(folder)
    executor = _executor(folder, shared.code, name, setting, array=array, parallel=parallel)
    calls = [Attempts(str(job.path), job.task) for job in jobs]
    with _submitting(folder):
        numbers = [str(entry.job_id) for entry in executor.submit_array(calls)]
    for job, number in zip(jobs, numbers, strict=True):
        job.submitted(number, by="launch")
    return numbers


def array_of(count: int, parallel: int) -> str:
    """`0-3%2`, as sbatch takes it; empty for a single job, which submitit does not make an array of."""
    return f"0-{count - 1}%{min(count, parallel)}" if count > 1 else ""


@contextlib.contextmanager
def _submitting(folder: Path) -> Iterator[None]:
    """Files for the owner alone, an environment without another job's, errors in one line."""
    make_private(JobDirectory(folder).submitit)
    mask, before = os.umask(0o077), dict(os.environ)
    try:
        # What SBATCH_… says is among the resources by now, where it is among them at all; sbatch would
        # prefer it to the script.
        for name in before.keys() - slurm.clean_environment(before).keys():
            del os.environ[name]
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it then raises
            yield
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [
            line.removeprefix("sbatch: ").removeprefix("error: ") for line in str(error).splitlines()
        ]
        raise slurm.SlurmError(f"sbatch: {'; '.join(filter(None, lines))}") from None
    finally:
        os.environ.update(before)
        os.umask(mask)


def name_of(job: JobDirectory, arguments: Sequence[str]) -> str:
    """What a job is called where nobody said: as what it writes."""
    run_dir = value_of(arguments, "--run_dir")
    return Path(os.path.abspath(run_dir)).name if run_dir else job.path.stem  # noqa: PTH100
