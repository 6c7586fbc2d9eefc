"""A plugin of pytest: `-p tests.slurm.sampling --sample 3` runs three of the tests, by chance."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

_CHOICE = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sampling")
    group.addoption("--sample", type=_at_least_one, metavar="N", help="run N of the selected tests")
    group.addoption("--sample-seed", type=int, metavar="SEED", help="choose as the run with SEED did")


def _at_least_one(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError(text)
    return count


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    yield  # what -m and -k leave out is out of the draw
    count = config.getoption("--sample")
    if count is None:
        return
    seed = config.getoption("--sample-seed")
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    chosen = choose([item.nodeid for item in items], count, seed)
    config.stash[_CHOICE] = f"sample of {len(chosen)} of {len(items)}, --sample-seed {seed}"
    left_out = [item for item in items if item.nodeid not in chosen]
    items[:] = [item for item in items if item.nodeid in chosen]
    config.hook.pytest_deselected(items=left_out)


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    if _CHOICE not in config.stash:
        return []
    return [config.stash[_CHOICE], *(f"  {item.nodeid}" for item in items)]


def choose(names: list[str], count: int, seed: int) -> set[str]:
    """`count` of the names, or all where there are fewer; the order in which they come is no matter."""
    return set(random.Random(seed).sample(sorted(names), min(count, len(names))))
