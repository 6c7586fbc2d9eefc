"""What is written about a run: the same over interruptions and on any number of ranks, and true."""

from __future__ import annotations

import json
import signal
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.util import tensor_util

from agrivision.config import Config
from agrivision.data.decode import Pixels, decode_record
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.errors import ExitCode
from agrivision.evaluation.confusion import confusion_matrices
from agrivision.evaluation.curves import above, threshold_counts
from agrivision.inference.trained import load_run
from agrivision.model.losses import LabelSetLoss, class_weights
from agrivision.model.padding import dense_logits
from agrivision.training import about
from tests.ranks import Disturbance, run
from tests.training.runs import TIMINGS, arguments, assert_same, metrics

LAST = 18  # step
EVERYTHING = {
    "training__invariant": "true",
    "training__micro_batch_size": 1,
    "monitor__worst_tiles": 2,
    "monitor__histograms": "true",
}
# Texts and sessions tell of attempts and of the clock.
OF_ONE_RUN = ("_hparams_/session", "config/")


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory):
    """Runs that nothing disturbed, by the number of ranks."""
    folder = tmp_path_factory.mktemp("whole")

    @cache
    def make(ranks: int) -> Path:
        run_dir = folder / str(ranks)
        assert run(arguments(dataset, run_dir, **EVERYTHING), ranks) == [0] * ranks
        return run_dir

    return make


def events(run_dir: Path) -> dict[str, list[tuple[int, Any]]]:
    """Step and content by tag, read by a reader that knows nothing of restarts."""
    found: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for file in sorted((run_dir / "tensorboard").iterdir()):
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                content = None if value.tag.startswith(OF_ONE_RUN) else value.SerializeToString()
                found[value.tag].append((event.step, content))
    return dict(found)


def lasting(run_dir: Path) -> dict[str, list[tuple[int, Any]]]:
    """Those that depend neither on the clock nor on the interruptions."""
    return {tag: found for tag, found in events(run_dir).items() if not tag.startswith(TIMINGS)}


def row_of_evaluation(run_dir: Path, step: int = LAST) -> dict[str, Any]:
    return next(row for row in metrics(run_dir) if row["kind"] == "evaluation" and row["step"] == step)


def test_a_run_with_three_interruptions_tells_the_same(dataset: Path, tmp_path: Path, whole) -> None:
    command = arguments(dataset, tmp_path, **EVERYTHING)
    # Micro-batches of one: six forward passes a step. In an evaluation, in a step, and hard.
    for moment, count, number in [
        ("evaluating", 2, signal.SIGTERM),
        ("step done", 3, signal.SIGTERM),
        ("evaluating", 3, signal.SIGKILL),
    ]:
        code = run(command, disturbance=Disturbance(number, moment, count=count))
        assert code == [ExitCode.STOPPED if number == signal.SIGTERM else -number]
    assert run(command) == [0]
    assert_same(tmp_path, whole(1))
    mine, reference = lasting(tmp_path), lasting(whole(1))
    assert mine.keys() == reference.keys()
    for tag, content in reference.items():
        assert mine[tag] == content, tag
    # The attempts are there as a step function, and as texts.
    attempts = events(tmp_path)
    assert len(attempts["run/attempts/text_summary"]) == 4
    assert [step for step, _ in attempts["run/attempt"]] == list(range(3, LAST + 1, 3))
    # Each checkpoint that was written is told once.
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = [row["step"] for row in rows if row["kind"] == "checkpoint"]
    assert len(told) == len(set(told)) and LAST in told
    assert sorted(step for step, _ in attempts["checkpoint/seconds"]) == sorted(told)
    assert all(row["time"] > 1.7e9 for row in rows)


def test_a_finished_run_that_is_started_again_tells_nothing_twice(dataset: Path, whole) -> None:
    before = lasting(whole(1))
    assert run(arguments(dataset, whole(1), **EVERYTHING)) == [0]
    assert lasting(whole(1)) == before


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_tells_the_same(ranks: int, whole) -> None:
    """Losses, the best and the worst tiles, pixels by probability, pictures."""
    assert metrics(whole(ranks)) == metrics(whole(1))
    mine, reference = lasting(whole(ranks)), lasting(whole(1))
    assert mine.keys() == reference.keys()
    for tag, content in reference.items():
        assert mine[tag] == content, tag


@pytest.fixture(scope="module")
def predicted(dataset: Path, whole) -> tuple[torch.Tensor, torch.Tensor, SplitReader]:
    """Logits and label bits of the whole validation split at once, by the last checkpoint."""
    trained = load_run(whole(1) / "checkpoints" / f"step-{LAST:09d}", "cpu")
    schema = Schema.read(dataset)
    reader = SplitReader(dataset, schema, "val")
    pixels = Pixels.allocate(schema, len(reader))
    for tile in range(len(reader)):
        decode_record(reader.read(tile), schema, pixels, tile)
    with torch.inference_mode():
        logits = dense_logits(trained.module, trained.description.normaliser(pixels.images()))
    return logits, pixels.label_bits(), reader


def test_the_loss_is_that_of_the_whole_split_at_once(predicted, whole) -> None:
    logits, labels, reader = predicted
    config = Config().loss
    pixels = reader.schema.split("train").class_pixels
    weights = class_weights(pixels, config.class_weights, config.max_class_weight)
    losses = LabelSetLoss(weights, config)(logits, labels)
    found = row_of_evaluation(whole(1))["loss"]
    assert list(found) == ["total", "cross_entropy", "dice"]
    for name in found:
        loss = getattr(losses, name)
        assert found[name] == pytest.approx(loss.double().mean().item(), rel=1e-5)


def test_the_row_has_the_matrix_and_the_scores_it_holds(predicted, whole) -> None:
    logits, labels, reader = predicted
    classes = reader.schema.classes
    row = row_of_evaluation(whole(1))
    matrices = confusion_matrices(logits.argmax(1), labels, len(classes))
    # In batches of another size, kernels may add up in another order, which moves pixels on the edge.
    matrix = np.array(row["confusion"])
    assert np.abs(matrix - matrices.sum(0).numpy()).sum() <= 1e-4 * matrix.sum()
    for class_id, name in enumerate(classes):
        hit, called, true = (
            matrix[class_id, class_id],
            matrix[class_id].sum(),
            matrix[:, class_id].sum(),
        )
        if not called + true:
            assert row["precision"][name] is row["recall"][name] is row["f1"][name] is None
            continue
        assert row["precision"][name] == pytest.approx(hit / max(called, 1))
        assert row["recall"][name] == pytest.approx(hit / max(true, 1))
        assert row["f1"][name] == pytest.approx(2 * hit / (called + true))


def test_the_row_names_the_best_and_the_worst_tiles(predicted, whole) -> None:
    logits, labels, reader = predicted
    row = row_of_evaluation(whole(1))
    matrices = confusion_matrices(logits.argmax(1), labels, len(reader.schema.classes)).double()
    for class_id, name in enumerate(reader.schema.classes):
        hits = matrices[:, class_id, class_id]
        true = matrices[:, :, class_id].sum(1)
        union = matrices[:, class_id].sum(1) + true - hits
        iou = {
            reader.key(tile): float(hits[tile] / union[tile])
            for tile in range(len(reader))
            if true[tile]
        }
        for which, sign in (("worst", 1), ("best", -1)):
            found = row[which][name]
            wanted = sorted(iou.values(), key=lambda value, sign=sign: sign * value)[:2]
            assert [value for _, value in found] == pytest.approx(wanted, abs=1e-3)
            for key, value in found:
                assert iou[key] == pytest.approx(value, abs=1e-3)


def test_the_curves_are_those_of_the_whole_split(predicted, whole) -> None:
    logits, labels, reader = predicted
    hits, false = above(threshold_counts(logits.softmax(1), labels))
    found = {}
    for file in (whole(1) / "tensorboard").iterdir():
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag.startswith("pr/") and event.step == LAST:
                    found[value.tag] = tensor_util.make_ndarray(value.tensor)
    classes = [name for number, name in enumerate(reader.schema.classes) if hits[number, 0]]
    assert list(found) == [f"pr/{name}" for name in classes]
    for name in classes:
        number = reader.schema.classes.index(name)
        slack = 1e-3 * float(hits[number, 0] + false[number, 0])
        assert np.abs(found[f"pr/{name}"][0] - hits[number].numpy()).max() <= slack
        assert np.abs(found[f"pr/{name}"][1] - false[number].numpy()).max() <= slack


def test_hyper_parameters_and_the_final_score(whole) -> None:
    plugins = {}
    for file in (whole(1) / "tensorboard").iterdir():
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag.startswith("_hparams_/"):
                    content = value.metadata.plugin_data.content
                    plugins[value.tag] = plugin_data_pb2.HParamsPluginData.FromString(content)
    start = plugins[hparams.SESSION_START_INFO_TAG].session_start_info
    assert start.hparams["data.batch_size"].number_value == 6
    assert start.hparams["training.invariant"].bool_value
    assert start.hparams["optimizer.name"].string_value == "adamw"
    assert "monitor.images" not in start.hparams
    experiment = plugins[hparams.EXPERIMENT_TAG].experiment
    assert experiment.metric_infos[0].name.tag == "score/miou"
    first = {info.name for info in experiment.hparam_infos if info.differs}
    # The same in all runs: TensorBoard takes the list of any one of them.
    assert first == about._FIRST and "optimizer.lr" in first
    assert plugins[hparams.SESSION_END_INFO_TAG].session_end_info.status == 1  # success


def test_what_nobody_asked_for_is_not_there(dataset: Path, tmp_path: Path) -> None:
    changes = {
        "training__max_steps": 3,
        "monitor__images": 0,
        "monitor__worst_tiles": 0,
        "monitor__pr_curves": "false",
    }
    assert run(arguments(dataset, tmp_path, **changes)) == [0]
    tags = {tag.partition("/")[0] for tag in events(tmp_path)}
    assert tags.isdisjoint({"tiles", "worst", "pr", "weights", "gradients", "gpu"})
    assert {"loss", "validation", "iou", "precision", "recall", "checkpoint", "run"} <= tags
    row = row_of_evaluation(tmp_path, 3)
    assert all(tiles == [] for which in ("best", "worst") for tiles in row[which].values())
