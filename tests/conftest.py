"""What tests share: small data sets, prepared once."""

from __future__ import annotations

import os

# Before torch is imported: one thread a process, so that ranks do not fight over two cores.
os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import pytest
from hypothesis import settings

from agrivision.data import staging
from agrivision.data.prepare import PrepareOptions, prepare
from agrivision.data.sources.synthetic import synthesize
from tests.ranks import run
from tests.training.runs import arguments

# How long an example takes says more about the machine's other work than about the code.
settings.register_profile("agrivision", deadline=None)
settings.load_profile("agrivision")

NAIP = Path(__file__).parents[2] / "shared" / "naip"


@pytest.fixture(autouse=True)
def crowded_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """How full this machine's disk is decides nothing; `tests.ranks` does the same in its processes."""
    monkeypatch.setattr(staging, "RESERVED_SHARE", 0.0)


@pytest.fixture(scope="session")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Agriculture-Vision folder of 48 invented tiles, 64 pixels wide."""
    folder = tmp_path_factory.mktemp("synthetic") / "fields"
    synthesize(folder, tiles=48, size=64, seed=0)
    return folder


@pytest.fixture(scope="session")
def dataset(fields: Path) -> Path:
    """The same, prepared: several shards a split, sizes that two and three ranks do not divide."""
    out = fields.with_name("dataset")
    prepare(fields, out, PrepareOptions(workers=1, shard_tiles=7))
    return out


@pytest.fixture(scope="session")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned a little: it predicts more than one class. Not to be written into."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    changes = {"optimizer__lr": 0.02, "training__epochs": 4, "monitor__tensorboard": "false"}
    assert run(arguments(dataset, run_dir, **changes)) == [0]
    return run_dir


@pytest.fixture(scope="session")
def naip() -> Path:
    """Real scenes with labels, which lie beside a checkout and not in it."""
    if not NAIP.is_dir():
        pytest.skip(
            f"the real scenes are not here ({NAIP.parent.name}/{NAIP.name} beside the checkout)"
        )
    return NAIP
