"""Sweeps: which combinations, under which names, as one array, with a whole table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from agrivision.errors import BadInput
from agrivision.options import read_config
from launch.__main__ import main
from launch.jobdir import Attempt, JobDirectory
from launch.sweep import split_values, take_values
from tests.launch.conftest import FakeSlurm, queued


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-3", ["1e-3"]),
        ("1e-3,3e-3", ["1e-3", "3e-3"]),
        ("[1e-3, 3e-3]", ["1e-3", "3e-3"]),
        ("adamw,sgd", ["adamw", "sgd"]),
        ("null,0.5", ["null", "0.5"]),
        ('["a,b", c]', ["a,b", "c"]),
        ("$(touch HACK),;", ["$(touch HACK)", ";"]),
        ("", [""]),
    ],
)
def test_values_are_read_as_a_list(text: str, values: list[str]) -> None:
    assert split_values("key", text) == values


@pytest.mark.parametrize("text", ["[1, [2, 3]]", "[1, 2", "1,1", "[]", "{a: 1},2"])
def test_what_is_no_list_of_values_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="--key"):
        split_values("key", text)


def test_keys_with_one_value_are_shared() -> None:
    fixed, keys = take_values(
        ["--config", "a,b.yaml", "--seed=1,2", "--optimizer.lr", "[0.1]", "--resume_with_changes"]
    )
    assert fixed == ["--config", "a,b.yaml", "--optimizer.lr", "0.1", "--resume_with_changes"]
    assert keys == {"seed": ["1", "2"]}


@pytest.fixture
def words(config: Path, tmp_path: Path) -> list[str]:
    values = ["--optimizer.lr", "1e-3,3e-3", "--model.depth=[2, 1]"]
    return ["sweep", "--out", str(tmp_path / "sweep"), "--config", str(config), *values]


def elements(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "sweep").iterdir() if path.name != "launch")


def test_all_combinations_as_one_array(words: list[str], tmp_path: Path, slurm: FakeSlurm) -> None:
    assert main([*words, "--array_parallelism", "3", "--qos", "low"]) == 0
    assert [path.name for path in elements(tmp_path)] == [
        "000-optimizer.lr=1e-3,model.depth=2",
        "001-optimizer.lr=1e-3,model.depth=1",
        "002-optimizer.lr=3e-3,model.depth=2",
        "003-optimizer.lr=3e-3,model.depth=1",
    ]
    asked = []
    for place, path in enumerate(elements(tmp_path)):
        job = JobDirectory.of_run(path)
        assert job.jobs() == [f"1_{place}"]
        assert job.spec().run_dir == str(path) and job.spec().resources == {"nodes": "1", "qos": "low"}
        assert (job.code / "launch" / "batch.py").is_file()
        assert (tmp_path / "sweep" / "launch" / "submitit" / f"1_{place}_submitted.pkl").is_file()
        config = read_config(job.config)
        asked.append((config.optimizer.lr, config.model.depth))
    assert asked == [(1e-3, 2), (1e-3, 1), (3e-3, 2), (3e-3, 1)]
    assert len(slurm.calls("sbatch")) == 1
    assert "#SBATCH --array=0-3%3\n" in slurm.script
    assert f"#SBATCH --output={tmp_path}/sweep/launch/slurm-%A_%a.out\n" in slurm.script


def test_the_array_that_was_shown(
    words: list[str], tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert not (tmp_path / "sweep").exists()
    assert main(words) == 0
    assert slurm.script.rstrip() == shown.rstrip()


def test_the_table(
    words: list[str], tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    for place, path in enumerate(elements(tmp_path)[:2]):
        row = {"kind": "evaluation", "step": 6, "epoch": 1, "miou": 0.25 * (place + 1)}
        (path / "metrics.jsonl").write_text(f"{json.dumps(row)}\n")
        JobDirectory.of_run(path).began(
            Attempt(number=1, job=f"1_{place}", nodes=(), tasks=1, began=1.0, code=0, decision="done")
        )
    slurm.hold(queued("1_2"), queued("1_3", "PENDING", "JobArrayTaskLimit"))
    capsys.readouterr()
    table = tmp_path / "results.csv"
    assert main(["sweep", "--out", str(tmp_path / "sweep"), "--table", str(table)]) == 0
    assert len(slurm.calls("sbatch")) == 1
    rows = list(csv.DictReader(table.open()))
    assert [row["state"] for row in rows] == ["done", "done", "running", "pending"]
    assert [row["best mIoU"] for row in rows] == ["0.25", "0.5", "", ""]
    assert [(row["optimizer.lr"], row["model.depth"]) for row in rows][1:3] == [
        ("1e-3", "1"),
        ("3e-3", "2"),
    ]
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith(
        "element 001, optimizer.lr 1e-3, model.depth 1, state done, best mIoU 0.5000"
    )
    assert main([*words, "--table", str(tmp_path / "results.json")]) == 0  # the same sweep: its table
    assert [row["state"] for row in json.loads((tmp_path / "results.json").read_text())] == [
        row["state"] for row in rows
    ]
    assert len(slurm.calls("sbatch")) == 1


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (["--seed", "1,2"], "another sweep"),
        (["--run_dir", "x"], "--out"),
        (["--table", "x.txt"], ".csv or .json"),
    ],
)
def test_a_sweep_that_is_there(
    more: list[str],
    wanted: str,
    words: list[str],
    slurm: FakeSlurm,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(words) == 0
    assert main([*words, *more]) == 2
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (["--optimizer.lr", "1e-3"], "nothing is swept"),
        (["--optimizer.lr", "1e-3,fast"], "optimizer.lr"),
        (["--optimizer.l", "1,2"], "did you mean optimizer.lr?"),
        (["--seed", "1,2", "--array_parallelism", "no"], "--array_parallelism"),
        (["--seed", "1,2\n3"], "control character"),
    ],
)
def test_nothing_is_made_of_a_wrong_sweep(
    values: list[str],
    wanted: str,
    config: Path,
    tmp_path: Path,
    slurm: FakeSlurm,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["sweep", "--out", str(tmp_path / "s"), "--config", str(config), *values]) == 2
    assert wanted in capsys.readouterr().err
    assert not (tmp_path / "s").exists() and slurm.calls("sbatch") == []


def test_names_of_elements_are_safe(config: Path, tmp_path: Path, slurm: FakeSlurm) -> None:
    out = tmp_path / "sweep"
    values = f'["a b", "$(touch HACK)", "../../x", "{"y" * 300}"]'
    assert main(["sweep", "--out", str(out), "--config", str(config), "--data.path", values]) == 0
    names = [path.name for path in elements(tmp_path)]
    assert names[:3] == ["000-data.path=a_b", "001-data.path=__touch_HACK_", "002-data.path=.._.._x"]
    assert len(names[3]) == 120
    assert read_config(JobDirectory.of_run(out / names[1]).config).data.path.endswith("/$(touch HACK)")
