"""Storms are a pure function of their seed, and over the seeds everything happens."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.storm import weather
from tests.storm.weather import FORKED, KINDS, Fault, attempts, storm

SEEDS = st.integers(0, 2**32 - 1)
MANY = [fault for seed in range(60) for fault in storm(seed)]


@given(SEEDS, st.integers(0, 40))
def test_a_seed_gives_one_storm_of_so_many_faults(seed: int, count: int) -> None:
    faults = storm(seed, count)
    assert faults == storm(seed, count)
    assert len(faults) == count


@given(SEEDS)
def test_every_kind_comes_once_before_one_comes_again(seed: int) -> None:
    counts = Counter(fault.kind for fault in storm(seed, 2 * len(KINDS)))
    assert counts == dict.fromkeys(KINDS, 2)


@given(SEEDS, st.sampled_from([200, 1000]), st.sampled_from([1, 3, 6]))
def test_faults_can_happen(seed: int, steps: int, save_every: int) -> None:
    faults = storm(seed, 20, steps=steps, save_every=save_every)
    assert [fault.step for fault in faults] == sorted(fault.step for fault in faults)
    for fault in faults:
        assert 1 <= fault.step < 0.9 * steps
        assert 0 <= fault.rank < fault.ranks <= weather.MOST_RANKS
        assert 0 <= fault.threads <= weather.MOST_THREADS
        assert fault.rank == 0 or fault.moment not in weather.ON_MAIN
        assert fault.ranks > 1 or fault.moment != "meeting"
        assert fault.ranks > 1 or fault.kind != "one rank killed"
        assert (fault.kind == "paused") != fault.ends
        assert fault.ends or fault.damage is None


@given(SEEDS)
def test_damaged_checkpoints_leave_whole_ones(seed: int) -> None:
    faults = storm(seed, 40, steps=400, save_every=6)
    damaged = [fault.step for fault in faults if fault.damage in weather.CHECKPOINT_DAMAGE]
    assert damaged
    assert damaged[0] >= 4 * 6
    for before, after in itertools.pairwise(damaged):
        assert after - before >= 2 * 6


@given(SEEDS)
def test_the_last_fault_of_an_attempt_ends_it(seed: int) -> None:
    faults = storm(seed, 20)
    groups = attempts(faults)
    assert [fault for group in groups for fault in group] == faults
    for group in groups:
        assert not any(fault.ends for fault in group[:-1])
        assert {(fault.ranks, fault.threads) for fault in group} == {(group[0].ranks, group[0].threads)}
        # What has begun does not start once more.
        assert not any(fault.moment in weather.START for fault in group[1:])
    assert all(group[-1].ends for group in groups[:-1])


@given(SEEDS)
def test_some_kinds_only_and_fewer_ranks(seed: int) -> None:
    faults = storm(seed, 20, kinds=FORKED, most_ranks=2)
    assert {fault.kind for fault in faults} == set(FORKED)
    assert max(fault.ranks for fault in faults) <= 2


def seen(attribute: str) -> set[object]:
    return {getattr(fault, attribute) for fault in MANY}


def test_over_the_seeds_everything_happens() -> None:
    moments = {*weather.START, *weather.STEP, *weather.SAVE, *weather.VALIDATION}
    assert seen("moment") == moments
    assert seen("kind") == set(KINDS)
    assert seen("damage") == {*weather.CHECKPOINT_DAMAGE, "flipped byte", "half row", None}
    assert seen("ranks") == {1, 2, 3, 4}
    assert seen("rank") == {0, 1, 2, 3}
    assert seen("threads") == {0, 1, 2, 3}
    assert seen("everybody") == {True, False}
    singles = {("SIGKILL",), ("SIGSTOP",), *((stop,) for stop in weather.STOPS)}
    doubles = {(one, two) for one in weather.STOPS for two in weather.STOPS}
    assert seen("signals") == singles | doubles


def test_a_run_too_short_for_its_storm() -> None:
    with pytest.raises(ValueError, match="20 faults do not fit into a run of 20 steps"):
        storm(0, 20, steps=20, save_every=6)


def test_a_fault_says_what_it_is() -> None:
    fault = Fault(
        kind="half a row",
        moment="forward",
        step=3,
        rank=1,
        everybody=False,
        signals=("SIGKILL",),
        damage="half row",
        ranks=2,
        threads=0,
    )
    assert str(fault) == "half a row: SIGKILL to rank 1 of 2 at forward, then half row"
