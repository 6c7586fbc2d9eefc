"""Whole runs in the invariant mode: the same bits on any number of ranks, also on changing ones."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from agrivision.errors import ExitCode
from tests.heard import hear_one
from tests.ranks import Disturbance, run
from tests.training.runs import arguments, assert_same, last_bits

INVARIANT = {
    "training__invariant": "true",
    "training__micro_batch_size": 2,
    "data__batch_size": 8,  # four micro-batches; the last batch of an epoch has one sample that counts
    "training__epochs": 2,
    "monitor__tensorboard": "false",
    "monitor__images": 0,
}


@pytest.fixture(scope="module")
def one_rank(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("invariant") / "one"
    assert run(arguments(dataset, run_dir, **INVARIANT)) == [0]
    return run_dir


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_weights_optimiser_average_and_losses_are_those_of_one_rank(
    ranks: int, one_rank: Path, dataset: Path, tmp_path: Path
) -> None:
    assert run(arguments(dataset, tmp_path / "run", **INVARIANT), ranks) == [0] * ranks
    assert last_bits(tmp_path / "run") == last_bits(one_rank)
    assert_same(tmp_path / "run", one_rank)  # the score and every row of metrics.jsonl, too


@pytest.mark.row(29)
def test_a_run_that_changes_its_number_of_ranks_ends_with_the_same_bits(
    one_rank: Path, dataset: Path, tmp_path: Path
) -> None:
    command = arguments(dataset, tmp_path, **INVARIANT)
    for ranks, forward in ((2, 5), (4, 2)):
        stop = Disturbance(signal.SIGTERM, "forward", count=forward)
        assert run(command, ranks, disturbance=stop) == [ExitCode.STOPPED] * ranks
    assert run(command) == [0]
    assert last_bits(tmp_path) == last_bits(one_rank)


def test_in_bfloat16_too(dataset: Path, tmp_path: Path) -> None:
    options = INVARIANT | {"training__precision": "bf16", "training__max_steps": 4}
    for ranks in (1, 2):
        command = arguments(dataset, tmp_path / str(ranks), **options)
        assert run(command, ranks) == [0] * ranks
    assert last_bits(tmp_path / "1") == last_bits(tmp_path / "2")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training__micro_batch_size": "null"}, "needs training.micro_batch_size"),
        ({"training__deterministic": "false"}, "needs training.deterministic"),
        ({"training__gradient_compression": "bf16"}, "gradient_compression rounds what ranks send"),
    ],
    ids=["micro", "kernels", "compression"],
)
def test_what_does_not_go_with_it_is_refused(
    changes: dict[str, object], said: str, dataset: Path, tmp_path: Path
) -> None:
    ending = hear_one(arguments(dataset, tmp_path / "run", **(INVARIANT | changes)))
    assert ending.code == ExitCode.BAD_INPUT
    assert said in ending.complaint
    assert not (tmp_path / "run").exists()
