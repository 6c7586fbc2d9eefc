"""Worker processes that make shards, and that end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection

from agrivision.data.shard_job import Job, Made, ShardMaker, make_shard
from agrivision.errors import AgrivisionError

_maker: list[ShardMaker] = []  # of a worker process: sent once instead of with every job


def run_jobs(maker: ShardMaker, jobs: Sequence[Job], workers: int) -> Generator[Made, None, None]:
    """Make shards, in this process or in others, and give them in the order of the jobs.

    Raises:
        AgrivisionError: what went wrong with the first job that failed, or a worker that was killed.
    """
    workers = min(workers, len(jobs))
    if workers == 1:
        yield from (make_shard(maker, job) for job in jobs)
        return
    # Fresh processes: a fork would copy the locks of this one's threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(maker,))
    try:
        with _no_interrupt():
            futures: list[Future[Made]] = [pool.submit(_work, job) for job in jobs]
        for future in futures:
            yield future.result()
    except BrokenProcessPool:
        raise AgrivisionError(
            "a worker process was killed, perhaps for want of memory: run it again with fewer"
            " workers, and it goes on"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Processes started here never see Ctrl-C, which a terminal sends to all: the first one decides."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(maker: ShardMaker) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
