"""Worker processes that make shards, and that end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection

from agrivision.data.shard_job import Job, Made, ShardMaker, make_shard
from agrivision.errors import AgrivisionError, Interrupted
from agrivision.part import Stop, never

_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
_POLL_SECONDS = 0.2

_maker: list[ShardMaker] = []  # of a worker process: sent once instead of with every job


def run_jobs(
    maker: ShardMaker, jobs: Sequence[Job], workers: int, stop: Stop = never
) -> Generator[Made, None, None]:
    """Make shards, in this process or in others, and give them in the order of the jobs.

    Args:
        maker: what all have in common.
        jobs: the shards.
        workers: processes; 1 works in this one.
        stop: whether to stop; shards in hand are finished.

    Raises:
        Interrupted: asked to stop before the last shard.
        AgrivisionError: what went wrong with the first job that failed, or a worker that was killed.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        for job in jobs:
            if stop():
                raise _interrupted()
            yield make_shard(maker, job)
        return
    # Fresh processes: a fork would copy the locks of this one's threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    with _no_signals():  # the process with multiprocessing's books is started here
        pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(maker,))
    try:
        with _no_signals():  # once more: starting the first one lets some signals in again
            futures: list[Future[Made]] = [pool.submit(_work, job) for job in jobs]
        for future in futures:
            yield _result(future, stop)
    except BrokenProcessPool:
        if stop():  # the signal went to all processes, and met a worker that had just been started
            raise _interrupted() from None
        raise AgrivisionError(
            "a worker process was killed, perhaps for want of memory: run it again with fewer"
            " workers, and it goes on"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _result(future: Future[Made], stop: Stop) -> Made:
    done = False
    while not done:
        if stop():  # also where the next shards are made already: to report them takes its time
            raise _interrupted()
        done = bool(wait([future], _POLL_SECONDS).done)
    return future.result()


def _interrupted() -> Interrupted:
    return Interrupted("stopped; finished shards are kept, and the same command goes on")


@contextmanager
def _no_signals() -> Iterator[None]:
    """Processes started here never see the signals that a terminal or Slurm sends to all of a step.

    The first process decides; killed workers would cost it the shards in hand.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(maker: ShardMaker) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _maker[:] = [maker]


def _end_with_parent() -> None:
    """A pool's worker holds both ends of its pipe, so it would wait for a killed parent for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(job: Job) -> Made:
    return make_shard(_maker[0], job)
