"""What a job leaves on disk: what it runs, as which jobs it was submitted, how each attempt ended.

    JOB_DIR/job.json            what every attempt runs; frozen when the job is submitted (an array's
                                tasks have job-0.json, job-1.json, …)
    JOB_DIR/code/               the code that runs it
    JOB_DIR/config.yaml         of a training run: the complete configuration
    JOB_DIR/submissions.jsonl   one row for each job that Slurm was given
    JOB_DIR/attempts.jsonl      one row for each beginning and each end of an attempt (an array's tasks
                                have attempts-0.jsonl, …: over NFS two nodes must not append to one)
    JOB_DIR/endings/N/          how each rank of the present attempt N ended, in its own words
    JOB_DIR/slurm-JOB.out       what the job printed

A training run's job directory is `launch/` in its run directory. That of another command stands beside
what it writes, as OUT.launch. A job array's tasks have rows of their own in the same files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agrivision import json_values
from agrivision.errors import BadInput
from agrivision.ownership import require_own, require_own_entries
from agrivision.storage import make_private, storage_error, write_atomically

VERSION = 1
_FOLDER = "launch"
_SUFFIX = ".launch"
_JOB = re.compile(r"[0-9_]{1,40}")


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What every attempt of a job runs, and within which bounds it tries again.

    Attributes:
        command: of agrivision, and its arguments, as they are passed to every rank.
        python: program and options that run Python in the job's step: an interpreter, or a container's
            command that ends with one.
        srun: further options of srun.
        run_dir: of a training run, else empty.
        cwd: folder that relative paths in `command` start from.
        max_attempts: no more attempts than this altogether.
        max_stalled: nor more than this in a row that got no further.
        signal_seconds: how long before the time limit the job asked to be warned; 0: not known.
        dependents: jobs that wait for this one, to be told when a successor takes its place.
        resources: what the job was submitted with, for `resume`; empty for a plain `sbatch`.
    """

    command: tuple[str, ...]
    python: tuple[str, ...]
    srun: tuple[str, ...] = ()
    run_dir: str = ""
    cwd: str = ""
    max_attempts: int = 100
    max_stalled: int = 3
    signal_seconds: int = 0
    dependents: tuple[str, ...] = ()
    resources: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """As it stands in job.json."""
        content = {"version": VERSION, **dataclasses.asdict(self)}
        return (json.dumps(content, indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, text: bytes) -> JobSpec:
        """Read what `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: it is something else.
        """
        content = json_values.entries(json_values.parse(text))
        if content.pop("version") != VERSION:
            raise ValueError("another format version")
        for name in ("command", "python", "srun", "dependents"):
            content[name] = json_values.texts(content[name])
        spec = cls(**content)
        for count in (spec.max_attempts, spec.max_stalled, spec.signal_seconds):
            json_values.whole(count)
        for path in (spec.run_dir, spec.cwd):
            json_values.text(path)
        json_values.entries(spec.resources)
        if not spec.command or not spec.python:
            raise ValueError("it has no command to run")
        return spec


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt: its beginning, and its end where it had one.

    Attributes:
        number: 1 for the first.
        job: Slurm's id.
        nodes: that it ran on.
        tasks: ranks.
        began: seconds since 1970.
        from_step: latest checkpoint's step when it began; None where steps mean nothing.
        ended: seconds since 1970; None while it runs, or where it was killed.
        to_step: latest checkpoint's step when it ended.
        code: exit code; None as `ended`.
        reason: why it ended.
        decision: what followed: `done`, `requeued`, `successor 18`, `left completing`, `superseded`,
            `given up`, `not requeued`.
        preempted: it had to make room for another job.
    """

    number: int
    job: str
    nodes: tuple[str, ...]
    tasks: int
    began: float
    from_step: int | None = None
    ended: float | None = None
    to_step: int | None = None
    code: int | None = None
    reason: str = ""
    decision: str = ""
    preempted: bool = False


def guard(folder: Path, code: Path) -> list[str]:
    """Lines of bash that end a job's script where its folders are not its user's own.

    Whoever may write the folder above can put another one in a job's place while that waits. Python
    would run what it finds there before anything of ours could look.

    Args:
        folder: of the job.
        code: that it runs; a sweep's element has a link to the sweep's.
    """
    # The links above stay as they are: nodes may know the same folder by another of its names.
    target = Path(os.path.normpath(code.parent / code.readlink())) if code.is_symlink() else code
    lines = []
    for path in dict.fromkeys([folder, target.parent]):
        name = shlex.quote(str(path))
        text = shlex.quote(f"launch: error: {path} is not yours alone any more: the job is not run")
        found = f"$(stat --format=%u -- {name}):$(stat --dereference --format=%u:%A -- {name})"
        pattern = "^($EUID|0):($EUID|0):d....-..-."
        lines.append(f'[[ "{found}" =~ {pattern} ]] || {{ echo {text} >&2; exit 2; }}')
    return lines


@dataclass(frozen=True)
class JobDirectory:
    """The files of a job.

    Attributes:
        path: of the directory.
        task: number in a job array whose tasks share the directory; None for a job by itself.
    """

    path: Path
    task: int | None = None

    @classmethod
    def of_run(cls, run_dir: Path) -> JobDirectory:
        """That of a training run."""
        return cls(run_dir / _FOLDER)

    @classmethod
    def beside(cls, out: Path, task: int | None = None) -> JobDirectory:
        """That of a job which writes `out`."""
        return cls(out.with_name(out.name + _SUFFIX), task)

    @classmethod
    def find(cls, path: Path) -> JobDirectory:
        """The job directory that somebody means by a run directory, an output, or its own path.

        Raises:
            BadInput: there is none.
        """
        for candidate in (cls.of_run(path), cls.beside(path), cls(path)):
            if candidate.spec_file.is_file():
                return candidate
            for file in sorted(candidate.path.glob("job-*.json")):
                return cls.of_spec(file)  # the first task of an array stands for all
        raise BadInput(
            f"{path} was not launched: no {_FOLDER}/job.json in it, nor {path.name}{_SUFFIX}"
        )

    @classmethod
    def of_spec(cls, file: Path) -> JobDirectory:
        """That in which a `job.json`, or an array task's `job-3.json`, stands."""
        _, _, task = file.stem.partition("-")
        return cls(file.parent, int(task) if task.isdigit() else None)

    @property
    def spec_file(self) -> Path:
        """What every attempt runs."""
        return self.path / ("job.json" if self.task is None else f"job-{self.task}.json")

    @property
    def _attempts_file(self) -> str:
        return "attempts.jsonl" if self.task is None else f"attempts-{self.task}.jsonl"

    @property
    def code(self) -> Path:
        """The code that the attempts run."""
        return self.path / "code"

    @property
    def config(self) -> Path:
        """The complete configuration of a training run."""
        return self.path / "config.yaml"

    @property
    def endings(self) -> Path:
        """A folder for each attempt, in which each rank says how it ended."""
        return self.path / ("endings" if self.task is None else f"endings-{self.task}")

    @property
    def submitit(self) -> Path:
        """What submitit writes: the script, and a pickle that holds this directory's path."""
        return self.path / "submitit"

    def make(self) -> None:
        """Make the directory, for its owner alone.

        Raises:
            StorageError, NotWritable: the disk refused.
        """
        make_private(self.path)

    def require_own(self) -> None:
        """Refuse a directory of somebody else: what stands in it is run, resumed or cancelled.

        Raises:
            BadInput: it, or something in it, is somebody else's, or cannot be looked at.
        """
        try:
            # A sweep's element runs the code in the sweep's own directory.
            for folder in {self.path, self.code.resolve().parent}:
                require_own(folder)
                if folder.is_dir():
                    require_own_entries(folder)
        except OSError as error:
            raise BadInput(f"cannot look at {self.path}: {error.strerror}") from None

    def spec(self) -> JobSpec:
        """What every attempt runs.

        Raises:
            BadInput: there is no such file, or it is damaged.
        """
        try:
            return JobSpec.from_json(self.spec_file.read_bytes())
        except FileNotFoundError:
            raise BadInput(f"{self.path} is no job directory: it has no job.json") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"cannot read {self.spec_file}: {error}") from None

    def write_spec(self, spec: JobSpec) -> None:
        """Freeze what the attempts run.

        Raises:
            StorageError, NotWritable: the disk refused.
        """
        write_atomically(self.spec_file, spec.to_json())

    def submitted(self, job: str, by: str, *, after: str = "") -> None:
        """Note a job that Slurm was given.

        Args:
            job: its id.
            by: `launch`, `sbatch`, `resume`, `successor`.
            after: the job that a successor follows.

        Raises:
            StorageError, NotWritable: the disk refused.
        """
        row = {"job": job, "by": by, "time": time.time()}
        self._append("submissions.jsonl", row | ({"after": after} if after else {}))

    def jobs(self) -> list[str]:
        """The ids of all jobs that Slurm was given, oldest first."""
        return [row["job"] for row in self._rows("submissions.jsonl") if _is_job(row.get("job"))]

    def lineage(self, job: str) -> set[str]:
        """A job and those that it succeeded: what one submission by a person has led to."""
        before = {row["job"]: row["after"] for row in self._rows("submissions.jsonl")
                  if _is_job(row.get("job")) and _is_job(row.get("after"))}  # fmt: skip
        found = {job}
        while (job := before.get(job, "")) and job not in found:
            found.add(job)
        return found

    def began(self, attempt: Attempt) -> None:
        """Note that an attempt begins.

        Raises:
            StorageError, NotWritable: the disk refused.
        """
        self._append(self._attempts_file, dataclasses.asdict(attempt))

    def ended(self, attempt: Attempt) -> None:
        """Note how an attempt ended; it takes the place of the row that it began with.

        Raises:
            StorageError, NotWritable: the disk refused.
        """
        self.began(attempt)

    def attempts(self) -> list[Attempt]:
        """All attempts of this job or of this task of an array, oldest first."""
        found: dict[int, Attempt] = {}
        names = {field.name for field in dataclasses.fields(Attempt)}
        for row in self._rows(self._attempts_file):
            try:
                attempt = _attempt({name: row[name] for name in row.keys() & names})
            except (ValueError, TypeError):
                continue
            found[attempt.number] = attempt
        return [found[number] for number in sorted(found)]

    def _append(self, name: str, row: dict[str, Any]) -> None:
        """One row in one write, so that a kill tears at most the last."""
        path = self.path / name
        try:
            with path.open("ab", buffering=0) as file:
                file.write(f"{json.dumps(row)}\n".encode())
        except OSError as error:
            raise storage_error(path, error) from error

    def _rows(self, name: str) -> Iterator[dict[str, Any]]:
        try:
            lines: Iterable[bytes] = (self.path / name).read_bytes().splitlines()
        except OSError:
            return
        for line in lines:
            try:
                row = json_values.parse(line)
            except ValueError:  # torn by a kill
                continue
            if isinstance(row, dict):
                yield row


def _is_job(value: Any) -> bool:
    """Whether a row's value can be an id of Slurm's."""
    return isinstance(value, str) and _JOB.fullmatch(value) is not None


def _attempt(row: dict[str, Any]) -> Attempt:
    """An attempt from a row.

    Raises:
        ValueError, TypeError: a value is missing, or of another type.
    """
    attempt = Attempt(**row)
    json_values.whole(attempt.number)
    json_values.whole(attempt.tasks)
    json_values.number(attempt.began)
    json_values.flag(attempt.preempted)
    for text in (attempt.job, attempt.reason, attempt.decision):
        json_values.text(text)
    for count in (attempt.from_step, attempt.to_step, attempt.code):
        if count is not None:
            json_values.whole(count, least=-json_values.MOST)
    if attempt.ended is not None:
        json_values.number(attempt.ended)
    return dataclasses.replace(attempt, nodes=json_values.texts(attempt.nodes))
