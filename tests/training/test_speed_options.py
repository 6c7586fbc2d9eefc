"""What makes steps faster leaves them what they are, and a profile shows where their time goes."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch

from agrivision import checkpoint
from agrivision.errors import ExitCode
from tests.heard import hear_one
from tests.ranks import run
from tests.training.runs import arguments, last_bits, metrics, samples

PLAIN = {
    "training__ema_decay": 0,
    "model__dropout": 0,
    "monitor__tensorboard": "false",
    "monitor__images": 0,
    "training__evaluate_every_epochs": 0,
    "training__checkpoint_every_epochs": 0,
    "training__checkpoint_every_steps": 100,
}


def losses(run_dir: Path) -> list[float]:
    return [row["total"] for row in metrics(run_dir) if row["kind"] == "training"]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.folders(run_dir / "checkpoints")[-1]).states["model"]


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_compressed_gradients_are_rounded_gradients(kind: str, dataset: Path, tmp_path: Path) -> None:
    options = PLAIN | {
        "optimizer__name": "sgd",
        "optimizer__momentum": 0,
        "optimizer__clip_norm": "null",
        "optimizer__weight_decay": 0,
        "training__max_steps": 1,
        "model__norm": "group",
    }
    for compression in ("none", kind):
        command = arguments(
            dataset, tmp_path / compression, **options, training__gradient_compression=compression
        )
        assert run(command, 2) == [0, 0]
    exact, rounded = weights(tmp_path / "none"), weights(tmp_path / kind)
    assert any(not torch.equal(value, rounded[name]) for name, value in exact.items())
    for name, value in exact.items():
        # After one step of lr 1e-3 the weights differ by as much as the rounding of the gradients.
        torch.testing.assert_close(rounded[name], value, rtol=0, atol=1e-3 * 2**-6)


def test_a_run_may_not_change_how_its_gradients_travel(dataset: Path, tmp_path: Path) -> None:
    command = arguments(dataset, tmp_path, **PLAIN, training__max_steps=1)
    assert run(command) == [0]
    ending = hear_one([*command, "--training.gradient_compression", "bf16"])
    assert ending.code == ExitCode.BAD_INPUT
    assert "training.gradient_compression was 'none'" in ending.complaint


@pytest.mark.faults
@pytest.mark.timeout(1100)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_compiled_network_is_the_same_network(ranks: int, dataset: Path, tmp_path: Path) -> None:
    for compiled in ("false", "true"):
        options = PLAIN | {"training__compile": compiled, "training__max_steps": 6}
        command = arguments(dataset, tmp_path / compiled, **options)
        assert run(command, ranks, timeout=500) == [0] * ranks
    plain, fused = (losses(tmp_path / name) for name in ("false", "true"))
    assert plain == pytest.approx(fused, rel=1e-4)
    assert samples(tmp_path / "true") == samples(tmp_path / "false")
    assert set(weights(tmp_path / "true")) == set(weights(tmp_path / "false"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_profile_is_a_trace_and_a_table_of_some_steps(
    ranks: int, dataset: Path, tmp_path: Path
) -> None:
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    assert run(arguments(dataset, plain, **PLAIN), ranks) == [0] * ranks
    assert run([*arguments(dataset, profiled, **PLAIN), "--profile"], ranks) == [0] * ranks
    assert last_bits(profiled) == last_bits(plain)
    assert sorted(path.name for path in (profiled / "profile").iterdir()) == sorted(
        f"rank-{rank}.{kind}" for rank in range(ranks) for kind in ("txt", "trace.json.gz")
    )
    for rank in range(ranks):
        with gzip.open(profiled / "profile" / f"rank-{rank}.trace.json.gz") as file:
            events = json.load(file)["traceEvents"]
        names = [event.get("name") for event in events if event.get("ph") == "X"]
        for phase in ("wait for data", "augment", "forward", "loss", "backward", "optimiser"):
            assert names.count(f"agrivision: {phase}") == 5, phase
        assert "agrivision: forward" in (profiled / "profile" / f"rank-{rank}.txt").read_text()


def test_a_run_too_short_for_a_profile_says_so(dataset: Path, tmp_path: Path) -> None:
    command = arguments(dataset, tmp_path, **PLAIN, training__max_steps=3)
    ending = hear_one([*command, "--profile"])
    assert ending.code == 0
    assert any("no profile: it takes 13 steps" in line for line in ending.err)
    assert list((tmp_path / "profile").iterdir()) == []
