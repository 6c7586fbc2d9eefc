"""A scene of many blocks: killed, shared by ranks, and the same bytes within bounded memory."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from agrivision.inference.trained import TrainedModel
from tests.inference.small import smooth, write_scene
from tests.inference.test_parts import outputs

SIDE = 4200  # pixels: three blocks a side
FLAGS = ["--tile", "224", "--margin", "16", "--overlap", "32", "--batch_size", "4", "--confidence"]
_MOST_BYTES = 2 << 30


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = smooth(np.random.default_rng(9), SIDE // 20, SIDE // 20).repeat(20, 1).repeat(20, 2)
    image[:, :700, :2500] = 0  # a hole over several windows, and over an edge of blocks
    folder = tmp_path_factory.mktemp("large")
    return write_scene(folder / "s.tif", image, nodata=0, tiled=True, compress="deflate")


def start(
    trained: TrainedModel, scene: Path, out: Path, rank: int = 0, size: int = 1
) -> subprocess.Popen:
    words = ["predict", "--checkpoint", str(trained.folder), str(scene), "--out", str(out), *FLAGS]
    ranks = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "agrivision", *words],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | place | {name: str(value) for name, value in ranks.items()},
    )


def end(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def undisturbed(
    trained: TrainedModel, scene: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    end([start(trained, scene, out)])
    return outputs(out)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_killed_twice(
    trained: TrainedModel, scene: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    before = -1
    for _ in range(2):
        process = start(trained, scene, tmp_path / "out")
        deadline = time.monotonic() + 300
        while len(blocks := list(tmp_path.rglob("*.block"))) < before + 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        before = len(blocks)
    assert not (tmp_path / "out/s.tif").exists()
    end([start(trained, scene, tmp_path / "out")])
    assert outputs(tmp_path / "out") == undisturbed
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < _MOST_BYTES


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks(
    size: int, trained: TrainedModel, scene: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    end([start(trained, scene, tmp_path / "out", rank, size) for rank in range(size)])
    assert outputs(tmp_path / "out") == undisturbed
