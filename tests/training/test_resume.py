"""Resumed = uninterrupted, bit for bit; on other ranks, the same samples in the same steps."""

from __future__ import annotations

import random
import signal
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agrivision import checkpoint
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.errors import ExitCode
from agrivision.rundir import RunDirectory, best_step
from tests.ranks import Disturbance, Moment, run
from tests.training.runs import TIMINGS, arguments, assert_same, last_bits, samples

STEPS = 18  # three epochs of 36 tiles, or so, in batches of 6


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory):
    """Runs that nothing disturbed, by ranks and precision; made once, with one thread."""
    folder = tmp_path_factory.mktemp("undisturbed")

    @cache
    def make(ranks: int, precision: str) -> Path:
        run_dir = folder / f"{ranks}-{precision}"
        codes = run(arguments(dataset, run_dir, training__precision=precision), ranks)
        assert codes == [0] * ranks
        return run_dir

    return make


def go_on_until_done(command: list[str], ranks: int) -> None:
    assert run(command, ranks) == [0] * ranks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_stopped_by_sigterm(
    ranks: int, threads: int, precision: str, dataset: Path, tmp_path: Path, undisturbed
) -> None:
    chance = random.Random(f"{ranks} {threads} {precision}")
    command = arguments(dataset, tmp_path, training__precision=precision, data__threads=threads)
    # The signal reaches one rank only: the others must hear of it.
    stop = Disturbance(
        signal.SIGTERM, "forward", count=chance.randrange(2, STEPS), rank=chance.randrange(ranks)
    )
    assert run(command, ranks, disturbance=stop) == [ExitCode.STOPPED] * ranks
    assert last_bits(tmp_path)[0] == stop.count  # the step was finished and saved
    go_on_until_done(command, ranks)
    assert_same(tmp_path, undisturbed(ranks, precision))


@pytest.mark.row(6)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed(
    ranks: int, threads: int, precision: str, dataset: Path, tmp_path: Path, undisturbed
) -> None:
    chance = random.Random(f"killed {ranks} {threads} {precision}")
    command = arguments(dataset, tmp_path, training__precision=precision, data__threads=threads)
    kill = Disturbance(
        signal.SIGKILL,
        chance.choice(["forward", "backward done", "step done"]),
        count=chance.randrange(2, STEPS),
        rank=chance.randrange(ranks),
    )
    codes = run(command, ranks, disturbance=kill)
    assert codes[kill.rank] == -signal.SIGKILL
    assert all(code == ExitCode.FAILED for rank, code in enumerate(codes) if rank != kill.rank)
    go_on_until_done(command, ranks)
    assert_same(tmp_path, undisturbed(ranks, precision))


@pytest.mark.row(33)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("moment", ["saving", "renaming", "evaluating"])
def test_disturbed_outside_of_a_step(
    moment: Moment, number: signal.Signals, dataset: Path, tmp_path: Path, undisturbed
) -> None:
    command = arguments(dataset, tmp_path)
    codes = run(command, disturbance=Disturbance(number, moment, count=3))
    assert codes == [-signal.SIGKILL if number == signal.SIGKILL else ExitCode.STOPPED]
    go_on_until_done(command, 1)
    assert_same(tmp_path, undisturbed(1, "fp32"))


def test_interrupted_at_every_turn(dataset: Path, tmp_path: Path, undisturbed) -> None:
    """Every attempt is stopped after a few steps, now softly, now hard; the end is the same."""
    chance, command = random.Random(0), arguments(dataset, tmp_path, training__checkpoint_every_steps=1)
    for _ in range(100):
        number = chance.choice([signal.SIGTERM, signal.SIGKILL])
        codes = run(command, disturbance=Disturbance(number, "forward", count=chance.randrange(2, 5)))
        if codes == [0]:
            break
    else:
        pytest.fail("the run does not come to its end")
    assert_same(tmp_path, undisturbed(1, "fp32"))


def test_curves_have_every_step_once_after_interruptions(
    dataset: Path, tmp_path: Path, undisturbed
) -> None:
    command = arguments(dataset, tmp_path)
    run(command, disturbance=Disturbance(signal.SIGKILL, "forward", count=14))
    run(command, disturbance=Disturbance(signal.SIGTERM, "forward", count=2))
    go_on_until_done(command, 1)
    mine, reference = (curves(path / "tensorboard") for path in (tmp_path, undisturbed(1, "fp32")))
    assert mine == reference
    assert mine["loss/total"]


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith(TIMINGS)
    }


@pytest.mark.row(29)
def test_two_then_one_then_three_ranks_see_the_same_samples(
    dataset: Path, tmp_path: Path, undisturbed
) -> None:
    command = arguments(dataset, tmp_path)
    for ranks, count in ((2, 5), (1, 8)):
        stop = Disturbance(signal.SIGTERM, "forward", count=count)
        assert run(command, ranks, disturbance=stop) == [ExitCode.STOPPED] * ranks
    go_on_until_done(command, 3)
    mine = samples(tmp_path)
    alone = samples(undisturbed(1, "fp32"))
    assert {step: sorted(keys) for step, keys in mine.items()} == {
        step: sorted(keys) for step, keys in alone.items()
    }
    schema = Schema.read(dataset)
    reader = SplitReader(dataset, schema, "train")
    everything = {reader.key(tile) for tile in range(len(reader))}
    for epoch in range(3):
        seen = Counter(key for (when, _), keys in mine.items() if when == epoch for key in keys)
        assert seen == Counter(everything)


def test_a_finished_run_stays_as_it_is(dataset: Path, tmp_path: Path, undisturbed) -> None:
    reference = undisturbed(1, "fp32")
    before = last_bits(reference), samples(reference)
    go_on_until_done(arguments(dataset, reference), 1)
    assert (last_bits(reference), samples(reference)) == before


def test_sgd_and_accumulation_resume_too(dataset: Path, tmp_path: Path) -> None:
    changes = {
        "optimizer__name": "sgd",
        "training__micro_batch_size": 2,
        "schedule__name": "polynomial",
        "model__norm": "group",
        "augment__rotate": 20,
        "augment__scale": 0.2,
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(arguments(dataset, whole, **changes), 2) == [0, 0]
    command = arguments(dataset, broken, **changes)
    run(command, 2, disturbance=Disturbance(signal.SIGTERM, "forward", count=20))
    go_on_until_done(command, 2)
    assert_same(broken, whole)


def test_a_stop_on_one_rank_ends_an_evaluation_on_both(
    dataset: Path, tmp_path: Path, undisturbed
) -> None:
    command = arguments(dataset, tmp_path, evaluation__batch_size=1)
    stop = Disturbance(signal.SIGTERM, "evaluating", count=1, rank=1)
    assert run(command, 2, disturbance=stop) == [ExitCode.STOPPED] * 2
    go_on_until_done(command, 2)
    assert last_bits(tmp_path) == last_bits(undisturbed(2, "fp32"))


def test_what_is_scored_is_saved_and_the_best_is_kept(dataset: Path, tmp_path: Path) -> None:
    changes = {
        "training__checkpoint_every_epochs": 2,
        "training__checkpoint_every_steps": 1000,
        "training__keep_last": 1,
        # Weights that never change score the same each time, and the earliest of equals is the best.
        "optimizer__lr": 1e-30,
        "optimizer__weight_decay": 0,
        "model__norm": "none",
    }
    go_on_until_done(arguments(dataset, tmp_path, **changes), 1)
    directory = RunDirectory(tmp_path)
    scores = directory.evaluations()
    assert len(scores) == 3
    kept = {entry.step for entry in checkpoint.entries(directory.checkpoints)}
    assert best_step(scores) == min(scores)
    assert kept == {min(scores), max(scores)}
