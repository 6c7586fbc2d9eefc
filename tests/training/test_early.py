"""A run that gets no better ends, once, for the same reason however often it was interrupted."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agrivision.config import TrainingConfig
from agrivision.errors import ConfigurationError, ExitCode
from agrivision.report.rows import read_metrics
from agrivision.rundir import RunDirectory
from agrivision.training.early import exhausted
from launch.find import Found
from launch.status import row_of
from tests.heard import hear, hear_one
from tests.ranks import Disturbance, Moment, run
from tests.training.runs import arguments, assert_same, last_bits, metrics

SCORES = st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=12)


def end(scores: list[float | None], patience: int, least: float = 0.0) -> int | None:
    """After how many of these evaluations a run ends."""
    config = TrainingConfig(patience=patience, min_improvement=least)
    known = {10 * number: score for number, score in enumerate(scores, 1)}
    for number in range(1, len(scores) + 1):
        if exhausted(config, known, 10 * number, 10_000) is not None:
            return number
    return None


@given(scores=SCORES, patience=st.integers(1, 4))
def test_a_run_ends_when_none_of_the_last_scores_is_better(
    scores: list[float | None], patience: int
) -> None:
    """As anybody would say it: all of the last `patience` are at most the best before them."""
    values = [-1.0 if score is None else score for score in scores]
    wanted = None
    for number in range(patience, len(values) + 1):
        before = max([-1.0, *values[: number - patience]])
        if all(value <= before for value in values[number - patience : number]):
            wanted = number
            break
    assert end(scores, patience) == wanted


def test_what_counts_as_better() -> None:
    creeping = [0.1, 0.14, 0.18, 0.22, 0.26]
    assert end(creeping, 1) is None
    assert end(creeping, 1, 0.05) == 2
    assert end(creeping, 2, 0.05) is None  # 0.18 exceeds 0.1, and 0.26 exceeds 0.18
    assert end([0.5, 0.5, 0.6, 0.6, 0.6], 2) == 5
    assert end([None, None, 0.2], 2) == 2
    assert end([0.0, None, 0.0], 2) == 3


def test_later_scores_and_the_last_step_do_not_count() -> None:
    config, scores = TrainingConfig(patience=1), {1: 0.5, 2: 0.4, 3: 0.3}
    assert exhausted(config, scores, 1, 3) is None
    assert exhausted(config, scores, 3, 3) is None
    assert exhausted(TrainingConfig(), scores, 2, 3) is None
    found = exhausted(config, scores, 2, 3)
    assert found is not None
    assert "0.5000 of step 1 in 1 evaluations" in found
    assert "step 2 of 3" in found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"patience": 0}, "training.patience is 0"),
        ({"patience": 2, "evaluate_every_epochs": 0}, "evaluate_every_epochs must not be 0"),
        ({"min_improvement": 0.1}, "training.patience, which is null"),
        ({"patience": 2, "min_improvement": -0.1}, "training.min_improvement is -0.1"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        TrainingConfig(**changes)


# Whole runs. Weights that never change score the same each time: the second and the third evaluation
# are no better than the first.
STUCK = {
    "training__patience": 2,
    "training__epochs": 5,
    "training__ema_decay": 0,
    "optimizer__lr": 1e-30,
    "optimizer__weight_decay": 0,
    "model__norm": "none",
    "monitor__tensorboard": "false",
    "monitor__images": 0,
}
END = 18


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("stuck") / "run"
    assert run(arguments(dataset, run_dir, **STUCK)) == [0]
    return run_dir


def ends(run_dir: Path) -> list[int]:
    return [row["step"] for row in metrics(run_dir) if row["kind"] == "end"]


def test_metrics_status_and_report_say_it(undisturbed: Path) -> None:
    assert last_bits(undisturbed)[0] == END
    assert ends(undisturbed) == [END]
    row = row_of(Found(undisturbed, None), {})
    assert (row.state, row.step, row.total_steps, row.to_go) == ("done", END, 30, 0)
    assert "training.patience" in row.why
    found = read_metrics(undisturbed / "metrics.jsonl")
    assert found.unread == 0
    assert found.early_end == row.why == RunDirectory(undisturbed).early_ends()[END]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_command_again_says_so_and_changes_nothing(
    ranks: int, dataset: Path, tmp_path: Path
) -> None:
    command = arguments(dataset, tmp_path / "run", **STUCK)
    first = hear(command, ranks)
    assert [ending.code for ending in first] == [0] * ranks
    before = last_bits(tmp_path / "run"), metrics(tmp_path / "run")
    again = hear(command, ranks)
    assert [ending.code for ending in again] == [0] * ranks
    assert (last_bits(tmp_path / "run"), metrics(tmp_path / "run")) == before
    for ending in (first[0], again[0]):
        assert len([line for line in ending.err if "(training.patience): ends at step 18" in line]) == 1
        assert len([line for line in ending.err if "done after 18 steps" in line]) == 1


@pytest.mark.parametrize(
    ("moment", "count", "number"),
    [
        ("evaluating", 2, signal.SIGKILL),
        ("evaluating", 2, signal.SIGTERM),
        ("saving", 9, signal.SIGKILL),
        ("forward", 15, signal.SIGKILL),
        ("forward", 18, signal.SIGTERM),
    ],
)
def test_an_interrupted_run_ends_where_the_other_does(
    moment: Moment, count: int, number: signal.Signals, dataset: Path, tmp_path: Path, undisturbed: Path
) -> None:
    command = arguments(dataset, tmp_path, **STUCK)
    codes = run(command, disturbance=Disturbance(number, moment, count=count))
    assert codes == [-signal.SIGKILL if number == signal.SIGKILL else ExitCode.STOPPED]
    assert ends(tmp_path) == []
    assert run(command) == [0]
    assert_same(tmp_path, undisturbed)


def test_with_more_patience_the_run_goes_on(dataset: Path, tmp_path: Path) -> None:
    command = arguments(dataset, tmp_path, **STUCK)
    assert run(command) == [0]
    more = arguments(dataset, tmp_path, **(STUCK | {"training__patience": 3}))
    ending = hear_one([*more, "--resume_with_changes"])
    assert ending.code == 0
    assert last_bits(tmp_path)[0] == 24
    assert ends(tmp_path) == [END, 24]
    assert "step 24" in row_of(Found(tmp_path, None), {}).why
