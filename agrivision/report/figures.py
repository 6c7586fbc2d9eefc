"""The charts of one run, and of several over one another."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

import numpy as np

from agrivision.charts import SERIES, Chart, Color, Line, heat_map, line_chart
from agrivision.monitor.pictures import PALETTE
from agrivision.report.history import History
from agrivision.report.rows import Evaluation, Numbers

_STEP = "Step"
_MINUTES_UP_TO = 3.0  # hours
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9_-]+")
_PARTS = {
    "total": "total",
    "cross_entropy": "cross-entropy",
    "dice": "Dice",
    "lovasz": "Lovász",
    "pnc": "balance",
}
_SINGLES = {
    "learning_rate": ("Learning rate", "learning_rate"),
    "gradient_norm": ("Gradient norm", "gradient_norm"),
}
_SPEEDS = {
    "images_per_second": ("Images per second", None),
    "waiting_share": ("Share of time waiting for data", 1.0),
    "utilisation": ("Utilisation of the GPUs", 1.0),
    "power_watts": ("Power of the GPUs, W", None),
}


def curves(history: History) -> list[Chart]:
    """How a run has learned."""
    charts = [_loss(history), _scores(history)]
    charts += [_single(history, name, title) for name, (title, _) in _SINGLES.items()]
    return [chart for chart in charts if chart is not None]


def speed(history: History) -> list[Chart]:
    """How fast a run was, over the hours where its rows know the time, else over its steps."""
    charts = [_speed(history, name, title, top) for name, (title, top) in _SPEEDS.items()]
    return [chart for chart in charts if chart is not None]


def confusion(evaluation: Evaluation) -> Chart:
    """Which class is taken for which, as shares of the true one's pixels."""
    names = tuple(evaluation.iou)
    shares = column_shares(evaluation.confusion)
    right = ", ".join(
        f"{name} {100 * shares[i, i]:.0f} %" for i, name in enumerate(names) if shares[i, i] >= 0
    )
    return heat_map(
        "confusion",
        f"Confusion matrix at step {evaluation.step}. Of each class's pixels are found: {right}.",
        shares,
        names,
        names,
        row_title="Predicted",
        column_title="True (a column is 100 %)",
    )


def column_shares(matrix: Sequence[Sequence[int]]) -> Numbers:
    """Each column of a matrix of counts divided by its sum; NaN where that is 0."""
    counts = np.array(matrix, np.float64)
    sums = counts.sum(0)
    shares: Numbers = np.divide(counts, sums, out=np.full_like(counts, np.nan), where=sums > 0)
    return shares


def compared(histories: Sequence[History], names: Sequence[str]) -> list[Chart]:
    """The curves of several runs over one another, each run in a colour."""
    charts = [
        _overlaid(histories, names, "total", "Training loss"),
        _overlaid_scores(histories, names, None),
        _overlaid(histories, names, "learning_rate", "Learning rate"),
        _overlaid(histories, names, "images_per_second", "Images per second"),
    ]
    classes = dict.fromkeys(name for history in histories for name in history.metrics.classes)
    charts += [_overlaid_scores(histories, names, name) for name in classes]
    return [chart for chart in charts if chart is not None]


def run_color(number: int) -> Color:
    """The colour of a run among several."""
    return SERIES[number % len(SERIES)]


def class_colors(classes: Iterable[str]) -> tuple[Color, ...]:
    """Of the classes in the order of their ids: those of maps and tiles."""
    return tuple(color for _, color in zip(classes, PALETTE, strict=False))


def plain(name: str) -> str:
    """A name as a part of a file's name."""
    return _NOT_PLAIN.sub("-", name)[:60]


def file_names(names: Sequence[str]) -> dict[str, str]:
    """Each name as a part of a file's name, with a number where another is alike."""
    found: dict[str, str] = {}
    for name in names:
        base, number = plain(name), 1
        while (made := base if number == 1 else f"{base}-{number}") in found.values():
            number += 1
        found[name] = made
    return found


def _loss(history: History) -> Chart | None:
    rows, evaluations = history.metrics.training, history.metrics.evaluations
    lines = []
    for (name, title), color in zip(_PARTS.items(), (None, *SERIES), strict=False):
        training, validation = _line(rows["step"], rows[name]), _of_evaluations(evaluations, name)
        alone = name != "total" and (
            _same(rows[name], rows["total"]) or not np.nan_to_num(rows[name]).any()
        )
        if alone:  # the only part, or one that is not there
            continue
        strong = name == "total"
        lines += [Line(name=title, color=color, strong=strong, x=training[0], y=training[1])]
        if len(validation[0]):
            words = f"{title}, val."
            lines += [Line(name=words, color=color, dashed=True, x=validation[0], y=validation[1])]
    words = _told("Loss", rows["total"], rows["step"])
    return _chart(history, "loss", words, lines, "Loss", low=0.0)


def _scores(history: History) -> Chart | None:
    evaluations = history.metrics.evaluations
    steps = np.array([one.step for one in evaluations], np.float64)
    classes = history.metrics.classes
    lines = [
        Line(name=name, x=steps, y=_by_class(evaluations, name), color=color, dots=True)
        for name, color in zip(classes, class_colors(classes), strict=False)
    ]
    mean = np.array([np.nan if one.miou is None else one.miou for one in evaluations])
    lines.append(Line(name="mIoU", x=steps, y=mean, color=None, strong=True, dots=True))
    words = _told("mIoU and IoU by class. mIoU", mean, steps)
    return _chart(history, "iou", words, lines, "IoU", low=0.0, high=1.0)


def _single(history: History, name: str, title: str) -> Chart | None:
    rows = history.metrics.training
    line = Line(name="", x=rows["step"], y=rows[name], color=SERIES[0])
    return _chart(history, name, _told(title, rows[name], rows["step"]), [line], title, low=0.0)


def _speed(history: History, name: str, title: str, top: float | None) -> Chart | None:
    rows, hours = history.metrics.training, history.hours
    if not history.metrics.has(name):
        return None
    words = _told(title, rows[name], rows["step"])
    if not len(hours):
        line = Line(name="", x=rows["step"], y=rows[name], color=SERIES[0])
        return _chart(history, name, words, [line], title, low=0.0, high=top)
    short = hours[-1] < _MINUTES_UP_TO
    unit, factor = ("Minutes", 60) if short else ("Hours", 1)
    gaps = [(factor * start, factor * end) for start, end in pauses(history)]
    places = np.searchsorted(rows["step"], history.resumed_at, side="right")
    lines = apart(Line(name="", x=factor * hours, y=rows[name], color=SERIES[0]), places.tolist())
    words_below = f"{unit} since the beginning"
    return line_chart(name, words, lines, x=words_below, y=title, gaps=gaps, low=0.0, high=top)


def apart(line: Line, places: Sequence[int]) -> list[Line]:
    """A line in pieces, each of which begins at one of these points: nothing is drawn between two."""
    pieces = zip(np.split(line.x, places), np.split(line.y, places), strict=True)
    return [dataclasses.replace(line, x=x, y=y) for x, y in pieces]


def pauses(history: History) -> list[tuple[float, float]]:
    """Between two attempts, in hours since the beginning of the first; without those not known."""
    found = []
    for before, after in zip(history.attempts, history.attempts[1:], strict=False):
        if before.ended is not None and after.started is not None and after.started > before.ended:
            start, end = before.ended - history.began, after.started - history.began
            found.append((start / 3600, end / 3600))
    return found


def _overlaid(
    histories: Sequence[History], names: Sequence[str], column: str, title: str
) -> Chart | None:
    lines = [
        Line(
            name=name,
            x=history.metrics.training["step"],
            y=history.metrics.training[column],
            color=run_color(number),
            dashed=number >= len(SERIES),
        )
        for number, (name, history) in enumerate(zip(names, histories, strict=True))
    ]
    return _several(f"compared-{column}", f"{title} of {_and(names)} by step.", lines, title, None)


def _overlaid_scores(
    histories: Sequence[History], names: Sequence[str], class_name: str | None
) -> Chart | None:
    """The mIoU of each run, or the IoU of a class."""
    lines = []
    for number, (name, history) in enumerate(zip(names, histories, strict=True)):
        evaluations = history.metrics.evaluations
        mean = np.array([np.nan if one.miou is None else one.miou for one in evaluations])
        lines.append(
            Line(
                name=name,
                x=np.array([one.step for one in evaluations], np.float64),
                y=mean if class_name is None else _by_class(evaluations, class_name),
                color=run_color(number),
                dashed=number >= len(SERIES),
                dots=True,
            )
        )
    title = "mIoU" if class_name is None else f"IoU of {class_name}"
    file = "compared-miou" if class_name is None else f"compared-iou-{plain(class_name)}"
    return _several(file, f"{title} of {_and(names)} by step.", lines, title, 1.0)


def _several(
    name: str, words: str, lines: Sequence[Line], title: str, high: float | None
) -> Chart | None:
    if not any(np.isfinite(line.y).any() for line in lines):
        return None
    return line_chart(name, words, lines, x=_STEP, y=title, low=0.0, high=high)


def _chart(
    history: History,
    name: str,
    words: str,
    lines: Sequence[Line],
    title: str,
    *,
    low: float,
    high: float | None = None,
) -> Chart | None:
    if not any(np.isfinite(line.y).any() for line in lines):
        return None
    return line_chart(
        name, words, lines, x=_STEP, y=title, marks=history.resumed_at, low=low, high=high
    )


def _line(x: Numbers, y: Numbers) -> tuple[Numbers, Numbers]:
    good = np.isfinite(y)
    return x[good], y[good]


def _of_evaluations(evaluations: Sequence[Evaluation], part: str) -> tuple[Numbers, Numbers]:
    known = [one for one in evaluations if part in one.loss]
    return (
        np.array([one.step for one in known], np.float64),
        np.array([one.loss[part] for one in known], np.float64),
    )


def _by_class(evaluations: Sequence[Evaluation], name: str) -> Numbers:
    values = [one.iou.get(name) for one in evaluations]
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _same(one: Numbers, other: Numbers) -> bool:
    return bool(np.array_equal(one, other, equal_nan=True))


def _told(title: str, values: Numbers, steps: Numbers) -> str:
    """A curve in words: where it begins and ends."""
    good = np.flatnonzero(np.isfinite(values))
    if not len(good):
        return f"{title}."
    first, last = good[0], good[-1]
    return (
        f"{title}: {values[first]:.3g} at step {int(steps[first])},"
        f" {values[last]:.3g} at step {int(steps[last])}."
    )


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
