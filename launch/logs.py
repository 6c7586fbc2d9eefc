"""`python -m launch logs`: what a job printed, over its requeues and successors."""

from __future__ import annotations

import codecs
import io
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import jsonargparse

from agrivision.console import say
from agrivision.errors import BadInput, ExitCode, harmless
from agrivision.rundir import RunDirectory
from launch.find import find_one, jobs_of, last_submission, tasks
from launch.jobdir import JobDirectory
from launch.poll import poll
from launch.status import is_over, known_of, state_of
from launch.submit import alive

_POLL_SECONDS = 1.0  # of the log; Slurm is asked by launch.poll
_CHUNK = 1 << 16
# What launch.batch prints when an attempt begins.
_BEGINNING = re.compile(rb"^\S+ launch: attempt (\d+) on ", re.MULTILINE)


def main(argv: list[str]) -> ExitCode:
    """`python -m launch logs`."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m launch logs",
        description="What a job printed, over its requeues and successors.",
        exit_on_error=False,
    )
    parser.add_argument("path", type=str, help="run or job directory, or what a job writes")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the job is over")
    parser.add_argument("--attempt", type=int, default=None, help="only this one; 1 is the first")
    parser.add_argument("--task", type=int, default=None, help="of a job array; default: all its tasks")
    parser.add_argument("--rank", type=int, default=None, help="a rank's own log instead")
    args = parser.parse_args(argv)
    if args.attempt is not None and (args.follow or args.rank is not None):
        raise BadInput("--attempt goes by itself, without --follow and --rank")
    out, found = find_one(Path(args.path))
    several = _tasks(found, args.task)
    write = printer()
    if len(several) > 1:
        if args.follow or args.attempt is not None or args.rank is not None:
            raise BadInput(f"{out} is a job array of {len(several)} tasks: say which with --task")
        _write_all(several, write)
        return ExitCode.DONE
    (job,) = several
    if args.attempt is not None:
        write(attempt_log(job, args.attempt))
        return ExitCode.DONE
    if args.rank is not None:
        file = RunDirectory(out).log / f"rank-{args.rank}.log"
        if not file.is_file():
            raise BadInput(f"there is no {file}")
        source: Callable[[], Path | None] = lambda: file  # noqa: E731
    else:
        source = lambda: log_file(job)  # noqa: E731
        if source() is None and not jobs_of(job):
            raise BadInput(f"no log in {job.path}: the job was not submitted")
        if source() is None and not args.follow:
            raise BadInput(f"no log yet in {job.path}: the job has not started (see launch status)")
    try:
        if args.rank is None:
            _write_earlier(job, write)
        for chunk in chunks(source, over=lambda: is_ended(job), follow=args.follow):
            write(chunk)
    except KeyboardInterrupt:
        say("")
    return ExitCode.DONE


def _tasks(job: JobDirectory, number: int | None) -> list[JobDirectory]:
    """Those that are meant: one, or all of a job array.

    Raises:
        BadInput: there is no such task.
    """
    known = tasks(job)
    if number is None:
        return known
    for task in known:
        if task.task == number:
            return [task]
    raise BadInput(f"there is no task {number} in {job.path}: --task is a number in a job array")


def _write_all(several: Sequence[JobDirectory], write: Callable[[bytes], None]) -> None:
    for job in several:
        write(f"==> task {job.task} <==\n".encode())
        file = log_file(job)
        _write_earlier(job, write)
        if file is not None:
            _copy(file, write)


def _write_earlier(job: JobDirectory, write: Callable[[bytes], None]) -> None:
    """What the jobs before the latest have printed, where their logs still are."""
    latest = log_file(job)
    files = dict.fromkeys(log_file(job, number) for number in jobs_of(job))
    for file in files:
        if file is not None and file != latest:
            _copy(file, write)


def _copy(file: Path, write: Callable[[bytes], None]) -> None:
    for chunk in chunks(lambda: file, over=lambda: True, follow=False):
        write(chunk)


def printer() -> Callable[[bytes], None]:
    """What writes a log on stdout: byte by byte, or as a terminal may see it.

    A terminal obeys what it is shown, and a job prints what stands in files of others.
    """
    plain = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    decoder = io.IncrementalNewlineDecoder(plain, translate=True)

    def write(chunk: bytes) -> None:
        if sys.stdout.isatty():
            chunk = harmless(decoder.decode(chunk)).encode()
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()

    return write


def log_file(job: JobDirectory, number: str | None = None) -> Path | None:
    """The log of one job of a directory or task, by default of the latest that has one."""
    jobs = jobs_of(job) if number is None else [number]
    # A sweep's elements are one job array, whose logs stand together in the sweep's own folder.
    folders = [job.path, job.path.parent.parent / job.path.name]
    with suppress(BadInput):
        folders.append(Path(job.spec().cwd))  # slurm/*.sbatch write where sbatch was called
    places = (
        folder / f"{prefix}-{name}.out"
        for name in reversed(jobs)
        for folder in folders
        for prefix in ("slurm", "agrivision")
    )
    return next((file for file in places if file.is_file()), None)


def attempt_log(job: JobDirectory, number: int) -> bytes:
    """What one attempt printed.

    Raises:
        BadInput: there is no such attempt, or no log of it.
    """
    attempts = {attempt.number: attempt for attempt in job.attempts()}
    if number not in attempts:
        raise BadInput(f"there is no attempt {number} in {job.path}: there are {len(attempts)}")
    file = log_file(job, attempts[number].job)
    if file is None:
        raise BadInput(f"there is no log of job {attempts[number].job} in {job.path}")
    content = file.read_bytes()
    starts = [(int(found[1]), found.start()) for found in _BEGINNING.finditer(content)]
    for place, (which, start) in enumerate(starts):
        if which == number:
            end = starts[place + 1][1] if place + 1 < len(starts) else len(content)
            return content[start:end]
    raise BadInput(f"{file} does not say where attempt {number} begins")


def chunks(
    source: Callable[[], Path | None],
    *,
    over: Callable[[], bool],
    follow: bool,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[bytes]:
    """What stands in a log, and what is added to it; a successor's log comes after its predecessor's.

    Args:
        source: the log of now; None before there is one.
        over: whether nothing more will come.
        follow: wait for more.
        sleep: seconds.
    """
    file, position = None, 0
    while True:
        # Asked before reading: what was written before the end is read after it.
        ended, latest = not follow or over(), source()
        while file is not None and (chunk := _read(file, position)):
            position += len(chunk)
            yield chunk
        if latest != file:
            file, position = latest, 0
            continue
        if ended:
            return
        sleep(_POLL_SECONDS)


def _read(file: Path, position: int) -> bytes:
    try:
        with file.open("rb") as opened:
            opened.seek(position)
            return opened.read(_CHUNK)
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror}") from None


def is_ended(job: JobDirectory) -> bool:
    """Whether nothing more comes of a job or task by itself."""
    jobs, attempts = jobs_of(job), job.attempts()
    last = attempts[-1] if attempts else None
    latest = jobs[-1] if jobs else ""
    if is_over(state_of(latest, last, None)):
        return True
    answer = poll(last_submission(job))
    if answer.problem:
        return False
    found = known_of(latest, answer.jobs)
    return found is None or not alive(found)
