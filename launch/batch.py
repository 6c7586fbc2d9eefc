"""The batch side of a job: starts the ranks, and sees to what follows when they have ended.

It is one process on the first node of the allocation. It stays when the ranks are told to stop, since
what is right then depends on why: a job that reached its time limit or was preempted goes back into the
queue, a job that somebody cancelled must stay cancelled, and a run that fails again and again must not
occupy nodes for ever. What each decision rests on was measured; `slurm/README.md` has it.

    python -m launch.batch train --config FILE --run_dir DIR …      where slurm/*.sbatch end up
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
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from agrivision.ending import read_endings
from agrivision.errors import AgrivisionError, BadInput, ExitCode, one_line, without_passwords
from agrivision.rundir import RunDirectory
from agrivision.storage import make_private
from launch import slurm
from launch.decision import Next, Result, decide, judge, out_of_patience, why_stopped
from launch.entry import become_frozen, with_code
from launch.freeze import freeze_submission, runs_from
from launch.jobdir import Attempt, JobDirectory, JobSpec, guard
from launch.place import Place
from launch.poll import SECONDS
from launch.turn import earlier_jobs

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_ASK_AGAIN_SECONDS = SECONDS
_ASKS = 30  # a controller that fails over, or is restarted, is back within minutes
_TRIES = 6
_STEP_WAIT = 60  # a rank that ended early leaves the others this many seconds
_DISABLED = "disabled"  # what scontrol says where a job may not be requeued
_STOPPED = Result(code=ExitCode.STOPPED, line="")


def main(argv: Sequence[str] | None = None) -> int:
    """Run an attempt of the job that the command line names; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        signals = _Signals().listen()
        if words[:1] == ["run"] and len(words) == 2:
            return run(JobDirectory.of_spec(Path(words[1])), signals)
        job = freeze_submission(words, Place.from_environment(), _say)
        if not runs_from(job.code):
            become_frozen(str(job.path), str(job.spec_file))
        return run(job, signals)
    except AgrivisionError as error:
        _say(f"error: {error}")
        return int(error.exit_code)


def _say(line: str) -> None:
    clock = time.strftime("%Y-%m-%dT%H:%M:%S")
    sys.stdout.write(f"{clock} launch: {one_line(without_passwords(' '.join(line.split())))}\n")
    sys.stdout.flush()


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
        self._tell(number)

    def _tell(self, number: int) -> None:
        if self.step is not None and self.step.poll() is None:
            # At SIGTERM srun kills its tasks at once, without their grace; others it hands on.
            self.step.send_signal(signal.SIGUSR1 if number == signal.SIGTERM else number)

    def reach(self, step: subprocess.Popen[bytes]) -> None:
        """Pass signals on to a step from now on, and those that came while it was being started."""
        self.step = step
        for number in self.received:
            self._tell(number)


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
    job.require_own()
    return _Batch(job, job.spec(), Place.from_environment(), signals).go()


class _Batch:
    """One attempt."""

    def __init__(self, job: JobDirectory, spec: JobSpec, place: Place, signals: _Signals) -> None:
        self._job, self._spec, self._place, self._signals = job, spec, place, signals

    def go(self) -> int:
        """Run the ranks to their end, and see to what follows; returns the batch job's exit code."""
        earlier = earlier_jobs(self._job, self._place, _say)
        before = self._job.attempts()
        if len(before) >= self._spec.max_attempts:  # Slurm requeues by itself, too
            _say(f"given up: {len(before)} attempts are enough (max_attempts)")
            return int(ExitCode.HOPELESS)
        attempt = self._begin(len(before) + 1)
        result = self._step(attempt, earlier)
        attempt = dataclasses.replace(
            attempt,
            ended=time.time(),
            to_step=self._latest_step(),
            code=int(result.code),
            reason=result.line,
        )
        return self._follow(before, attempt, result)

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
        command = shlex.join(self._spec.command)
        _say(f"attempt {number} on {' '.join(nodes)}, {attempt.tasks} ranks{at}: {command}")
        return attempt

    def _latest_step(self) -> int | None:
        return RunDirectory(Path(self._spec.run_dir)).latest_step() if self._spec.run_dir else None

    def _step(self, attempt: Attempt, earlier: Sequence[str]) -> Result:
        """Run the ranks, and hear how they ended."""
        # Those of earlier attempts go with it, and what their ranks on a lost node still may say.
        shutil.rmtree(self._job.endings, ignore_errors=True)
        endings = self._job.endings / str(attempt.number)
        make_private(endings)
        own = {
            "AGRIVISION_JOB_DIR": str(self._job.path),
            "AGRIVISION_ENDINGS": str(endings),
            "AGRIVISION_EARLIER_JOBS": " ".join(earlier),
            "AGRIVISION_SIGNAL_SECONDS": str(self._spec.signal_seconds),
        }
        if self._signals.received:
            return _STOPPED
        try:
            process = subprocess.Popen(
                self._srun(), env=self._environment() | own, cwd=self._spec.cwd or None
            )
        except FileNotFoundError:
            raise BadInput("no srun on the PATH of the batch job") from None
        self._signals.reach(process)
        code = process.wait()
        return judge(read_endings(endings), code, self._place.ranks)

    def _srun(self) -> list[str]:
        place = self._place
        return [
            "srun",
            f"--nodes={len(place.nodes)}",
            f"--ntasks={place.tasks}",
            f"--ntasks-per-node={place.tasks_per_node}",
            "--kill-on-bad-exit=1",
            f"--wait={_STEP_WAIT}",
            "--unbuffered",
            *(["--overcommit"] if place.overcommit else []),
            *self._spec.srun,
            *self._spec.python,
            "-m",
            "agrivision",
            *self._spec.command,
        ]

    def _environment(self) -> dict[str, str]:
        environment = with_code(str(self._job.code), os.environ)
        if self._place.cpus_per_task:  # srun does not take it over by itself since 22.05
            environment.setdefault("SRUN_CPUS_PER_TASK", str(self._place.cpus_per_task))
        return environment

    def _follow(self, before: Sequence[Attempt], attempt: Attempt, result: Result) -> int:
        """Do what has to follow an attempt; returns the exit code of the batch job."""
        over = decide(result, None, 0, "") == Next.END
        now = None if over else self._ask()
        line = result.line
        if result.code == ExitCode.STOPPED:
            line = why_stopped(now, self._spec.signal_seconds)
        attempt = dataclasses.replace(attempt, preempted=now is not None and now.preempted, reason=line)
        lineage = self._job.lineage(self._place.job)
        own = [each for each in before if each.job in lineage]
        refusal = out_of_patience([*own, attempt], self._spec)
        following = decide(result, now, self._place.restart, refusal)
        if following == Next.AGAIN:
            return self._again(attempt)
        if following == Next.GIVE_UP:
            sys.stdout.write(f"{result.traceback.rstrip()}\n" if result.traceback else "")
            return self._end(attempt, "given up", refusal, ExitCode.HOPELESS)
        if following == Next.END:
            sys.stdout.write(f"{result.traceback.rstrip()}\n" if result.traceback else "")
            return self._end(attempt, "done" if result.code == ExitCode.DONE else "given up")
        return self._leave(attempt, now, following)

    def _leave(self, attempt: Attempt, now: slurm.QueuedJob | None, following: Next) -> int:
        """Leave the job to somebody else."""
        if now is None:
            line = "Slurm does not answer; the same command, or `launch resume`, goes on"
            return self._end(attempt, "not requeued", line)
        if following == Next.SUPERSEDED:
            return self._end(attempt, "superseded", "Slurm has started the job again meanwhile")
        if now.restarts > self._place.restart:
            return self._end(attempt, "requeued", "Slurm itself puts the job back into the queue")
        line = f"the job is {now.state}, so it is left; the same command, or `launch resume`, goes on"
        return self._end(attempt, f"left {now.state.lower()}", line)

    def _ask(self) -> slurm.QueuedJob | None:
        """What Slurm says of this job; None where it does not say."""
        for _ in range(_ASKS):
            try:
                return slurm.queue([self._place.raw_job]).get(self._place.raw_job)
            except slurm.SlurmError as error:
                _say(f"cannot ask for the job's state: {error}")
            time.sleep(_ASK_AGAIN_SECONDS)
        return None

    def _again(self, attempt: Attempt) -> int:
        _say(f"ended with {attempt.code} ({attempt.reason}): back into the queue")
        # Noted before: the requeue ends this process.
        self._note(dataclasses.replace(attempt, decision="requeued"))
        for _ in range(_TRIES):
            try:
                slurm.requeue(self._place.job)
            except slurm.SlurmError as error:
                refusal = str(error)
            else:
                return int(attempt.code or 0)
            now = self._ask()
            if decide(_STOPPED, now, self._place.restart, "") != Next.AGAIN:
                return self._leave(attempt, now, Next.LEAVE)
            if _DISABLED in refusal:
                break
            time.sleep(_ASK_AGAIN_SECONDS)
        _say(f"cannot requeue ({refusal}): submitting a successor")
        return self._succeed(attempt)

    def _succeed(self, attempt: Attempt) -> int:
        """Where requeueing is disabled: another job like this one."""
        command = [sys.executable, "-m", "launch.batch", "run", str(self._job.spec_file)]
        command = ["env", *self._frozen_variables(), *command]
        try:
            successor = slurm.submit_successor(
                self._place.raw_job,
                command,
                self._successor_options(),
                guard(self._job.path, self._job.code),
            )
        except AgrivisionError as error:
            line = f"cannot submit a successor either ({error}): `launch resume` goes on"
            return self._end(attempt, "not requeued", line)
        self._job.submitted(successor, "successor", after=self._place.job)
        for dependent in self._spec.dependents:
            try:
                slurm.update(dependent, Dependency=f"afterok:{successor}")
            except slurm.SlurmError as error:
                _say(f"job {dependent} does not wait for the successor: {error}")
        line = f"job {successor} goes on when this one is over"
        return self._end(attempt, f"successor {successor}", line)

    def _frozen_variables(self) -> list[str]:
        found = with_code(str(self._job.code), os.environ)
        return [f"{name}={found[name]}" for name in ("PYTHONPATH", "PYTHONSAFEPATH")]

    def _successor_options(self) -> list[str]:
        spec, nodes = self._spec, self._spec.resources.get("nodes")
        # Not requeued either, as this one: else there were no successor.
        options = ["--open-mode=append", "--no-requeue"]
        if nodes:  # a range, which the running job does not tell
            options.append(f"--nodes={nodes}")
        if spec.signal_seconds:
            options.append(f"--signal=USR1@{spec.signal_seconds}")
        return options

    def _note(self, attempt: Attempt) -> None:
        """Write down how the attempt ended; a disk that refuses does not change what follows."""
        try:
            self._job.ended(attempt)
        except AgrivisionError as error:
            _say(f"cannot note how the attempt ended: {error}")

    def _end(self, attempt: Attempt, decision: str, line: str = "", code: int | None = None) -> int:
        self._note(dataclasses.replace(attempt, decision=decision))
        if decision == "done":
            _say(f"done after {attempt.number} attempts")
        else:
            said = attempt.reason or f"ended with {attempt.code}"
            _say(f"{decision}: {'; '.join(filter(None, [said, line]))}")
        return int(attempt.code or 0) if code is None else int(code)


if __name__ == "__main__":
    sys.exit(main())
