"""The commands of every page, run as somebody would who follows it, on little data."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import yaml

from agrivision.cli import main
from agrivision.config import flatten
from launch.cluster import Cluster, ClusterOptions
from tests.data.scenes import write_raster
from tests.docs.pages import ROOT, Block, blocks
from tests.slurm.conftest import ANY_INTERFACE, Clusters
from tests.slurm.jobs import ENDED, wait_for

# What is there before somebody follows a page, by the names on it.
PAGES: dict[str, tuple[str, ...]] = {
    "docs/start.md": (),
    "docs/agriculture_vision.md": ("Agriculture-Vision-2021",),
    "docs/scenes.md": ("my_farm", "my_farm.csv", "new_scenes"),
    "docs/maps.md": ("data/farm", "runs/farm", "mosaic.tif", "scenes", "scenes.txt"),
    "docs/slurm.md": ("Agriculture-Vision-2021",),
    "docs/resuming.md": ("data/farm",),
    "docs/watching.md": ("data/av2021", "runs/first"),
    "docs/performance.md": ("data/av2021",),
    "docs/reliability.md": ("data/av2021",),
    "docs/configuration.md": ("data/farm",),
    "docs/shards.md": ("data/av2021",),
    "docs/models.md": (),
}
PLAIN = {"docs/start.md", "docs/shards.md"}  # the others take minutes
# The configurations are those of the repository, but for these values.
SMALLER = {
    "data.batch_size": 6,
    "data.crop": 32,
    "data.threads": 1,
    "model.base_channels": 4,
    "model.depth": 3,
    "training.epochs": 1,
    "training.max_steps": 4,
    "training.precision": "fp32",
    "training.evaluate_every_epochs": 1,
    "monitor.images": 1,
}
# What of a cluster two cores can be: ranks take turns on them.
FEWER = {
    "--nodes=2": "--nodes=1",
    "--nodes 2": "--nodes 1",
    "--ntasks-per-node=4": "--ntasks-per-node=2",
    "--gpus-per-node=4": "--gpus-per-node=2",
    "gpus_per_node 4": "gpus_per_node 2",
    "--cpus-per-task=8": "--cpus-per-task=1",
    "--cpus_per_task 8": "--cpus_per_task 1",
    "--run_dir runs/second": "--run_dir runs/second --training.epochs 500 --training.max_steps 100",
}  # the last is cancelled while it runs
SUBMITS = re.compile(r"^(sbatch|python -m launch (train|sweep|pipeline)) ", re.MULTILINE)
SECONDS = 280.0  # for one block
NOT_OURS = {".git", ".venv", "site"}


def scene(path: Path, seed: int, size: tuple[int, int] = (150, 210)) -> None:
    generator = np.random.default_rng(seed)
    write_raster(path, generator.integers(0, 256, (4, *size), dtype=np.uint8))


def farm(folder: Path) -> None:
    for seed, name in enumerate(["north_field", "south_field", "2023_july"]):
        scene(folder / "scenes" / f"{name}.tif", seed, (512, 1024))
        labels = np.random.default_rng([seed, 1]).integers(0, 3, (512, 1024), dtype=np.uint8)
        write_raster(folder / "labels" / f"{name}.tif", labels)


def farm_table(path: Path) -> None:
    rows = ["scene,label,split", "my_farm/scenes/north_field.tif,my_farm/labels/north_field.tif,train"]
    rows.append("my_farm/scenes/south_field.tif,my_farm/labels/south_field.tif,val")
    path.write_text("\n".join(rows) + "\n")


def scenes(folder: Path) -> None:
    for seed in range(2):
        scene(folder / f"s{seed}.tif", 10 + seed)


def done(*words: str | Path) -> None:
    assert main([str(word) for word in words]) == 0


def prepared_farm(out: Path) -> None:
    source = out.with_name("source")
    farm(source)
    done(
        "prepare", source, out, "--tile", "128", "--workers", "1", "--classes", "0:crop,1:weeds,2:water"
    )


def trained(data: str) -> Callable[[Path], None]:
    """Makes a run on a data set that stands beside it."""

    def make(run: Path) -> None:
        given = [f"--{key}={value}" for key, value in SMALLER.items()]
        done("train", "--run_dir", run, f"--data.path={run.parents[1] / data}", *given)

    return make


@pytest.fixture(scope="module")
def things(
    fields: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Path], None]:
    """Puts what a page begins with into a folder; each thing is made once."""
    store = tmp_path_factory.mktemp("things")
    makers: Mapping[str, Callable[[Path], object]] = {
        "Agriculture-Vision-2021": lambda path: shutil.copytree(fields, path),
        "data/av2021": lambda path: shutil.copytree(dataset, path),
        "data/farm": prepared_farm,
        "my_farm": farm,
        "my_farm.csv": farm_table,
        "mosaic.tif": lambda path: scene(path, 7),
        "scenes": scenes,
        "new_scenes": scenes,
        "scenes.txt": lambda path: path.write_text("mosaic.tif\n"),
        "runs/first": trained("data/av2021"),
        "runs/farm": trained("data/farm"),
    }

    def put(name: str, folder: Path) -> None:
        path = store / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            makers[name](path)
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, target)

    return put


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like a fresh clone, with small configurations."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name not in NOT_OURS and path.name != "configs":
            (folder / path.name).symlink_to(path)
    (folder / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.yaml"):
        values = flatten(yaml.safe_load(path.read_text()))
        if "training.epochs" in values:
            (folder / "configs" / path.name).write_text(nested(values | SMALLER))
        else:
            shutil.copyfile(path, folder / "configs" / path.name)
    return folder


def nested(values: Mapping[str, object]) -> str:
    tree: dict[str, object] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        place = tree.setdefault(section, {}) if section else tree
        assert isinstance(place, dict)
        place[name] = value
    return yaml.safe_dump(tree)


def environment(home: Path) -> dict[str, str]:
    """What a login shell would have, with the environment that the tests run in."""
    programs = str(Path(sys.executable).parent)
    kept = {name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ}
    return kept | {
        "HOME": str(home),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def run(block: Block, text: str, folder: Path, variables: Mapping[str, str]) -> None:
    """Run a block as a script, to its end."""
    program = ["bash", "-euo", "pipefail", "-c"] if block.language == "sh" else [sys.executable, "-c"]
    ended = subprocess.run(
        [*program, text], cwd=folder, env=dict(variables), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    good = (0, 1) if block.mark == "may find something" else (0,)
    assert ended.returncode in good, f"{block}\n{text}\n{ended.stdout}\n{ended.stderr}"


def serve(block: Block, text: str, folder: Path, variables: Mapping[str, str]) -> None:
    """Run a block until its page is there, look at it, and stop it as Ctrl-C does."""
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", f"exec {text}"], cwd=folder, env=dict(variables),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    lines: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=collect, args=(process.stdout, lines), daemon=True)
    reader.start()

    def address() -> re.Match[str] | None:
        assert process.poll() is None, f"{block}\n{''.join(lines)}"
        return re.search(r"http://(?:localhost|127\.0\.0\.1):\d+/\S*", "".join(lines))

    try:
        found = wait_for(address, 120, f"{block} says where to look")
        assert found is not None
        with urllib.request.urlopen(found[0], timeout=120) as answer:
            assert answer.status == 200 and b"<html" in answer.read().lower()
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
        reader.join(60)


def collect(stream: IO[str], lines: list[str]) -> None:
    lines.extend(iter(stream.readline, ""))


def numbers(cluster: Cluster) -> dict[str, str]:
    """The jobs that the cluster knows, and their states."""
    answer = cluster.run("squeue", "--noheader", "--states=all", "--format=%i %T")
    return dict(line.split() for line in answer.splitlines())


def jobs_are_over(cluster: Cluster, before: Mapping[str, str], folder: Path) -> None:
    """Wait for the jobs of a page, none of which may have failed."""

    def over() -> dict[str, str]:
        mine = {job: state for job, state in numbers(cluster).items() if job not in before}
        return {"none": "COMPLETED"} | mine if set(mine.values()) <= ENDED else {}

    ends = wait_for(over, SECONDS, "its jobs are over")
    logs = "\n".join(path.read_text() for path in folder.glob("agrivision-*.out"))
    assert set(ends.values()) <= {"COMPLETED", "CANCELLED"}, f"{ends}\n{logs}"


def follow(page: str, folder: Path, variables: Mapping[str, str], cluster: Cluster | None) -> None:
    """Run the blocks of a page one after the other."""
    before = numbers(cluster) if cluster is not None else {}
    for block in blocks(page):
        if block.language not in ("sh", "python") or block.mark == "not run":
            continue
        text = block.text
        if cluster is not None:
            if block.mark != "meanwhile":
                jobs_are_over(cluster, before, folder)
            for many, few in FEWER.items():
                text = text.replace(many, few)
        (serve if block.mark == "serves" else run)(block, text, folder, variables)
    if cluster is not None:
        jobs_are_over(cluster, before, folder)


def needs_slurm(page: str) -> bool:
    runs = [block for block in blocks(page) if block.language == "sh" and block.mark != "not run"]
    return any(SUBMITS.search(block.text) for block in runs)


def marks(page: str) -> list[pytest.MarkDecorator]:
    slow = [] if page in PLAIN else [pytest.mark.faults, pytest.mark.timeout(1800)]
    return [*slow, pytest.mark.slurm] if needs_slurm(page) else slow


@pytest.mark.parametrize("page", [pytest.param(page, marks=marks(page)) for page in PAGES])
def test_a_page_can_be_followed(
    page: str,
    clone: Path,
    things: Callable[[str, Path], None],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    for name in PAGES[page]:
        things(name, clone)
    home = tmp_path / "home"
    variables = environment(home)
    home.mkdir()
    cluster = None
    if needs_slurm(page):
        clusters: Clusters = request.getfixturevalue("clusters")
        cluster = clusters(ClusterOptions(any_interface=ANY_INTERFACE))
        variables |= cluster.environment | {"PATH": variables["PATH"]}
        site = home / ".config" / "agrivision" / "site.sh"
        site.parent.mkdir(parents=True)
        site.write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n')
        site.chmod(0o600)
    follow(page, clone, variables, cluster)
