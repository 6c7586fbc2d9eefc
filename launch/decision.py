"""What follows an attempt that has ended: pure functions of what its ranks and Slurm say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from agrivision.ending import STALLED, Ending
from agrivision.errors import ExitCode
from launch.jobdir import Attempt, JobSpec
from launch.slurm import QueuedJob

_LIMIT_DRIFT = 60  # Slurm's signal comes up to half a minute early, and the ranks take time to save
_SHOWN = 8
_LOST_FACTOR = 2  # a lost node is seldom the run's fault, several in a row may be
_LOSS = "lost the other ranks"  # how agrivision.errors.PeerLost begins


@dataclass(frozen=True, kw_only=True)
class Result:
    """How the ranks ended.

    Attributes:
        code: that stands for all of them.
        line: what the rank said that began it; empty where nothing went wrong.
        traceback: likewise.
    """

    code: int
    line: str
    traceback: str = ""


def judge(endings: Sequence[Ending], code: int, ranks: Sequence[str]) -> Result:
    """One result for all ranks.

    The rank that could not go on counts, not those that left because it did: first what cannot be
    mended by trying again, then whom a watchdog named, then what was not foreseen, then who said
    nothing, then the earliest of the rest.

    Args:
        endings: of those that said something.
        code: of srun.
        ranks: what to call each rank.
    """
    if len(endings) == len(ranks) and all(ending.code == ExitCode.DONE for ending in endings):
        return Result(code=ExitCode.DONE, line="")
    said = [f"{ranks[ending.rank]}: {ending.line}" for ending in endings]
    clear = _clear(endings, said)
    if clear is not None:
        return clear
    silent = sorted(set(range(len(ranks))) - {ending.rank for ending in endings})
    failed = sorted(
        (not ending.traceback, ending.time, line, ending.traceback)
        for ending, line in zip(endings, said, strict=True)
        if ending.code not in (ExitCode.DONE, ExitCode.STOPPED)
    )
    if failed and failed[0][3]:
        return Result(code=ExitCode.FAILED, line=failed[0][2], traceback=failed[0][3])
    # Who lost a rank that said nothing has nothing to add.
    first = [line for _, _, line, _ in failed if not silent or _LOSS not in line][:1]
    if silent:
        line = "; ".join([_silence([ranks[rank] for rank in silent], code), *first])
        return Result(code=code if code > 128 else ExitCode.FAILED, line=line)
    if first:
        return Result(code=ExitCode.FAILED, line=first[0])
    return Result(code=ExitCode.STOPPED, line="")


def _clear(endings: Sequence[Ending], said: Sequence[str]) -> Result | None:
    """What counts whatever the others say."""
    for sort in (ExitCode.HOPELESS, ExitCode.BAD_INPUT):
        for ending, line in zip(endings, said, strict=True):
            if ending.code == sort:
                return Result(code=sort, line=line)
    stalls = [(ending.time, ending.line) for ending in endings if ending.line.startswith(STALLED)]
    if not stalls:
        return None
    # All say the same, of a rank that may itself have said nothing.
    return Result(code=ExitCode.FAILED, line=min(stalls)[1])


def _silence(ranks: Sequence[str], code: int) -> str:
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return f"{', '.join(ranks[:_SHOWN])}{more} ended without a word (srun: {code})"


class Next(Enum):
    """What to do with a job whose ranks have ended."""

    END = auto()  # it is done, or cannot be mended by trying again
    ASK_SOMEBODY = auto()  # Slurm does not say how the job is
    LEAVE = auto()  # somebody else decides: it was cancelled, or Slurm requeues it itself
    SUPERSEDED = auto()  # Slurm has started it again elsewhere
    GIVE_UP = auto()  # it has been tried often enough
    AGAIN = auto()


def decide(result: Result, now: QueuedJob | None, restart: int, refusal: str) -> Next:
    """What to do with a job whose ranks have ended.

    Args:
        result: of this attempt.
        now: what Slurm says of the job; None where it does not answer.
        restart: how often the job had been requeued when this attempt began.
        refusal: why it is not to be tried again; empty where it is.
    """
    if result.code in (ExitCode.DONE, ExitCode.BAD_INPUT, ExitCode.HOPELESS):
        return Next.END
    if now is None:
        return Next.ASK_SOMEBODY
    # A node that Slurm has lost may still run this process, and hear that the job is RUNNING: that is
    # the next attempt, which a requeue would end.
    if now.restarts > restart and now.running:
        return Next.SUPERSEDED
    if not now.running:
        return Next.LEAVE
    return Next.GIVE_UP if refusal else Next.AGAIN


def out_of_patience(attempts: Sequence[Attempt], spec: JobSpec) -> str:
    """Why a run is not tried again; empty where it is.

    Args:
        attempts: all of them, the last one ended, oldest first.
        spec: has the bounds.
    """
    if attempts and attempts[-1].number >= spec.max_attempts:
        return f"{attempts[-1].number} attempts are enough (max_attempts)"
    stalled = lost = 0
    later: int | None = None  # where the attempt after began: what one that was lost had reached
    for attempt in reversed(attempts):
        if progressed(attempt, spec, later):
            break
        if attempt.ended is None:
            lost += 1
        elif not attempt.preempted:  # that says nothing about the run itself
            stalled += 1
        later = attempt.from_step
    if stalled >= spec.max_stalled:
        return f"{stalled} attempts in a row got no further"
    if lost >= _LOST_FACTOR * spec.max_stalled:
        return (
            f"{lost} attempts in a row were lost without getting further: does the run take nodes down?"
        )
    return ""


def progressed(attempt: Attempt, spec: JobSpec, later: int | None = None) -> bool:
    """Whether an attempt got further.

    Args:
        attempt: ended, or lost with its node.
        spec: what it ran. Without steps it could finish in order, where what it did is kept.
        later: step that the attempt after it began at.
    """
    if attempt.from_step is None:
        return attempt.code == ExitCode.STOPPED and spec.command[0] != "evaluate"
    reached = attempt.to_step if attempt.ended is not None else later
    return (reached or 0) > attempt.from_step


def why_stopped(now: QueuedJob | None, signal_seconds: int) -> str:
    """Why ranks that left in order were asked to.

    Args:
        now: what Slurm says of the job.
        signal_seconds: how long before the time limit the job asked to be warned; 0: not known.
    """
    if now is not None and now.preempted:
        return "preempted"
    left = None if now is None else now.seconds_left
    if left is not None and left <= signal_seconds + _LIMIT_DRIFT:
        return "time limit"
    return "asked to stop"
