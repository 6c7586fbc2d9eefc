from __future__ import annotations

from pathlib import Path

import pytest

from agrivision.inference.trained import TrainedModel
from tests.inference.small import agriculture_vision, prepared, trained_model


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    return trained_model(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Agriculture-Vision folder: five tiles to train, six to validate, three to test."""
    folder = tmp_path_factory.mktemp("source") / "av"
    return agriculture_vision(folder, {"train": 5, "val": 6, "test": 3})


@pytest.fixture(scope="session")
def dataset(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(source, tmp_path_factory.mktemp("dataset") / "data")
