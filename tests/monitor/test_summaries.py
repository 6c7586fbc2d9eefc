"""What TensorBoard's own readers find in what is written for its plugins."""

from __future__ import annotations

import numpy as np
import pytest
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalar
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.pr_curve import metadata as pr_curve
from tensorboard.util import tensor_util

from agrivision.monitor import summaries


def test_a_layout() -> None:
    value = summaries.layout({"Score": {"IoU": ["iou/"], "mIoU": ["score/miou$"]}}).value[0]
    assert value.tag == custom_scalar.CONFIG_SUMMARY_TAG
    assert value.metadata.plugin_data.plugin_name == custom_scalar.PLUGIN_NAME
    layout = layout_pb2.Layout.FromString(tensor_util.make_ndarray(value.tensor).item())
    charts = layout.category[0].chart
    assert [(chart.title, list(chart.multiline.tag)) for chart in charts] == [
        ("IoU", ["iou/"]),
        ("mIoU", ["score/miou$"]),
    ]


def test_precision_and_recall() -> None:
    hits, called = np.array([8, 6, 0]), np.array([20, 8, 0])
    value = summaries.precision_recall("pr/a", hits, called, true=8).value[0]
    assert value.metadata.plugin_data.plugin_name == pr_curve.PLUGIN_NAME
    about = pr_curve.parse_plugin_metadata(value.metadata.plugin_data.content)
    assert about.num_thresholds == 3
    curves = tensor_util.make_ndarray(value.tensor)
    assert curves.tolist() == [
        [8, 6, 0],  # true positives
        [12, 2, 0],  # false positives
        [0, 10, 12],  # true negatives
        [0, 2, 8],  # false negatives
        pytest.approx([0.4, 0.75, 0]),
        pytest.approx([1, 0.75, 0]),
    ]


def test_a_histogram_counts_everything() -> None:
    values = np.random.default_rng(0).normal(size=(30, 40)).astype(np.float32)
    found = summaries.histogram("weights/a", values).value[0].histo
    assert found.num == sum(found.bucket) == 1200
    assert (found.min, found.max) == (values.min(), values.max())
    for limit, count in zip(found.bucket_limit, np.cumsum(found.bucket), strict=True):
        assert abs((values <= limit).sum() - count) <= 1  # a value on the edge
    assert sum(summaries.histogram("constant", np.ones(5)).value[0].histo.bucket) == 5


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [np.inf]])
def test_what_has_no_histogram(values: list[float]) -> None:
    assert summaries.histogram("a", np.array(values)) is None


VALUES: dict[str, summaries.Value | None] = {
    "lr": 0.1,
    "name": "sgd",
    "flip": True,
    "crop": None,
    "n": 3,
}


def test_a_session() -> None:
    value = summaries.session_start(VALUES, "a run", 12.0).value[0]
    assert value.tag == hparams.SESSION_START_INFO_TAG
    found = hparams.parse_session_start_info_plugin_data(value.metadata.plugin_data.content)
    assert (found.group_name, found.start_time_secs) == ("a run", 12.0)
    assert found.hparams["lr"].number_value == 0.1
    assert found.hparams["name"].string_value == "sgd"
    assert found.hparams["flip"].bool_value
    assert found.hparams["n"].number_value == 3
    assert "crop" not in found.hparams
    end = summaries.session_end(13.0).value[0]
    assert end.tag == hparams.SESSION_END_INFO_TAG == summaries.SESSION_END
    content = hparams.parse_session_end_info_plugin_data(end.metadata.plugin_data.content)
    assert content.end_time_secs == 13.0


def test_an_experiment_shows_first_what_was_changed() -> None:
    value = summaries.experiment(VALUES, {"score/miou": "mIoU"}, {"lr"}).value[0]
    found = hparams.parse_experiment_plugin_data(value.metadata.plugin_data.content)
    assert {info.name: info.differs for info in found.hparam_infos} == dict.fromkeys(VALUES, False) | {
        "lr": True
    }
    assert [(info.name.tag, info.display_name) for info in found.metric_infos] == [
        ("score/miou", "mIoU")
    ]


def test_the_same_content_has_the_same_bytes() -> None:
    """Else whoever resumes would take it for another one."""
    turned = dict(reversed(VALUES.items()))
    one, other = (summaries.session_start(values, "a", 1.0) for values in (VALUES, turned))
    assert one.SerializeToString(deterministic=True) == other.SerializeToString(deterministic=True)
    assert Summary.FromString(one.SerializeToString()).value[0] == other.value[0]
