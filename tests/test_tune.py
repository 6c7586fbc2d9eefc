"""`agrivision tune`: the same on any number of ranks, twice the same bytes, and what it says holds."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from agrivision.data.schema import Schema
from agrivision.errors import Interrupted
from agrivision.evaluation.choosing import objective
from agrivision.inference.postprocessing import FILE, Chosen
from agrivision.inference.scoring import Looking, evaluate_run
from agrivision.inference.tuning import tune
from agrivision.locks import FileLock
from agrivision.world import World
from tests.heard import hear, hear_one, refusal
from tests.ranks import Disturbance, run


@pytest.fixture
def mine(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be written into."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def tuned(run_dir: Path, dataset: Path, *more: str, ranks: int = 1) -> bytes:
    command = ["tune", run_dir, "--data", dataset, *more]
    endings = hear(command, ranks)
    assert [ending.code for ending in endings] == [0] * ranks, endings
    assert "is to be expected" in endings[0].out[0]
    assert not any(ending.out for ending in endings[1:])
    content = (run_dir / FILE).read_bytes()
    (run_dir / FILE).unlink()
    return content


def left(run_dir: Path) -> set[str]:
    return {path.name for path in run_dir.iterdir()}


def test_twice_and_on_two_ranks_the_bytes_are_the_same(dataset: Path, mine: Path) -> None:
    before = left(mine)
    once = tuned(mine, dataset)
    assert tuned(mine, dataset) == once == tuned(mine, dataset, ranks=2)
    assert left(mine) == before | {".tune.lock"}
    content = json.loads(once)
    assert content["classes"] == list(Schema.read(dataset).classes)
    assert content["data_fingerprint"] == Schema.read(dataset).fingerprint
    assert content["score"]["before"] <= content["score"]["after"]


def test_what_it_says_is_what_evaluate_finds(dataset: Path, mine: Path) -> None:
    for symmetries in (False, True):
        found = tune(mine, dataset, how=Looking(symmetries=symmetries), world=World())
        assert found is not None and found.crossed is not None
        plain = evaluate_run(mine, dataset, "val", symmetries=symmetries)
        after = evaluate_run(mine, dataset, "val", symmetries=symmetries, postprocess=True)
        assert plain is not None and after is not None
        assert found.before.to_dict().items() <= plain.items()
        assert found.after.to_dict().items() <= after.items()
        assert after["postprocessing"] == found.chosen.how.line()
        assert Chosen.read(mine / FILE) == found.chosen
        assert found.chosen.symmetries == symmetries
        assert found.chosen.crossed == found.crossed.miou


@pytest.mark.parametrize(
    ("option", "name", "neutral"), [("--classes_only", "areas", 0), ("--areas_only", "factors", 1.0)]
)
def test_one_kind_alone_leaves_the_other(
    dataset: Path, mine: Path, option: str, name: str, neutral: float
) -> None:
    content = json.loads(tuned(mine, dataset, option))
    assert set(content[name].values()) == {neutral}


def test_the_other_objective_is_not_worse_by_itself(dataset: Path, mine: Path) -> None:
    found: dict[str, Any] = {}
    for kind in ("miou", "f1"):
        found[kind] = tune(mine, dataset, kind=kind, world=World())  # type: ignore[arg-type]
    for kind, each in found.items():
        assert each.chosen.objective == kind
        assert each.chosen.after == objective(torch.tensor(each.after.confusion), kind)
        assert each.chosen.after >= each.chosen.before


def test_evaluate_on_two_ranks_is_evaluate_on_one(dataset: Path, mine: Path, tmp_path: Path) -> None:
    assert run(["tune", str(mine), "--data", str(dataset)]) == [0]
    scores = []
    for ranks in (1, 2):
        file = tmp_path / f"{ranks}.json"
        command = ["evaluate", "--checkpoint", mine, "--data", dataset, "--json", file, "--postprocess"]
        assert [ending.code for ending in hear(command, ranks)] == [0] * ranks
        scores.append(json.loads(file.read_text()))
    assert scores[0] == scores[1]
    assert scores[0]["postprocessing"]


def test_predict_writes_what_evaluate_scored(dataset: Path, mine: Path, tmp_path: Path) -> None:
    """With the run's own file and with the file by its name, and other bytes than without."""
    assert run(["tune", str(mine), "--data", str(dataset)]) == [0]
    predict = ["predict", "--checkpoint", mine, dataset, "--split", "val", "--batch_size", "8"]
    for name, more in (("own", ["--postprocess"]), ("file", ["--postprocess", mine / FILE])):
        assert hear_one([*predict, "--out", tmp_path / name, *more]).code == 0
        score = ["score", tmp_path / name, "--data", dataset, "--json", tmp_path / f"{name}.json"]
        assert hear_one([*score, "--split", "val"]).code == 0
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["miou"] == json.loads((mine / FILE).read_text())["score"]["after"]


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_one_leaves_nothing(dataset: Path, mine: Path, count: int) -> None:
    before = left(mine)
    command = ["tune", str(mine), "--data", str(dataset), "--batch_size", "4"]
    killed = Disturbance(signal.SIGKILL, "evaluating", count)
    assert run(command, disturbance=killed) == [-signal.SIGKILL]
    assert left(mine) == before | {".tune.lock"}
    once = tuned(mine, dataset)
    (mine / FILE).write_bytes(once)
    assert run(command, disturbance=killed) == [-signal.SIGKILL]
    assert (mine / FILE).read_bytes() == once  # of an earlier one


def test_one_that_is_asked_to_stop_leaves_nothing(dataset: Path, mine: Path) -> None:
    before = left(mine)
    asked = Disturbance(signal.SIGTERM, "evaluating", 1)
    command = ["tune", str(mine), "--data", str(dataset), "--batch_size", "1"]
    assert run(command, disturbance=asked) == [Interrupted.exit_code]
    assert left(mine) == before | {".tune.lock"}


def test_refusals_are_one_line(dataset: Path, mine: Path, tmp_path: Path) -> None:
    common = ["--checkpoint", mine, "--data", dataset]
    assert "agrivision tune" in refusal(["evaluate", *common, "--postprocess"])
    assert "cannot read" in refusal(["evaluate", *common, "--postprocess", tmp_path / "none.json"])
    both = ["tune", mine, "--data", dataset, "--classes_only", "--areas_only"]
    assert "nothing to choose" in refusal(both)
    predict = ["predict", "--checkpoint", mine, "--checkpoint", mine, dataset, "--out", tmp_path / "o"]
    assert "--postprocess FILE" in refusal([*predict, "--postprocess"])
    with FileLock(mine / ".tune.lock") as lock:
        assert lock.take(alone=True)
        ending = hear_one(["tune", mine, "--data", dataset])
        assert ending.code != 0 and "another process" in "\n".join(ending.err)
    mine.chmod(0o777)
    assert "can be written by others" in refusal(["tune", mine, "--data", dataset])
    assert os.path.lexists(mine / FILE) is False
