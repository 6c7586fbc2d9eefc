"""A run that goes through a storm ends with the bits of the run that nothing disturbed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.storm import course, oracle
from tests.storm.__main__ import main
from tests.storm.chaos import Plan
from tests.storm.harness import Course, endure, forked, undisturbed
from tests.storm.weather import FORKED, Fault


@pytest.fixture(scope="module")
def little(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Course:
    folder = tmp_path_factory.mktemp("little")
    run = course.little(dataset, folder, forked)
    assert undisturbed(run, folder / "notes", ranks=1).wrong == []
    return run


def test_a_little_storm(little: Course, tmp_path: Path) -> None:
    faults = little.storm(3, 4, kinds=FORKED, most_ranks=2)
    report = endure(little, faults, tmp_path / "storm", seed=3)
    assert report.wrong == []
    assert report.struck == 4
    assert len(report.attempts) >= 4


KILL = Fault(
    kind="one rank killed", moment="forward", step=12, rank=0, everybody=False, signals=("SIGKILL",),
    damage=None, ranks=1, threads=1,
)  # fmt: skip


def test_a_run_that_goes_on_as_another_is_found_out(little: Course, tmp_path: Path) -> None:
    """The harness must see what it is made to see."""

    def with_another_seed(plan: Plan, words: Sequence[str], ranks: int, said: Path) -> int:
        changed = [] if plan.faults else ["--seed", "1", "--resume_with_changes"]
        return forked(plan, [*words, *changed], ranks, said)

    run = replace(little, ranks=with_another_seed)
    wrong = endure(run, [KILL], tmp_path / "storm", seed=0).wrong
    assert [line.partition(",")[0] for line in wrong[:4]] == [
        "weights", "samples differ", "rows of metrics.jsonl differ", "curves and pictures differ",
    ]  # fmt: skip


def test_a_fault_that_never_happens_is_found_out(little: Course, tmp_path: Path) -> None:
    never = replace(KILL, step=10_000)
    report = endure(little, [never], tmp_path / "storm", seed=0)
    assert report.struck == 0
    assert report.wrong == [f"it never happened (the attempt ended with 0): {never}"]


def gauges(count: int, **grown: float) -> list[dict[str, Any]]:
    start = {"kib": 800_000, "files": 20, "threads": 5}
    return [
        {key: value + int(step * grown.get(key, 0)) for key, value in start.items()} | {"shared": False}
        for step in range(count)
    ]


def test_what_grows_is_found_out() -> None:
    assert oracle.growth_within("run", gauges(100)) == []
    for name, said in (("kib", "memory (KiB)"), ("files", "open files"), ("threads", "threads")):
        rate = 5000 if name == "kib" else 0.1
        (line,) = oracle.growth_within("run", gauges(100, **{name: rate}))
        assert line.startswith(f"run: {said} grew from ")
    assert oracle.growth_within("run", [gauges(1)[0] | {"shared": True}]) == [
        "run: something is in /dev/shm"
    ]


def test_leftovers_are_found_out(tmp_path: Path) -> None:
    for name in (".lock", "metrics.jsonl", "checkpoints/step-000000003/manifest.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert oracle.leftovers(tmp_path) == []
    (tmp_path / "checkpoints" / ".step-000000006.71.part").mkdir()
    (tmp_path / ".metrics.jsonl.71.part").touch()
    assert oracle.leftovers(tmp_path) == [
        ".metrics.jsonl.71.part is left over",
        "checkpoints/.step-000000006.71.part is left over",
    ]


def test_tracebacks_are_found_out() -> None:
    assert oracle.tracebacks("12:00:01 step 3 saved\nagrivision: error: lost the other ranks\n") == []
    text = "Traceback (most recent call last):\n  File \"a.py\", line 1, in <module>\nKeyError: 'x'\n"
    assert oracle.tracebacks(text) == ["a traceback: KeyError: 'x'"]


@pytest.mark.faults
@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", ["0", "fresh"])
def test_the_whole_storm(seed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    number = str(random.SystemRandom().randrange(10**6)) if seed == "fresh" else seed
    code = main(["--seed", number, "--keep", str(tmp_path)])
    assert code == 0, capsys.readouterr().out
