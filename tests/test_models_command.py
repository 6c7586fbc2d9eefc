"""`agrivision models`: what networks take and how fast they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from agrivision.commands import models
from agrivision.config import ModelConfig
from agrivision.errors import ConfigurationError
from agrivision.model import measure
from tests.heard import hear_one, refusal

FEW = ["--tile", "32", "--bands", "3", "--classes", "2", "--device", "cpu"]


def small(tmp_path: Path, **model: Any) -> str:
    file = tmp_path / "small.yaml"
    content = {"model": {"base_channels": 2, "depth": 2, **model}, "data": {"indices": "ndvi"}}
    file.write_text(yaml.safe_dump(content))
    return str(file)


def told(words: list[str], tmp_path: Path) -> dict[str, Any]:
    """The JSON of a command that ends well."""
    ending = hear_one(["models", *words, "--json", str(tmp_path / "found.json")])
    assert (ending.code, ending.err) == (0, [])
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    return found


def test_the_networks_are_counted_without_being_run(tmp_path: Path) -> None:
    found = told(["--no-speed", "--encoders", ""], tmp_path)
    rows = {row["network"]: row for row in found["networks"]}
    assert list(rows) == [f"UNet-{n}{kind}" for n in (16, 32, 64) for kind in ("", " residual")]
    assert found["device"] is None
    # The published numbers; a multiply-add is two operations.
    plain = rows["UNet-64"]
    assert round(plain["parameters"] / 1e6, 2) == 31.04
    assert round(plain["flop"] / 1e9, 1) == 385.9
    assert plain["predict_images_per_second"] is plain["peak_bytes"] is None
    assert rows["UNet-64 residual"]["parameters"] > plain["parameters"]


def test_a_configuration_is_counted_with_its_indices(tmp_path: Path) -> None:
    found = told(["--config", small(tmp_path), "--no-speed", *FEW], tmp_path)
    (row,) = found["networks"]
    assert (found["bands"], row["network"], row["side"]) == (4, "small.yaml", 32)
    network = models._networks(str(tmp_path / "small.yaml"), None, 3)[0][0][1]
    assert network == ModelConfig(base_channels=2, depth=2)
    stem = 2 * 32 * 32 * 2 * 4 * 9  # multiply-adds twice, pixels, kernels of 4 channels and 9 pixels
    assert row["flop"] > stem
    assert row["weight_bytes"] >= 4 * row["parameters"]


def test_speeds_are_measured(tmp_path: Path) -> None:
    words = ["--config", small(tmp_path, deep_supervision=1), *FEW, "--batch", "2"]
    found = told(words, tmp_path)
    (row,) = found["networks"]
    assert row["predict_images_per_second"] > 0 < row["train_images_per_second"]
    assert row["peak_bytes"] is None
    assert (found["device"], found["batch"], found["precision"]) == ("cpu", 2, "fp32")


def test_people_read_what_the_columns_are(tmp_path: Path) -> None:
    ending = hear_one(["models", "--config", small(tmp_path), "--no-speed", *FEW])
    assert ending.out[0].split() == ["network", "M", "parameters", "MB", "GFLOP"]
    assert ending.out[1].startswith("small.yaml")
    assert "a multiply-add counted as two" in ending.out[-1]


def test_a_network_that_does_not_fit_the_memory_is_still_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(measure, "speed_of", refuse)
    assert models.COMMAND.run(["--config", small(tmp_path), *FEW]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert row.startswith("small.yaml") and row.count("no memory") == 2


def test_windows_are_measured_at_a_size_that_they_take() -> None:
    pytest.importorskip("timm")
    size = measure.size_of(ModelConfig(encoder="maxvit_tiny_tf_224", base_channels=4), 4, 3, 300)
    assert size.side == 448


def test_the_weights_of_the_encoder_need_not_be_there(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    words = ["--config", small(tmp_path, encoder="resnet10t", encoder_weights="nowhere.safetensors")]
    assert told([*words, "--no-speed", *FEW], tmp_path)["networks"][0]["parameters"] > 1e6


def test_encoders_are_listed(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    found = told(["--list", "resnet10t"], tmp_path)
    assert found == {"encoders": [{"encoder": "resnet10t", "multiple": 32}]}
    assert "no encoder like 'nothing'" in refusal(["models", "--list", "nothing"])


def test_without_timm_the_unets_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_spec", lambda _: None)
    assert len(models._networks(None, None, 4)[0]) == 6
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigurationError, match=r"agrivision\[encoders\]"):
        models.COMMAND.run(["--list", "resnet*"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tile", "0"], "--tile is 0"),
        (["--batch", "-1"], "--batch is -1"),
        (["--device", "abacus"], "abacus"),
        (["--config", "a.yaml", "--encoders", "resnet34"], "--encoders"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--no-speed", "--encoders", "resnet_34"], "timm has no model 'resnet_34'"),
    ],
)
def test_wrong_words_are_one_line(words: list[str], said: str) -> None:
    if "resnet_34" in words:
        pytest.importorskip("timm")
    assert said in refusal(["models", *words])
