"""Reading while the network computes."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")


def one_ahead(items: Iterator[_T]) -> Generator[_T, None, None]:
    """The same items in the same order, each made in a thread while the one before is in use.

    All are made in the same thread, one after the other, so what makes them need not be safe to call
    from several. Close it where it is left early: closing waits for the item under way.
    """
    with ThreadPoolExecutor(1, "ahead") as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
