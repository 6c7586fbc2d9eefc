"""A plugin of pytest: `-p tests.slurm.sampling --sample 3` runs three of the tests, by chance."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sampling")
    group.addoption("--sample", type=_at_least_one, metavar="N", help="run N of the selected tests")
    group.addoption("--sample-seed", type=int, metavar="SEED", help="choose as the run with SEED did")


def _at_least_one(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError(text)
    return count


def pytest_configure(config: pytest.Config) -> None:
    if config.option.sample_seed is None:
        # Here and not when the tests are known: pytest-xdist's workers take over the options.
        config.option.sample_seed = random.SystemRandom().randrange(2**32)


def pytest_report_header(config: pytest.Config) -> list[str]:
    count, seed = config.getoption("--sample"), config.getoption("--sample-seed")
    return [] if count is None else [f"sample of {count}: --sample-seed {seed}"]


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    yield  # what -m and -k leave out is out of the draw
    count = config.getoption("--sample")
    if count is None:
        return
    chosen = choose([item.nodeid for item in items], count, config.getoption("--sample-seed"))
    left_out = [item for item in items if item.nodeid not in chosen]
    items[:] = [item for item in items if item.nodeid in chosen]
    config.hook.pytest_deselected(items=left_out)


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    if config.getoption("--sample") is None:
        return []
    return [f"  {item.nodeid}" for item in items]


def choose(names: list[str], count: int, seed: int) -> set[str]:
    """`count` of the names, or all where there are fewer; the order in which they come is no matter."""
    return set(random.Random(seed).sample(sorted(names), min(count, len(names))))
