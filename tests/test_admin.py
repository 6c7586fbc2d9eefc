"""The admin's page quotes the code: what it says is what is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agrivision.config import Config, ModelConfig
from agrivision.errors import ExitCode
from agrivision.model.build import build_model
from agrivision.world import PORTS, World
from launch import batch, decision, poll, turn
from launch.jobdir import JobSpec
from launch.place import Place
from launch.poll import Answer
from launch.resources import Resources

ROOT = Path(__file__).parents[1]
PAGE = " ".join((ROOT / "docs" / "admin.md").read_text().split())


def says(text: str) -> bool:
    return text in PAGE


def test_its_constants() -> None:
    assert poll.SECONDS == 30 and says("more often than every 30 s")
    assert says(f"every 30 s for up to {turn._PATIENCE_SECONDS:.0f} s")
    assert batch._ASK_AGAIN_SECONDS == 30 and says(
        f"every 30 s, {batch._ASKS} times at most, while the"
    )
    assert says(f"every 30 s, {batch._TRIES} times at most, while it is refused")
    assert says(f"attempts altogether | {Resources().max_attempts} |")
    spec = JobSpec(command=(), python=())
    assert says(f"no later checkpoint | {spec.max_stalled}, preempted")
    assert says(f"lost with their nodes | {decision._LOST_FACTOR * spec.max_stalled} |")
    assert says(f"USR1, {Resources().signal_seconds} s before the time limit")
    assert PAGE.count(f"{PORTS.start}\N{EN DASH}{PORTS.stop - 1}") == 2
    assert says(f"until all have come, {World(rank=0, size=1).rendezvous_seconds:.0f} s at most")
    assert says(f"the newest {Config().training.keep_last}, the best")
    for code in ExitCode:
        assert re.search(rf"\| {int(code)} \| ", PAGE), code


def test_its_sizes() -> None:
    weights = sum(each.numel() for each in build_model(ModelConfig(), 4, 9).parameters())
    assert Config().optimizer.name == "adamw"
    assert says(f"{12 * weights / 1e6:.0f} MB for the default network of {weights / 1e6:.1f} million")
    files = [path for name in ("agrivision", "launch") for path in (ROOT / name).rglob("*.py")]
    assert 200 < len(files) < 260 and says("about 230 files")


def test_the_login_node_imports_neither_torch_nor_gdal(dataset: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from launch.__main__ import main; code = main(sys.argv[1:]);"
        " sys.exit(code or bool({'torch', 'rasterio', 'tensorboard'} & sys.modules.keys()))"
    )
    (tmp_path / "sbatch").write_text("#!/bin/bash\necho 'Submitted batch job 17'\n")
    for name in ("squeue", "scancel"):
        (tmp_path / name).write_text("#!/bin/bash\n")
    for name in ("sbatch", "squeue", "scancel"):
        (tmp_path / name).chmod(0o700)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    words = ["--data.path", str(dataset), "--run_dir", str(tmp_path / "run")]
    for command in (["train", *words], ["status", str(tmp_path / "run")], ["cancel", str(tmp_path)]):
        done = subprocess.run(
            [sys.executable, "-c", program, *command],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done


class Clock:
    """Time that passes when somebody sleeps, and what Slurm was asked meanwhile."""

    def __init__(self) -> None:
        self.now, self.asked = 1000.0, [0.0] * 0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def ask(self, *_: object) -> None:
        self.asked.append(self.now)

    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.asked, self.asked[1:], strict=False)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(time, "sleep", found.sleep)
    monkeypatch.setattr(time, "monotonic", lambda: found.now)
    return found


def test_a_job_that_waits_for_another_asks_every_half_minute(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def states(jobs: object) -> dict[str, str]:
        clock.ask()
        return {"16": "COMPLETING"}

    monkeypatch.setattr(turn, "_states", states)
    monkeypatch.setattr(turn, "_others", lambda *_: ["16"])
    place = Place(job="17", raw_job="17", task=None, restart=0, nodes=("n1",), tasks_per_node=1)
    turn.earlier_jobs(None, place, lambda line: None)  # type: ignore[arg-type]
    assert len(clock.asked) > 3 and min(clock.gaps()) >= 30


def test_a_job_whose_controller_is_silent_asks_every_half_minute(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(jobs: object) -> None:
        clock.ask()
        raise batch.slurm.SlurmError("no answer")

    monkeypatch.setattr(batch.slurm, "queue", silent)
    place = Place(job="17", raw_job="17", task=None, restart=0, nodes=("n1",), tasks_per_node=1)
    spec = JobSpec(command=(), python=())
    assert batch._Batch(None, spec, place, batch._Signals())._ask() is None  # type: ignore[arg-type]
    assert len(clock.asked) == batch._ASKS and min(clock.gaps()) >= 30


@pytest.mark.parametrize("writable", [True, False])
def test_whoever_looks_asks_every_half_minute(tmp_path: Path, clock: Clock, writable: bool) -> None:
    """Also where there is no home to keep the answer in: `logs -f` looks every second."""
    cache = tmp_path / "cache"
    if not writable:
        cache.write_text("a file where a folder belongs")
    environment = {"XDG_CACHE_HOME": str(cache)}
    ages = set()
    for _ in range(200):
        answer = poll.poll(
            0.0, ask=lambda: clock.ask() or {}, clock=lambda: clock.now, environment=environment
        )
        assert isinstance(answer, Answer)
        ages.add(answer.age)
        clock.sleep(1.0)
    assert len(clock.asked) == 7 and min(clock.gaps()) >= 30
    assert max(age for age in ages if age is not None) == 29.0


def test_nothing_sleeps_less_between_two_questions() -> None:
    """Who asks Slurm in a loop sleeps for the one constant."""
    for name in ("batch", "turn", "status"):
        text = (ROOT / "launch" / f"{name}.py").read_text()
        sleeps = set(re.findall(r"time\.sleep\((\w+)\)", text))
        assert sleeps and sleeps <= {"SECONDS", "_ASK_AGAIN_SECONDS"}, name
