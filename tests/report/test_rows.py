"""metrics.jsonl of any version, whole or not."""

import json
from pathlib import Path

import numpy as np
import pytest

from agrivision.errors import BadInput
from agrivision.report.rows import Tile, read_metrics
from tests.report.made import CONFUSION, evaluation, training, whole_evaluation


def written(folder: Path, *lines: object) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text(
        "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    )
    return path


def test_rows_are_read_as_they_stand(tmp_path: Path) -> None:
    gpu = {"utilisation": 0.6, "power_watts": 150.0, "energy_joules": 12.0, "memory_gib": 1.0}
    best = whole_evaluation(20, 0.7, best={"water": [["k1", 0.9]]}, worst={"water": [["k2", 0.0]]})
    metrics = read_metrics(
        written(
            tmp_path,
            training(10, time=5.0, gpu=gpu, megapixels_per_second=3.0),
            whole_evaluation(10, 0.5),
            training(20, time=9.0, total=None),
            best,
            {"kind": "checkpoint", "step": 20, "seconds": 1.5},
            {"kind": "of another version", "step": 20},
            evaluation(30, None),
        )
    )
    columns = metrics.training
    assert columns["step"].tolist() == [10, 20]
    assert columns["utilisation"][0] == pytest.approx(0.6)
    assert (columns["power_watts"][0], columns["energy_joules"][0]) == (150.0, 12.0)
    assert columns["total"][0] == 0.2 and np.isnan(columns["total"][1])
    assert metrics.best is not None and metrics.best.step == 20
    assert metrics.best.confusion == tuple(map(tuple, CONFUSION))
    assert metrics.best.best == {"water": (Tile(key="k1", iou=0.9),)}
    assert metrics.evaluations[0].confusion == ()  # neither the best nor the last
    assert metrics.last is not None and metrics.last.step == 30
    assert (metrics.saving, metrics.unread, metrics.last_time) == ((1.5,), 0, 9.0)


def test_rows_of_an_older_version_are_enough(tmp_path: Path) -> None:
    metrics = read_metrics(written(tmp_path, training(10), evaluation(10, 0.5)))
    assert metrics.last is not None
    assert metrics.last.precision == {} and metrics.last.confusion == () and metrics.last.loss == {}
    assert not metrics.has("time") and not metrics.has("energy_joules")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "7",
        '{"kind": "training"}',
        '{"kind": "training", "step": "7"}',
        '{"kind": "training", "step": 7, "total": "x"}',
        '{"kind": "training", "step": 7, "total": 1e999}',
        '{"kind": "training", "step": 7, "gpu": []}',
        '{"kind": "training", "step": 7, "gpu": 1}',
        '{"kind": "evaluation", "step": 7, "miou": 2, "iou": {"a": 0.5}}',
        '{"kind": "evaluation", "step": 7, "miou": 0.5, "iou": {}}',
        '{"kind": "evaluation", "step": 7, "miou": 0.5, "iou": {"a\\u001b": 0.5}}',
        '{"kind": "evaluation", "step": 7, "miou": 0.5, "iou": {"a": 0.5}, "confusion": [[1], [2]]}',
        '{"kind": "evaluation", "step": 7, "miou": 0.5, "iou": {"a": 0.5}, "best": {"a": [["k"]]}}',
        '{"kind": "checkpoint", "step": 7}',
        "[" * 100_000,
        '{"kind": "' + "x" * (17 << 20) + '"}',
    ],
    ids=lambda line: line[:60],
)
def test_a_strange_line_is_counted_and_passed_over(tmp_path: Path, line: str) -> None:
    metrics = read_metrics(written(tmp_path, training(2), line, training(4)))
    assert metrics.training["step"].tolist() == [2, 4]
    assert metrics.unread == 1
    assert metrics.evaluations == ()


def test_a_torn_last_row_is_no_damage(tmp_path: Path) -> None:
    path = written(tmp_path, training(2), training(4))
    path.write_bytes(path.read_bytes()[:-20])
    metrics = read_metrics(path)
    assert (metrics.training["step"].tolist(), metrics.unread) == ([2], 0)


def test_what_cannot_be_reported_on_says_why(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is no such run directory"):
        read_metrics(tmp_path / "gone" / "metrics.jsonl")
    with pytest.raises(BadInput, match="it has no metrics yet, so wait for its first steps"):
        read_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(BadInput, match=r"metrics\.jsonl has no rows yet"):
        read_metrics(written(tmp_path))
    with pytest.raises(BadInput, match="only damaged rows"):
        read_metrics(written(tmp_path, "{"))
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(BadInput, match="Is a directory"):
        read_metrics(tmp_path / "metrics.jsonl")
