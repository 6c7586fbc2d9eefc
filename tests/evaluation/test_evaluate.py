"""The score of a run: exact to the pixel, on any number of ranks, from whatever the user points at."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from agrivision import checkpoint
from agrivision.data.decode import Pixels, decode_record
from agrivision.data.prepare import PrepareOptions, prepare
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.data.sources.synthetic import synthesize
from agrivision.errors import ExitCode, Interrupted
from agrivision.evaluation.confusion import confusion_matrix
from agrivision.inference.scoring import evaluate_run
from agrivision.inference.trained import load_run
from agrivision.rundir import RunDirectory, best_step
from agrivision.world import World
from tests.heard import hear, hear_one, refusal
from tests.ranks import Disturbance, run

CONTRACT = {"miou", "iou", "confusion", "classes"}


@pytest.fixture(scope="module")
def found(dataset: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory):
    """What `agrivision evaluate --json` writes, by ranks and batch size."""
    folder = tmp_path_factory.mktemp("found")

    @cache
    def make(ranks: int, batch_size: int) -> dict[str, Any]:
        file = folder / f"{ranks}-{batch_size}.json"
        command = ["evaluate", "--checkpoint", trained, "--data", dataset, "--json", file]
        endings = hear([*command, "--batch_size", str(batch_size)], ranks)
        assert [ending.code for ending in endings] == [0] * ranks, endings
        assert "mIoU" in "\n".join(endings[0].out)
        assert not any(ending.out for ending in endings[1:])  # one table, not one of each rank
        content: dict[str, Any] = json.loads(file.read_text())
        return content

    return make


# Ten tiles: batches of three end with one tile, and ten in a batch leave ranks without any.
@pytest.mark.parametrize("batch_size", [3, 10])
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_finds_the_same(ranks: int, batch_size: int, found) -> None:
    assert found(ranks, batch_size) == found(1, batch_size)


def test_the_matrix_is_that_of_a_plain_loop_over_tiles(dataset: Path, trained: Path, found) -> None:
    schema, model = Schema.read(dataset), load_run(trained, "cpu")
    reader = SplitReader(dataset, schema, "val")
    matrix = torch.zeros(len(schema.classes), len(schema.classes), dtype=torch.int64)
    pixels = Pixels.allocate(schema, 1)
    for tile in range(len(reader)):
        decode_record(reader.read(tile), schema, pixels, 0)
        classes = model.predict(pixels.images()[0].numpy())
        matrix += confusion_matrix(torch.from_numpy(classes)[None], pixels.label_bits(), len(matrix))
    assert found(1, 1)["confusion"] == matrix.tolist()
    assert (matrix.sum(1) > 0).sum() > 1  # it predicts more than one class
    # With larger batches kernels may add up in another order, which moves only pixels on the edge.
    for batch_size in (3, 10):
        difference = np.abs(np.array(found(1, batch_size)["confusion"]) - matrix.numpy()).sum()
        assert difference <= 1e-4 * matrix.sum()


def test_the_json_has_the_keys_of_the_contract(dataset: Path, found) -> None:
    content, schema = found(1, 3), Schema.read(dataset)
    assert set(content) >= CONTRACT
    assert content["classes"] == list(schema.classes)
    matrix = np.array(content["confusion"])
    assert matrix.shape == (len(schema.classes),) * 2
    # Rows are predicted, columns true: a column has at least the pixels of its class.
    true = matrix.sum(0)
    right, both = matrix.diagonal(), matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    assert (right + (matrix.sum(0) - right) == true).all()
    labelled = np.array(schema.splits["val"].class_pixels)
    assert (true == labelled).all()
    iou = [None if union == 0 else hit / union for hit, union in zip(right, both, strict=True)]
    assert list(content["iou"].values()) == [None if v is None else pytest.approx(v) for v in iou]
    assert list(content["iou"]) == list(schema.classes)
    assert content["miou"] == pytest.approx(np.mean([value for value in iou if value is not None]))


def test_a_class_that_is_nowhere_has_no_score(trained: Path, tmp_path: Path) -> None:
    """Neither in the labels, from which it is taken here, nor predicted, which it never is so early."""
    synthesize(tmp_path / "fields", tiles=12, size=64, seed=3)
    for mask in (tmp_path / "fields" / "val" / "labels" / "endrow").iterdir():
        Image.new("L", (64, 64)).save(mask)
    prepare(tmp_path / "fields", tmp_path / "data", PrepareOptions(workers=1))
    file = tmp_path / "scores.json"
    command = ["evaluate", "--checkpoint", trained, "--data", tmp_path / "data", "--json", file]
    ending = hear_one(command)
    assert ending.code == 0, ending
    content = json.loads(file.read_text())
    matrix = np.array(content["confusion"])
    absent = [bool(union == 0) for union in matrix.sum(0) + matrix.sum(1)]
    assert absent[3], "endrow is predicted"
    assert [value is None for value in content["iou"].values()] == absent
    known = [value for value in content["iou"].values() if value is not None]
    assert content["miou"] == pytest.approx(np.mean(known))
    assert "absent" in ending.out[-1]


def test_a_run_a_checkpoint_and_a_file_in_it_can_be_given(
    dataset: Path, trained: Path, tmp_path: Path, found
) -> None:
    step = best_step(RunDirectory(trained).evaluations())
    folder = trained / "checkpoints" / f"step-{step:09d}"
    assert found(1, 3)["step"] == step  # a run directory means its best checkpoint
    assert found(1, 3)["checkpoint"] == str(folder)
    for given in (
        folder,
        folder / "model.safetensors",
        folder / "manifest.json",
        trained / "config.yaml",
    ):
        file = tmp_path / "scores.json"
        command = ["evaluate", "--checkpoint", given, "--data", dataset, "--json", file]
        assert hear_one([*command, "--batch_size", "3"]).code == 0
        assert json.loads(file.read_text()) == found(1, 3)


@pytest.fixture
def mine(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run whose best checkpoint is not its newest, to be damaged."""
    copy = Path(shutil.copytree(trained, tmp_path / "mine"))
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    scores = iter([0.2, 0.9, 0.3, 0.4])
    for row in rows:
        if row["kind"] == "evaluation":
            row["miou"] = next(scores)
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return copy


def test_the_best_is_not_the_newest(mine: Path) -> None:
    assert (load_run(mine, "cpu").step, checkpoint.entries(mine / "checkpoints")[-1].step) == (12, 24)


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "description.json"])
def test_a_damaged_best_checkpoint_is_replaced_by_the_newest_whole_one(
    name: str, mine: Path, dataset: Path
) -> None:
    for step in (12, 24):  # the best, and the newest
        file = mine / "checkpoints" / f"step-{step:09d}" / name
        content = bytearray(file.read_bytes())
        content[-20] ^= 1
        file.write_bytes(content)
    command = ["evaluate", "--checkpoint", mine, "--data", dataset, "--json", mine / "scores.json"]
    ending = hear_one(command)
    assert ending.code == 0, ending
    assert any(f"step-000000012/{name} is damaged" in line for line in ending.err)
    assert json.loads((mine / "scores.json").read_text())["step"] == 20
    # Whoever asks for the damaged one by name does not get another.
    line = refusal([*command, "--checkpoint", file.parent])
    assert f"{file} is damaged" in line


def test_where_there_is_no_checkpoint(dataset: Path, tmp_path: Path) -> None:
    command = ["evaluate", "--data", dataset, "--checkpoint"]
    assert "no checkpoint" in refusal([*command, tmp_path])
    assert "nowhere" in refusal([*command, tmp_path / "nowhere"])
    (tmp_path / "file").write_text("")
    assert "no checkpoint" in refusal([*command, tmp_path / "file"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_damaged_tile_ends_all_ranks(
    ranks: int, trained: Path, dataset: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(dataset, tmp_path / "broken"))
    shard = broken / "val" / "00001.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    file = tmp_path / "scores.json"
    command = ["evaluate", "--checkpoint", trained, "--data", broken, "--json", file]
    endings = hear([*command, "--batch_size", "2"], ranks)
    assert [ending.code for ending in endings] == [ExitCode.BAD_INPUT] * ranks, endings
    assert all(str(shard) in ending.complaint for ending in endings)
    assert not file.exists()


def test_other_bands_or_classes_are_refused(trained: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "fields", tiles=12, size=64, seed=1)
    fewer = tmp_path / "fewer"
    prepare(tmp_path / "fields", fewer, PrepareOptions(workers=1, edition="2020"))
    command = ["evaluate", "--checkpoint", trained, "--data"]
    line = refusal([*command, fewer])
    assert str(fewer) in line
    assert "classes" in line
    assert "planter_skip" in line
    schema = Schema.read(fewer)
    others = Path(shutil.copytree(fewer, tmp_path / "others"))
    content = {field: getattr(schema, field) for field in schema.__dataclass_fields__}
    Schema(**(content | {"bands": ("nir", "red", "green", "blue")})).write(others)
    line = refusal([*command, others])
    assert "bands nir, red, green, blue" in line
    assert "trained on red, green, blue, nir" in line


def test_a_split_that_is_not_there_or_has_no_labels(trained: Path, dataset: Path) -> None:
    command = ["evaluate", "--checkpoint", trained, "--data", dataset, "--split"]
    assert "'tset'" in refusal([*command, "tset"])
    assert "no labels" in refusal([*command, "test"])


# The signal reaches one rank only: the others must hear of it.
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("ranks", [1, 2])
def test_asked_to_stop_all_ranks_leave_with_85(
    ranks: int, number: signal.Signals, trained: Path, dataset: Path, tmp_path: Path, found
) -> None:
    file = tmp_path / "scores.json"
    command = ["evaluate", "--checkpoint", trained, "--data", dataset, "--json", file]
    command += ["--batch_size", "1"]
    stop = Disturbance(number, "evaluating", count=2, rank=ranks - 1)
    endings = hear(command, ranks, disturbance=stop)
    assert [ending.code for ending in endings] == [ExitCode.STOPPED] * ranks, endings
    for ending in endings:
        assert ending.complaint.startswith("stopped before the evaluation was done: ")
        assert ending.out == []
    assert not file.exists()
    assert run([str(word) for word in command], ranks) == [0] * ranks
    assert json.loads(file.read_text()) == found(1, 1)


# Sends a signal to this process at the moment when it begins to import torch.
EARLY = """
import os, signal, sys
class Early:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGUSR1)
from agrivision.cli import main
assert "torch" not in sys.modules
sys.meta_path.insert(0, Early())
"""


def test_a_signal_while_torch_is_imported(trained: Path, dataset: Path) -> None:
    words = ["evaluate", "--checkpoint", str(trained), "--data", str(dataset)]
    done = subprocess.run(
        [sys.executable, "-c", f"{EARLY}\nsys.exit(main({words!r}))"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitCode.STOPPED, done
    assert "stopped before the evaluation was done" in done.stderr
    assert "Traceback" not in done.stderr


def test_asked_to_stop_before_the_ranks_have_met(trained: Path, dataset: Path, tmp_path: Path) -> None:
    alone = World(rank=1, size=2, launcher="slurm", job="1", job_dir=str(tmp_path))
    with pytest.raises(Interrupted, match="before the ranks had met"):
        evaluate_run(trained, dataset, "val", world=alone, stop=lambda: True)
