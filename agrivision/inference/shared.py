"""Batches shared by the cores of a processor, with the same numbers whatever number of cores.

How torch rounds depends on how many threads share one operation. So each batch is computed by one
thread alone, and several batches at a time: that is as fast, and does not depend on the machine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from agrivision.phase import moved

_T = TypeVar("_T")
_R = TypeVar("_R")

_MOST = 16  # threads: each takes the memory of a batch


def by_cores(function: Callable[[_T], _R], items: Iterable[_T]) -> Generator[_R, None, None]:
    """What a function gives of each item, in their order; as many at a time as torch has threads.

    Close it where it is left early: closing waits for the items under way.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield from in_turn(function, items)
        return
    waiting: deque[Future[_R]] = deque()
    with ThreadPoolExecutor(min(threads, _MOST), "compute", initializer=_alone) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > min(threads, _MOST):
                    yield _done(waiting)
            while waiting:
                yield _done(waiting)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # what new threads take was changed by those


def in_turn(function: Callable[[_T], _R], items: Iterable[_T]) -> Generator[_R, None, None]:
    """What a function gives of each item, one after the other."""
    for item in items:
        found = function(item)
        moved()
        yield found


def _done(waiting: deque[Future[_R]]) -> _R:
    found = waiting.popleft().result()
    moved()
    return found


def _alone() -> None:
    torch.set_num_threads(1)
