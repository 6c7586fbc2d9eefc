"""Further parts of the loss: resumed = uninterrupted, the same on any ranks, and a curve of each."""

from __future__ import annotations

import signal
from functools import cache
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agrivision.errors import ExitCode
from agrivision.report.rows import read_metrics
from tests.ranks import Disturbance, run
from tests.training.runs import arguments, assert_same, metrics, samples

EVERYTHING = {
    "loss__focal_gamma": 1.5,
    "loss__tversky_alpha": 0.3,
    "loss__tversky_beta": 0.7,
    "loss__tversky_gamma": 1.3,
    "loss__lovasz_weight": 0.5,
    "loss__pnc_weight": 0.5,
    "loss__border_weight": 5,
    "loss__border_sigma": 2,
    "loss__border_smoothing": 0.2,
    "loss__class_weights": "effective",
}
PARTS = ["total", "cross_entropy", "dice", "lovasz", "pnc"]
# A micro-batch is one rank's as a whole, so the bits do not depend on the ranks.
INVARIANT = {"training__invariant": "true", "training__micro_batch_size": 3}


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory):
    """Runs that nothing disturbed, by the number of ranks; made once."""
    folder = tmp_path_factory.mktemp("undisturbed")

    @cache
    def make(ranks: int) -> Path:
        command = arguments(dataset, folder / str(ranks), **EVERYTHING, **INVARIANT)
        assert run(command, ranks) == [0] * ranks
        return folder / str(ranks)

    return make


def test_a_run_that_was_stopped_goes_on(dataset: Path, tmp_path: Path, undisturbed) -> None:
    command = arguments(dataset, tmp_path, **EVERYTHING, **INVARIANT)
    stop = Disturbance(signal.SIGTERM, "forward", count=7)
    assert run(command, disturbance=stop) == [ExitCode.STOPPED]
    assert run(command) == [0]
    assert_same(tmp_path, undisturbed(1))


def test_two_ranks_tell_the_same_as_one(undisturbed) -> None:
    assert metrics(undisturbed(2)) == metrics(undisturbed(1))
    assert samples(undisturbed(2)) == samples(undisturbed(1))


def test_every_part_has_its_rows_and_curves(undisturbed) -> None:
    rows = metrics(undisturbed(1))
    training = [row for row in rows if row["kind"] == "training"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    assert training and evaluations
    for row in training:
        parts = [row[name] for name in PARTS]
        assert all(part > 0 for part in parts)
        assert parts[0] == pytest.approx(
            parts[1] + parts[2] + 0.5 * parts[3] + 0.5 * parts[4], rel=1e-5
        )
    assert all(list(row["loss"]) == PARTS for row in evaluations)
    curves = EventAccumulator(str(undisturbed(1) / "tensorboard")).Reload().Tags()["scalars"]
    assert {f"{kind}/{name}" for kind in ("loss", "validation") for name in PARTS} <= set(curves)
    read = read_metrics(undisturbed(1) / "metrics.jsonl")
    assert read.has("lovasz") and read.has("pnc")


def test_a_loss_may_change_on_the_way(dataset: Path, tmp_path: Path) -> None:
    """The means of the first row after the change are those of the steps after it alone."""
    command = arguments(dataset, tmp_path, monitor__log_every_steps=4)
    stop = Disturbance(signal.SIGTERM, "forward", count=7)
    assert run(command, disturbance=stop) == [ExitCode.STOPPED]
    changed = arguments(dataset, tmp_path, monitor__log_every_steps=4, loss__lovasz_weight=1)
    assert run([*changed, "--resume_with_changes"]) == [0]
    rows = {row["step"]: row for row in metrics(tmp_path) if row["kind"] == "training"}
    assert "lovasz" not in rows[4]
    row = rows[8]
    assert row["total"] == pytest.approx(row["cross_entropy"] + row["dice"] + row["lovasz"], rel=1e-5)
