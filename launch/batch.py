"""The batch side of a job: starts the ranks, and decides what follows when they have ended.

It is one process on the first node of the allocation. It stays when the ranks are told to stop, since
what is right then depends on why: a job that reached its time limit or was preempted goes back into the
queue, a job that somebody cancelled must stay cancelled, and a run that fails again and again must not
occupy nodes for ever. What each decision rests on was measured; `slurm/README.md` has it.

    python -m launch.batch train --config FILE --run_dir DIR …      what slurm/*.sbatch call
    python -m launch.batch run JOB_DIR/job.json                     a job that was frozen before
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from agrivision.ending import Ending, read_endings
from agrivision.errors import AgrivisionError, BadInput, ExitCode
from agrivision.rundir import RunDirectory
from agrivision.storage import make_private
from agrivision.world import expand_hosts, tasks_by_node
from launch import slurm
from launch.freeze import freeze_code, freeze_train, job_directory, python_of_this, value_of
from launch.jobdir import Attempt, JobDirectory, JobSpec

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_ASK_AGAIN_SECONDS = 5.0
_ASKS = 6  # a controller that restarts is back within half a minute
_STEP_WAIT = 60  # a rank that ended early leaves the others this many seconds
_ENDED = frozenset({ExitCode.DONE, ExitCode.BAD_INPUT, ExitCode.HOPELESS})


def main(argv: Sequence[str] | None = None) -> int:
    """Run an attempt of the job that the command line names; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        signals = _Signals().listen()
        if words[:1] == ["run"] and len(words) == 2:
            return run(JobDirectory.of_spec(Path(words[1])), signals)
        return run(_freeze(words), signals)
    except AgrivisionError as error:
        _say(f"error: {error}")
        return int(error.exit_code)


def _say(line: str) -> None:
    clock = time.strftime("%Y-%m-%dT%H:%M:%S")
    sys.stdout.write(f"{clock} launch: {' '.join(line.split())}\n")
    sys.stdout.flush()


def _freeze(words: Sequence[str]) -> JobDirectory:
    """Make the job directory of a plain `sbatch`; a requeued job finds its own."""
    command, arguments = (words[0], words[1:]) if words else ("", [])
    if command not in ("train", "prepare", "evaluate", "predict"):
        raise BadInput("give a command (train, prepare, evaluate or predict) and its arguments")
    place = _Place.from_environment()
    if command == "train":
        job, run_dir, frozen = _find_or_freeze_train(place, arguments)
    else:
        job, run_dir, frozen = (
            job_directory(command, arguments, place.task),
            None,
            (command, *arguments),
        )
        job.make()
    if place.restart == 0 and place.job not in job.jobs():
        freeze_code(job, again=True)
        python = shlex.split(os.environ.get("AGRIVISION_PYTHON", "")) or python_of_this()
        job.write_spec(
            JobSpec(
                command=frozen,
                python=tuple(python),
                srun=tuple(shlex.split(os.environ.get("AGRIVISION_SRUN", ""))),
                run_dir="" if run_dir is None else str(run_dir),
                cwd=str(Path.cwd()),
                max_attempts=_number("AGRIVISION_MAX_ATTEMPTS", 100),
                signal_seconds=_number("AGRIVISION_SIGNAL_SECONDS", 0),
            )
        )
        job.submitted(place.job, "sbatch")
    return job


def _find_or_freeze_train(
    place: _Place, arguments: Sequence[str]
) -> tuple[JobDirectory, Path, tuple[str, ...]]:
    """The first attempt freezes the configuration; the later ones must not read the files again."""
    run_dir = value_of(arguments, "--run_dir")
    if run_dir is not None:
        job = JobDirectory.of_run(Path(run_dir).absolute())
        if place.restart and job.spec_file.is_file():
            spec = job.spec()
            return job, Path(spec.run_dir), spec.command
    return freeze_train(arguments)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if text and not text.isdigit():
        raise BadInput(f"the environment variable {name} is {text!r}, not a whole number")
    return int(text) if text else default


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where in the cluster this process is.

    Attributes:
        job: id by which Slurm's commands know the job: `17`, or `17_3` in an array.
        raw_job: SLURM_JOB_ID, which differs from it in an array.
        task: in an array, else None.
        restart: how often the job was requeued before.
        nodes: names.
        tasks_per_node: ranks on each node.
    """

    job: str
    raw_job: str
    task: int | None
    restart: int
    nodes: tuple[str, ...]
    tasks_per_node: int

    @property
    def tasks(self) -> int:
        """Ranks on all nodes."""
        return len(self.nodes) * self.tasks_per_node

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> _Place:
        raw = environment.get("SLURM_JOB_ID", "")
        if not raw:
            raise BadInput(
                "this is the batch side of a Slurm job: submit it with sbatch, or use launch"
            )
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        return cls(
            job=f"{array}_{task}" if array and task else raw,
            raw_job=raw,
            task=int(task) if task else None,
            restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
            nodes=tuple(expand_hosts(environment.get("SLURM_JOB_NODELIST", ""))),
            tasks_per_node=_tasks_per_node(environment),
        )


def _tasks_per_node(environment: Mapping[str, str]) -> int:
    """Ranks on each node: as many as were asked for, else one for each GPU, else one."""
    told, gpus = environment.get("SLURM_NTASKS_PER_NODE", ""), environment.get("SLURM_GPUS_ON_NODE", "")
    if told.isdigit():
        return int(told)
    counts = set(tasks_by_node(environment.get("SLURM_TASKS_PER_NODE", "")))
    if len(counts) > 1:
        raise BadInput("the nodes have different numbers of tasks: ask for them with --ntasks-per-node")
    asked = counts.pop() if counts else 1
    return int(gpus) if asked == 1 and gpus.isdigit() and int(gpus) else asked


class _Signals:
    """Remembers the signals that the batch side gets, and passes them on to srun."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self.step: subprocess.Popen[bytes] | None = None

    def listen(self) -> _Signals:
        """Install the handlers."""
        for number in _SIGNALS:
            signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.received.append(signal.Signals(number))
        # Mostly Slurm has told the ranks itself, who hear it twice then; but with `--signal=B:…`, and
        # where somebody signals the batch side alone, nobody else does.
        if self.step is not None and self.step.poll() is None:
            self.step.send_signal(number)


def run(job: JobDirectory, signals: _Signals | None = None) -> int:
    """Run one attempt of a job, and decide what follows.

    Args:
        job: frozen before.
        signals: handlers that are installed already; None installs them.

    Returns:
        The exit code of the batch job.

    Raises:
        AgrivisionError: in one line, what is wrong.
    """
    signals = signals or _Signals().listen()
    return _Batch(job, job.spec(), _Place.from_environment(), signals).go()


@dataclass(frozen=True, kw_only=True)
class _Result:
    """How the ranks ended.

    Attributes:
        code: that stands for all of them.
        line: what the rank said that began it.
        traceback: likewise.
    """

    code: int
    line: str
    traceback: str = ""


class _Batch:
    """One attempt."""

    def __init__(self, job: JobDirectory, spec: JobSpec, place: _Place, signals: _Signals) -> None:
        self._job, self._spec, self._place, self._signals = job, spec, place, signals

    def go(self) -> int:
        """Run the ranks to their end, and decide what follows; returns the batch job's exit code."""
        before = self._job.attempts()
        attempt = self._begin(len(before) + 1)
        result = self._step()
        attempt = dataclasses.replace(
            attempt,
            ended=time.time(),
            to_step=self._latest_step(),
            code=result.code,
            reason=result.line,
        )
        return self._decide(before, attempt, result)

    def _begin(self, number: int) -> Attempt:
        nodes = self._place.nodes
        attempt = Attempt(
            number=number,
            job=self._place.job,
            nodes=nodes,
            tasks=self._place.tasks,
            began=time.time(),
            from_step=self._latest_step(),
        )
        self._job.began(attempt)
        at = f", from step {attempt.from_step}" if attempt.from_step else ""
        _say(f"attempt {number} on {' '.join(nodes)}, {attempt.tasks} ranks{at}: {self._shown()}")
        return attempt

    def _shown(self) -> str:
        return shlex.join(self._spec.command)

    def _latest_step(self) -> int | None:
        return RunDirectory(Path(self._spec.run_dir)).latest_step() if self._spec.run_dir else None

    def _step(self) -> _Result:
        """Run the ranks, and hear how they ended."""
        shutil.rmtree(self._job.endings, ignore_errors=True)
        make_private(self._job.endings)
        command = self._srun()
        try:
            process = subprocess.Popen(command, env=self._environment(), cwd=self._spec.cwd or None)
        except FileNotFoundError:
            raise BadInput("no srun on the PATH of the batch job") from None
        self._signals.step = process
        code = process.wait()
        return _judge(read_endings(self._job.endings), code, self._place.tasks)

    def _srun(self) -> list[str]:
        return [
            "srun",
            f"--nodes={len(self._place.nodes)}",
            f"--ntasks={self._place.tasks}",
            f"--ntasks-per-node={self._place.tasks_per_node}",
            "--kill-on-bad-exit=1",
            f"--wait={_STEP_WAIT}",
            "--unbuffered",
            *self._spec.srun,
            *self._spec.python,
            "-m",
            "agrivision",
            *self._spec.command,
        ]

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        if "SLURM_CPUS_PER_TASK" in environment:  # srun does not take it over by itself since 22.05
            environment.setdefault("SRUN_CPUS_PER_TASK", environment["SLURM_CPUS_PER_TASK"])
        path = [str(self._job.code), environment.get("PYTHONPATH", "")]
        own = {
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "AGRIVISION_JOB_DIR": str(self._job.path),
            "AGRIVISION_ENDINGS": str(self._job.endings),
            "AGRIVISION_EARLIER_JOBS": " ".join(self._earlier_jobs()),
            "AGRIVISION_SIGNAL_SECONDS": str(self._spec.signal_seconds),
        }
        return environment | own

    def _earlier_jobs(self) -> list[str]:
        """Jobs of this directory that are over: their ranks, if any are left, must not write."""
        others = [job for job in self._job.jobs() if job not in (self._place.job, self._place.raw_job)]
        if self._place.task is not None or not others:
            return []
        try:
            known = slurm.queue(others)
        except slurm.SlurmError:
            return []
        alive = {"PENDING", "RUNNING", "SUSPENDED", "CONFIGURING", "COMPLETING", "STOPPED"}
        return [job for job in others if job not in known or known[job].state not in alive]

    def _decide(self, before: Sequence[Attempt], attempt: Attempt, result: _Result) -> int:
        """What follows an attempt that has ended; returns the exit code of the batch job."""
        if result.code in _ENDED:
            decision = "done" if result.code == ExitCode.DONE else "given up"
            return self._end(attempt, decision, result, result.code)
        now = self._ask()
        attempt = dataclasses.replace(attempt, preempted=now is not None and now.preempted)
        if now is None:
            line = "Slurm does not answer: submit again with the same command, or `launch resume`"
            return self._end(attempt, "not requeued", result, result.code, line)
        if not now.running:
            line = f"the job is {now.state} in Slurm's books: it is left so; `launch resume` goes on"
            return self._end(attempt, f"left {now.state.lower()}", result, result.code, line)
        refusal = self._out_of_patience([*before, attempt])
        if refusal:
            return self._end(attempt, "given up", result, ExitCode.HOPELESS, refusal)
        return self._again(attempt, result)

    def _ask(self) -> slurm.QueuedJob | None:
        """What Slurm says of this job; None where it does not say."""
        for ask in range(_ASKS):
            if ask:
                time.sleep(_ASK_AGAIN_SECONDS)
            try:
                found = slurm.queue([self._place.raw_job])
            except slurm.SlurmError as error:
                _say(f"cannot ask for the job's state: {error}")
                continue
            return found.get(self._place.raw_job)
        return None

    def _out_of_patience(self, attempts: Sequence[Attempt]) -> str:
        """Why the run is not tried again; empty where it is."""
        if len(attempts) >= self._spec.max_attempts:
            return f"{len(attempts)} attempts are enough (max_attempts)"
        stalled = 0
        for attempt in reversed(attempts):
            if attempt.ended is None or attempt.preempted:
                continue  # neither says anything about the run itself
            if _progressed(attempt):
                break
            stalled += 1
        if stalled >= self._spec.max_stalled:
            return f"{stalled} attempts in a row got no further"
        return ""

    def _again(self, attempt: Attempt, result: _Result) -> int:
        _say(f"ended with {result.code} ({result.line or 'asked to stop'}): back into the queue")
        # Noted before: the requeue ends this process.
        self._job.ended(dataclasses.replace(attempt, decision="requeued"))
        try:
            slurm.requeue(self._place.job)
        except slurm.SlurmError as error:
            _say(f"cannot requeue ({error}): submitting a successor")
            return self._succeed(attempt, result)
        return int(result.code)

    def _succeed(self, attempt: Attempt, result: _Result) -> int:
        """Where requeueing is disabled, or the job will be gone: another job like this one."""
        try:
            successor = slurm.submit_successor(
                self._place.raw_job, self._again_command(), self._successor_options()
            )
        except AgrivisionError as error:
            line = f"cannot submit a successor either ({error}): `launch resume` goes on"
            return self._end(attempt, "not requeued", result, result.code, line)
        self._job.submitted(successor, "successor")
        for dependent in self._spec.dependents:
            try:
                slurm.update(dependent, Dependency=f"afterok:{successor}")
            except slurm.SlurmError as error:
                _say(f"job {dependent} does not wait for the successor: {error}")
        line = f"job {successor} goes on when this one is over"
        return self._end(attempt, f"successor {successor}", result, result.code, line)

    def _again_command(self) -> list[str]:
        return [sys.executable, "-m", "launch.batch", "run", str(self._job.spec_file)]

    def _successor_options(self) -> list[str]:
        spec, place = self._spec, self._place
        options = [f"--ntasks-per-node={place.tasks_per_node}", "--open-mode=append"]
        if spec.signal_seconds:
            options.append(f"--signal=USR1@{spec.signal_seconds}")
        return options

    def _end(self, attempt: Attempt, decision: str, result: _Result, code: int, line: str = "") -> int:
        self._job.ended(dataclasses.replace(attempt, decision=decision))
        if decision == "done":
            _say(f"done after {attempt.number} attempts")
            return int(code)
        if decision == "given up" and result.traceback:
            sys.stdout.write(result.traceback.rstrip() + "\n")
        said = [result.line or f"ended with {result.code}", line]
        _say(f"{decision}: {'; '.join(filter(None, said))}")
        return int(code)


def _progressed(attempt: Attempt) -> bool:
    """Whether an attempt got further; for commands without steps, whether it could finish in order."""
    if attempt.to_step is None and attempt.from_step is None:
        return attempt.code == ExitCode.STOPPED
    return (attempt.to_step or 0) > (attempt.from_step or 0)


def _judge(endings: Sequence[Ending], code: int, tasks: int) -> _Result:
    """One result for all ranks.

    The rank that could not go on counts, not those that left because it did: first what cannot be
    mended by trying again, then what was not foreseen, then the earliest of the rest.

    Args:
        endings: of those that said something.
        code: of srun.
        tasks: number of ranks.
    """
    if len(endings) == tasks and all(ending.code == ExitCode.DONE for ending in endings):
        return _Result(code=ExitCode.DONE, line="")
    for sort in (ExitCode.HOPELESS, ExitCode.BAD_INPUT):
        for ending in endings:
            if ending.code == sort:
                return _Result(code=sort, line=f"rank {ending.rank}: {ending.line}")
    silent = sorted(set(range(tasks)) - {ending.rank for ending in endings})
    failed = sorted(
        (ending for ending in endings if ending.code not in (ExitCode.DONE, ExitCode.STOPPED)),
        key=lambda ending: (not ending.traceback, ending.time),
    )
    if failed and failed[0].traceback:
        first = failed[0]
        return _Result(code=1, line=f"rank {first.rank}: {first.line}", traceback=first.traceback)
    if silent:
        some = ", ".join(str(rank) for rank in silent[:8])
        code = code if code > 128 else 1
        return _Result(code=code, line=f"rank {some} ended without a word (srun: {code})")
    if failed:
        return _Result(code=1, line=f"rank {failed[0].rank}: {failed[0].line}")
    return _Result(code=ExitCode.STOPPED, line="")


if __name__ == "__main__":
    sys.exit(main())
