"""`prepare` and `predict` on a full disk: one line, and the next call goes on to the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agrivision.data.prepare import PrepareOptions, prepare
from agrivision.errors import StorageError
from agrivision.inference.predict import PredictOptions, predict
from agrivision.inference.trained import TrainedModel
from tests.disks import mount, small_disk
from tests.heard import hear_one
from tests.inference.small import agriculture_vision, smooth, trained_model
from tests.inference.test_scenes import write_scene

LARGE = "32m"


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".predict" not in path.parts
    }


def enlarge(disk: Path) -> None:
    mount("-o", f"remount,size={LARGE}", str(disk))


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*.tar")
        if not path.name.startswith(".")
    }


@pytest.mark.row(20)
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("size", ["64k", "200k", "320k", "440k"])
def test_prepare_keeps_what_it_has_made(
    size: str, workers: int, fields: Path, dataset: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", size) as disk:
        out, partial = disk / "data", disk / "data.partial"
        command = ["prepare", fields, out, "--workers", workers, "--shard_tiles", 7]
        ending = hear_one(command)
        assert ending.code == 1
        assert "No space left on device" in ending.complaint
        assert not out.exists()
        made = stamps(partial)
        enlarge(disk)
        options = PrepareOptions(workers=1, shard_tiles=7)
        prepare(fields, out, options)
        assert tree(out) == tree(dataset)
        after = stamps(out)
        noted = [name for name in made if after[name] == made[name]]
        assert len(noted) >= len(made) - workers  # all but those whose index or note found no room


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    return trained_model(tmp_path_factory.mktemp("run"))


@pytest.mark.row(20)
@pytest.mark.parametrize("size", ["16k", "48k", "64k", "80k"])
def test_predict_keeps_what_it_has_made(size: str, trained: TrainedModel, tmp_path: Path) -> None:
    source = agriculture_vision(tmp_path / "av", {"val": 6, "test": 3})
    scene = write_scene(tmp_path / "scene.tif", smooth(np.random.default_rng(0), 90, 70))
    inputs, options = [source, scene], PredictOptions(batch_size=1, threads=0, tile=32)
    predict(trained, inputs, tmp_path / "reference", options)
    with small_disk(tmp_path / "disk", size) as disk:
        # GDAL itself does not say why the last bytes of a scene are missing.
        with pytest.raises(StorageError, match=r"No space left on device|is the disk full") as error:
            predict(trained, inputs, disk / "out", options)
        assert "\n" not in str(error.value)
        reference = tree(tmp_path / "reference")
        for name, content in tree(disk / "out").items():
            assert reference[name] == content  # whole, or not there
        enlarge(disk)
        predict(trained, inputs, disk / "out", options)
        assert tree(disk / "out") == reference
