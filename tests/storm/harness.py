"""Takes a run through a storm, and says how it came out of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from agrivision import checkpoint
from agrivision.errors import CheckpointError, ExitCode
from tests.heard import hear
from tests.storm import oracle, weather
from tests.storm.chaos import Plan, in_forked, rows
from tests.storm.weather import Damage, Fault

ROOT = Path(__file__).parents[2]
_ATTEMPT_SECONDS = 300.0  # an attempt that takes longer hangs
_PAUSE_SECONDS = 1.0
_POLL_SECONDS = 0.02
_SETTLED = 3  # steps of an attempt after which its gauges are compared with those of others
_GIVEN_UP = {int(ExitCode.BAD_INPUT), int(ExitCode.HOPELESS)}

Ranks = Callable[[Plan, Sequence[str], int, Path], int]
"""Runs an attempt: what happens to it, the command's words, how many ranks, and a file for what they
say; returns the exit code."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """The run that goes through storms.

    Attributes:
        dataset: that it trains on.
        words: `train …` without the run directory and the number of threads.
        steps: of the whole run.
        save_every: steps from one checkpoint to the next.
        evaluate_every: steps from one validation to the next.
        reference: run directory of the run that nothing disturbed.
        ranks: how its ranks are started.
    """

    dataset: Path
    words: tuple[str, ...]
    steps: int
    save_every: int
    evaluate_every: int
    reference: Path
    ranks: Ranks

    def storm(self, seed: int, count: int, **limits: Any) -> list[Fault]:
        """The faults of a storm that fits this run; `limits` are those of `weather.storm`."""
        return weather.storm(
            seed,
            count,
            steps=self.steps,
            save_every=self.save_every,
            evaluate_every=self.evaluate_every,
            **limits,
        )


@dataclass(kw_only=True)
class Attempt:
    """What became of one attempt.

    Attributes:
        faults: that were due in it.
        ranks: how many.
        code: exit code.
        seconds: that it took.
        strikes: what was struck where, a row for each fault.
        gauges: of rank 0, by step.
        size: of the run directory afterwards, in bytes.
    """

    faults: Sequence[Fault]
    ranks: int
    code: int
    seconds: float
    strikes: list[dict[str, Any]]
    gauges: list[dict[str, Any]]
    size: int

    @property
    def first(self) -> int | None:
        """The step that it went on from; None where it came to no step."""
        return self.gauges[0]["step"] if self.gauges else None

    @property
    def last(self) -> int:
        """The last step that it has done, 0 for none."""
        return max((row["step"] for row in self.gauges), default=0)


@dataclass(kw_only=True)
class Report:
    """What a storm did.

    Attributes:
        seed: of the storm.
        faults: that were due.
        attempts: that it took.
        repeated: steps that were done once more.
        seconds: that it took.
        damaged: names of the checkpoints that were damaged.
        wrong: what should not be, a line each.
    """

    seed: int
    faults: list[Fault]
    attempts: list[Attempt] = field(default_factory=list)
    repeated: int = 0
    seconds: float = 0.0
    damaged: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def struck(self) -> int:
        """How many faults have happened."""
        return sum(len(attempt.strikes) for attempt in self.attempts)


def undisturbed(course: Course, notes: Path, ranks: int) -> Report:
    """Make the run that nothing disturbs; says what it held on to that it should not have."""
    report = Report(seed=-1, faults=[])
    attempt = _attempt(course, course.reference, notes, [], ranks, threads=1)
    report.attempts.append(attempt)
    report.seconds = attempt.seconds
    if attempt.code:
        report.wrong.append(f"the run that nothing disturbs ended with {attempt.code}")
    report.wrong += _said(notes / "said.txt")
    report.wrong += oracle.growth_within("undisturbed", attempt.gauges)
    return report


def endure(
    course: Course,
    faults: list[Fault],
    folder: Path,
    *,
    seed: int,
    tell: Callable[[str], None] = lambda _: None,
) -> Report:
    """Take a run through a storm, to its end, and compare it with the one that nothing disturbed.

    Args:
        course: of the run; its reference is there.
        faults: in their order.
        folder: for the run and the notes, which does not exist.
        seed: of the storm, for the report.
        tell: called with a line for each fault.
    """
    run_dir, report = folder / "run", Report(seed=seed, faults=faults)
    begin = time.monotonic()
    try:
        _go_through(course, run_dir, folder / "notes", report, tell)
    except AssertionError as error:  # an attempt hangs
        report.wrong.append(str(error))
    report.seconds = time.monotonic() - begin
    if not report.wrong:
        report.wrong += _judge(course, run_dir, report)
    return report


def _go_through(
    course: Course, run_dir: Path, notes: Path, report: Report, tell: Callable[[str], None]
) -> None:
    """Run attempt after attempt, up to the first that should not have ended as it did."""
    reached = 0
    # After those that the faults end, the attempt that nothing disturbs on its way to the end.
    for number, group in enumerate([*weather.attempts(report.faults), []]):
        ranks, threads = (group[0].ranks, group[0].threads) if group else (2, 1)
        attempt = _attempt(course, run_dir, notes / f"{number:02d}", group, ranks, threads)
        report.attempts.append(attempt)
        repeated = 0
        if attempt.first is not None:
            repeated, reached = max(0, reached - attempt.first), attempt.last
        report.repeated += repeated
        for fault, strike in zip(group, attempt.strikes, strict=False):
            tell(_line(fault, strike, attempt, repeated))
        report.wrong += _wrong(attempt, notes / f"{number:02d}")
        if report.wrong:
            return
        for fault in group:
            if fault.damage is not None:
                report.damaged += damage(run_dir, fault.damage)


def _wrong(attempt: Attempt, notes: Path) -> list[str]:
    """What an attempt did that none may do."""
    wrong = _said(notes / "said.txt")
    missed = attempt.faults[len(attempt.strikes) :]
    wrong += [f"it never happened (the attempt ended with {attempt.code}): {fault}" for fault in missed]
    if attempt.code in _GIVEN_UP:
        wrong.append(f"an attempt ended with {attempt.code}: a job would not come back ({notes})")
    if not attempt.faults and attempt.code:
        wrong.append(f"the last attempt, which nothing disturbed, ended with {attempt.code} ({notes})")
    if any(row["shared"] for row in attempt.gauges):
        wrong.append("something is in /dev/shm")
    # torch.compile's cache is there for the next one.
    kept = [path.name for path in notes.glob("tmp/*") if not path.name.startswith("torchinductor_")]
    return wrong + [f"{name} is left over in TMPDIR" for name in kept]


def _said(file: Path) -> list[str]:
    """Whatever happens to a rank, it never ends in a traceback."""
    return oracle.tracebacks(file.read_text(errors="replace")) if file.exists() else []


def _judge(course: Course, run_dir: Path, report: Report) -> list[str]:
    wrong = oracle.differences(run_dir, course.reference, course.dataset, report.damaged)
    # What depends on the number of ranks (a connection each) and of threads is taken off first.
    settled = []
    for attempt in report.attempts:
        if len(attempt.gauges) > _SETTLED:
            threads = attempt.faults[0].threads if attempt.faults else 1
            row = attempt.gauges[_SETTLED]
            settled.append(row | {"threads": row["threads"] - threads, "ranks": attempt.ranks})
    for key in ("threads", "files", "kib"):
        for ranks in {row["ranks"] for row in settled}:
            alike = [row for row in settled if row["ranks"] == ranks]
            least = min(row[key] for row in alike)
            for row in alike:
                row[key] -= least
    return wrong + oracle.growth_over("from attempt to attempt", settled)


def _line(fault: Fault, strike: dict[str, Any], attempt: Attempt, repeated: int) -> str:
    where = "before the first step" if strike["step"] < 0 else f"step {strike['step']}"
    begun = "and came to no step"
    if attempt.first is not None:
        begun = f"from step {attempt.first} on, {repeated} of them once more"
    return (
        f"{fault} ({where}, phase {strike['phase']}) → exit code {attempt.code}; the attempt took"
        f" {attempt.seconds:.1f} s {begun}"
    )


def _attempt(
    course: Course, run_dir: Path, notes: Path, faults: Sequence[Fault], ranks: int, threads: int
) -> Attempt:
    plan = Plan(notes, tuple(faults))
    plan.write()
    words = [*course.words, "--run_dir", str(run_dir), "--data.threads", str(threads)]
    begin = time.monotonic()
    with _waking(plan):
        code = course.ranks(plan, words, ranks, notes / "said.txt")
    return Attempt(
        faults=faults,
        ranks=ranks,
        code=code,
        seconds=time.monotonic() - begin,
        strikes=rows(plan.strikes),
        gauges=rows(plan.gauges(0)),
        size=oracle.bytes_below(run_dir),
    )


@contextmanager
def _waking(plan: Plan) -> Iterator[None]:
    """Let ranks that stand still go on after a while, for the duration of a block."""
    over = threading.Event()

    def watch() -> None:
        awake = 0
        while not over.wait(_POLL_SECONDS):
            for fault, strike in list(zip(plan.faults, rows(plan.strikes), strict=False))[awake:]:
                awake += 1
                if not fault.ends:
                    time.sleep(_PAUSE_SECONDS)
                    pids = [int(path.name) for path in plan.pids.iterdir()]
                    for pid in pids if fault.everybody else [strike["pid"]]:
                        if _stands_still(pid):
                            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=watch, name="wakes ranks")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _stands_still(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def launched(plan: Plan, words: Sequence[str], ranks: int, said: Path) -> int:
    """Run an attempt as `python -m launch.local` does it, in processes that start from nothing."""
    temporary = plan.folder / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "tests.storm.chaos", "--ranks", str(ranks), str(plan.file), *words]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(temporary),
        "OMP_NUM_THREADS": "1",
    }
    with said.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=file, stderr=file, start_new_session=True
        )
        try:
            return process.wait(_ATTEMPT_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"an attempt hangs: see {plan.folder}") from None
        finally:
            if process.poll() is None:  # it hangs, or somebody has had enough of the storm
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def forked(plan: Plan, words: Sequence[str], ranks: int, said: Path) -> int:
    """Run an attempt in processes that are forked with everything imported."""
    endings = hear(words, ranks, hook=partial(in_forked, plan.file))
    said.write_text("\n".join(line for ending in endings for line in ending.err))
    codes = [ending.code for ending in endings]
    failed = [code for code in codes if code not in (0, ExitCode.STOPPED)]
    return failed[0] if failed else max(codes)


def damage(run_dir: Path, how: Damage) -> list[str]:
    """Do to the files of a run what a disk, or a person, may do; names the checkpoint that it hit."""
    if how == "flipped byte":
        _flip(run_dir / "attempt.json")
    elif how == "half row":
        for file in [run_dir / "metrics.jsonl", *(run_dir / "log").glob("samples-*.jsonl")]:
            with file.open("ab") as stream:
                stream.write(b'{"kind": "training", "st')
    else:
        return [_damage_newest(run_dir / "checkpoints", how)]
    return []


def _damage_newest(folder: Path, how: Damage) -> str:
    whole = [path for path in checkpoint.folders(folder) if _is_whole(path)]
    assert len(whole) > 1, f"too few whole checkpoints to damage one: {whole}"
    weights = whole[-1] / "model.safetensors"
    if how == "flipped bit":
        _flip(weights)
    elif how == "truncated":
        os.truncate(weights, weights.stat().st_size // 2)
    else:
        (whole[-1] / checkpoint.MANIFEST).unlink()
    return whole[-1].name


def _is_whole(path: Path) -> bool:
    try:
        checkpoint.load(path)
    except CheckpointError:
        return False
    return True


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def forget(folder: Path) -> None:
    """Remove what an earlier storm left in its folder."""
    shutil.rmtree(folder, ignore_errors=True)
