"""The package as a library: what can be imported from it, and that it does what the commands do."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import agrivision
from agrivision import Config, PrepareOptions, UNet, evaluate_run, load_run, prepare, read_config
from agrivision.errors import BadInput
from tests.ranks import run
from tests.training.runs import arguments

NAMES = {
    "UNet": "agrivision.model.unet",
    "load_run": "agrivision.inference.trained",
    "train": "agrivision.training.run",
    "Config": "agrivision.config",
    "prepare": "agrivision.data.prepare",
    "PrepareOptions": "agrivision.data.prepare",
    "synthesize": "agrivision.data.sources.synthetic",
    "evaluate_run": "agrivision.inference.scoring",
    "read_config": "agrivision.options",
}


def test_importing_the_package_and_its_command_line_does_not_import_torch() -> None:
    program = "import sys, agrivision, agrivision.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_names_that_are_promised_are_there(name: str) -> None:
    assert getattr(agrivision, name) is getattr(importlib.import_module(NAMES[name]), name)
    assert name in agrivision.__all__
    assert name in dir(agrivision)


def test_everything_listed_is_there_and_nothing_else() -> None:
    assert {name for name in agrivision.__all__ if getattr(agrivision, name) is not None} >= set(NAMES)
    assert len(set(agrivision.__all__)) == len(agrivision.__all__)
    with pytest.raises(AttributeError, match="load_rum"):
        agrivision.load_rum  # noqa: B018


def test_from_a_run_to_a_map(dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    changes = {"training__max_steps": 2, "monitor__tensorboard": "false", "training__ema_decay": 0}
    assert run(arguments(dataset, run_dir, **changes)) == [0]
    config = read_config(run_dir / "config.yaml", ["--seed", "5"])
    assert isinstance(config, Config)
    assert (config.seed, config.training.max_steps, config.data.path) == (5, 2, str(dataset))

    model = load_run(run_dir, "cpu")
    assert isinstance(model.module, UNet)
    assert not model.module.training
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (4, 50, 71), dtype=np.uint8)  # no multiple of anything
    classes = model.predict(image)
    assert (classes.shape, classes.dtype) == ((50, 71), np.uint8)
    assert classes.max() < len(model.description.classes)
    probabilities = model.probabilities(image[None])
    assert (probabilities[0].argmax(0).numpy() == classes).all()
    np.testing.assert_allclose(probabilities.sum(1).numpy(), 1, rtol=1e-5)
    assert (load_run(model.folder, "cpu").predict(image) == classes).all()
    with pytest.raises(BadInput, match="red, green, blue, nir"):
        model.predict(image[:3])

    found = evaluate_run(run_dir, dataset, "val")
    assert found is not None
    (row,) = [
        row
        for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        if row["kind"] == "evaluation"
    ]
    assert found["miou"] == row["miou"]  # what the run found of itself


def test_preparing_refuses_what_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        prepare(tmp_path / "nowhere", tmp_path / "out", PrepareOptions(workers=1))
    assert list(tmp_path.iterdir()) == []
