"""What TensorBoard's plugins read, made by its own functions and torch's.

Of TensorBoard's, those that do not need TensorFlow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams import summary_v2 as hparams
from torch.utils.tensorboard import summary as make

SESSION_END = hparams_metadata.SESSION_END_INFO_TAG
_BINS = 64  # of a histogram

Chart = Sequence[str]  # regular expressions that tags begin with
Value = bool | float | str


def text(tag: str, content: str) -> Any:
    """A text in Markdown."""
    return make.text(tag, content)  # type: ignore[no-untyped-call]


def layout(categories: Mapping[str, Mapping[str, Chart]]) -> Any:
    """Which curves stand together in one chart.

    Args:
        categories: by title the charts, by title the tags in each.
    """
    charts = {
        category: {title: ["Multiline", list(tags)] for title, tags in charts.items()}
        for category, charts in categories.items()
    }
    return make.custom_scalars(charts)  # type: ignore[no-untyped-call]


def precision_recall(tag: str, hits: NDArray[np.int64], called: NDArray[np.int64], true: int) -> Any:
    """A curve of precision over recall.

    Args:
        tag: of the curve.
        hits: (thresholds,), true positives at thresholds from 0 to 1, evenly spaced.
        called: likewise, all positives.
        true: pixels that have the class.
    """
    false = called - hits
    counts = (hits, false, false[0] - false, true - hits)
    precision = hits / np.maximum(called, 1)
    recall = hits / max(true, 1)
    return make.pr_curve_raw(  # type: ignore[no-untyped-call]
        tag, *counts, precision, recall, num_thresholds=len(hits)
    )


def histogram(tag: str, values: NDArray[Any]) -> Any | None:
    """A histogram of any array; None where something in it is not finite, or there is nothing."""
    values = values.astype(np.float64).ravel()
    if not values.size or not np.isfinite(values).all():
        return None
    counts, limits = np.histogram(values, bins=_BINS)
    return make.histogram_raw(  # type: ignore[no-untyped-call]
        tag,
        min=values.min(),
        max=values.max(),
        num=values.size,
        sum=values.sum(),
        sum_squares=np.square(values).sum(),
        bucket_limits=limits[1:].tolist(),
        bucket_counts=counts.tolist(),
    )


def experiment(values: Mapping[str, Value | None], metrics: Mapping[str, str], shown: set[str]) -> Any:
    """Which hyper-parameters and scores runs are compared by.

    Args:
        values: of this run; the types matter, and the names.
        metrics: names to show by tag.
        shown: the hyper-parameters that come first.
    """
    summary = hparams.hparams_config_pb(
        [hparams.HParam(name) for name in values],
        [hparams.Metric(tag, display_name=name) for tag, name in metrics.items()],
        time_created_secs=0,
    )
    data = _content(summary)
    for info in data.experiment.hparam_infos:
        info.differs = info.name in shown
        info.type = _TYPES.get(type(values[info.name]), api_pb2.DATA_TYPE_UNSET)
    return _with_content(summary, data)


_TYPES = {
    bool: api_pb2.DATA_TYPE_BOOL,
    int: api_pb2.DATA_TYPE_FLOAT64,
    float: api_pb2.DATA_TYPE_FLOAT64,
    str: api_pb2.DATA_TYPE_STRING,
}


def session_start(values: Mapping[str, Value | None], run: str, seconds: float) -> Any:
    """The hyper-parameters of a run.

    Args:
        values: by name; None is left out.
        run: what names the run among others.
        seconds: since 1970, when it began.
    """
    known = {name: value for name, value in values.items() if value is not None}
    summary = hparams.hparams_pb(known, trial_id=run, start_time_secs=seconds)
    return _with_content(summary, _content(summary))


def session_end(seconds: float) -> Any:
    """A run has come to its end.

    Args:
        seconds: since 1970.
    """
    info = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=seconds)
    data = plugin_data_pb2.HParamsPluginData(session_end_info=info)
    about = hparams_metadata.create_summary_metadata(data)
    value = Summary.Value(tag=SESSION_END, metadata=about, tensor=hparams_metadata.NULL_TENSOR)
    return Summary(value=[value])


def _content(summary: Any) -> Any:
    content = summary.value[0].metadata.plugin_data.content
    return plugin_data_pb2.HParamsPluginData.FromString(content)


def _with_content(summary: Any, data: Any) -> Any:
    """The same summary around other data, with the same bytes for the same data."""
    summary.value[0].metadata.plugin_data.content = data.SerializeToString(deterministic=True)
    return summary
