"""What metrics.jsonl says of a run, whatever version wrote it and however its last row ends.

Only numbers are kept of the rows on training, and of the evaluations what is large only for the best
and the last, so that a run of a million rows fits.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agrivision.errors import BadInput, one_line
from agrivision.json_values import entries, items, label, number, parse, share, text, whole
from agrivision.reading import open_plain
from agrivision.rundir import best_step

Numbers = NDArray[np.float64]
Shares = dict[str, float | None]  # by class name, 0 to 1; None where the class is absent

# Of a row on training; the GPUs' are added up or averaged over them.
_COLUMNS = (
    "step",
    "time",
    "total",
    "cross_entropy",
    "dice",
    "lovasz",
    "pnc",
    "gradient_norm",
    "learning_rate",
    "images_per_second",
    "megapixels_per_second",
    "waiting_share",
    "memory_gib",
    "utilisation",
    "power_watts",
    "energy_joules",
)
_OF_GPUS = ("utilisation", "power_watts", "energy_joules")  # in the row's `gpu`, of all together
_MOST_LINE = 16 << 20  # bytes; a longer one is no row
_MOST_CLASSES = 16


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A tile that an evaluation names.

    Attributes:
        key: of the tile.
        iou: of the class that it is named for, 0 to 1.
    """

    key: str
    iou: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A row of an evaluation; what older versions did not write is empty.

    Attributes:
        step: that was scored.
        epoch: of it; None where it is not known.
        time: seconds since 1970; None where it is not known.
        seconds: that it took; likewise.
        left_out: tiles that could not be read.
        miou: 0 to 1; None where no class is there.
        iou: by class.
        precision: likewise.
        recall: likewise.
        f1: likewise.
        loss: in its parts.
        confusion: in pixels, rows predicted, columns true; only of the best and the last.
        best: the tiles in which a class was found best, by class; only of the best and the last.
        worst: likewise.
    """

    step: int
    epoch: int | None
    time: float | None
    seconds: float | None
    left_out: int
    miou: float | None
    iou: Shares
    precision: Shares
    recall: Shares
    f1: Shares
    loss: dict[str, float]
    confusion: tuple[tuple[int, ...], ...] = ()
    best: dict[str, tuple[Tile, ...]] = field(default_factory=dict)
    worst: dict[str, tuple[Tile, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The rows of a run.

    Attributes:
        training: a column by name, as long as one another, by step; NaN where a row lacks it.
        evaluations: by step, the last row of a step counts.
        saving: seconds that each checkpoint took.
        ends: why the run ended before its last step, by the step where it did.
        unread: lines that are no rows; a torn last one is none of them.
        last_time: of any row, seconds since 1970; None where no row has one.
    """

    training: dict[str, Numbers]
    evaluations: tuple[Evaluation, ...]
    saving: tuple[float, ...]
    ends: dict[int, str]
    unread: int
    last_time: float | None

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the highest mIoU, the earliest of equals."""
        step = best_step({one.step: one.miou for one in self.evaluations})
        return next((one for one in self.evaluations if one.step == step), None)

    @property
    def last(self) -> Evaluation | None:
        """The latest evaluation."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def last_step(self) -> int:
        """The last step that a row tells of; 0 without rows."""
        steps = self.training["step"]
        return max(int(steps[-1]) if len(steps) else 0, self.last.step if self.last else 0)

    @property
    def last_epoch(self) -> int | None:
        """Whole epochs at the last evaluation that knows them."""
        known = [one.epoch for one in self.evaluations if one.epoch is not None]
        return known[-1] if known else None

    @property
    def early_end(self) -> str | None:
        """Why the run ended before its last step; None where it did not, or has gone on since."""
        return self.ends.get(self.last_step)

    def evaluation(self, step: int) -> Evaluation | None:
        """The evaluation of a step; None where there was none."""
        return next((one for one in self.evaluations if one.step == step), None)

    def has(self, name: str) -> bool:
        """Whether any row on training has a number of this name."""
        return bool(np.isfinite(self.training[name]).any())

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their ids; empty without an evaluation."""
        return tuple(self.last.iou) if self.last else ()


def read_metrics(path: Path) -> Metrics:
    """Read metrics.jsonl, which may still be written.

    Raises:
        BadInput: there is none, it cannot be read, or it has no row of a run.
    """
    columns = {name: array("d") for name in _COLUMNS}
    evaluations: dict[int, Evaluation] = {}
    saving, unread, latest = array("d"), 0, float("nan")
    ends: dict[int, str] = {}
    kept: set[int] = set()
    try:
        for row in _rows(path):
            try:
                content = entries(row)
                latest = np.fmax(latest, _optional(content, "time"))
                kind = content["kind"]
                if kind == "training":
                    _add(columns, content)
                elif kind == "evaluation":
                    one = _evaluation(content)
                    evaluations.pop(one.step, None)
                    evaluations[one.step] = one
                    kept = _keep(evaluations, {*kept, one.step})
                elif kind == "checkpoint":
                    saving.append(number(content["seconds"]))
                elif kind == "end":
                    ends[whole(content["step"])] = one_line(text(content["reason"]))
            except (ValueError, KeyError):
                unread += 1
    except FileNotFoundError:
        why = "it has no metrics yet, so wait for its first steps" if path.parent.is_dir() else ""
        raise BadInput(
            f"{path.parent} cannot be reported on: {why or 'there is no such run directory'}"
        ) from None
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    if not columns["step"] and not evaluations:
        noun = "only damaged rows" if unread else "no rows yet, so wait for its first steps"
        raise BadInput(f"{path.parent} cannot be reported on: {path.name} has {noun}")
    order = np.argsort(np.array(columns["step"]), kind="stable")
    return Metrics(
        training={name: np.array(values)[order] for name, values in columns.items()},
        evaluations=tuple(evaluations[step] for step in sorted(evaluations)),
        saving=tuple(saving),
        ends=ends,
        unread=unread,
        last_time=None if np.isnan(latest) else float(latest),
    )


def _rows(path: Path) -> Iterator[Any]:
    """What each line holds; None for one that is no JSON. A torn last line is passed over."""
    with open_plain(path) as file:
        while line := file.readline(_MOST_LINE):
            whole_line = line.endswith(b"\n")
            while not line.endswith(b"\n"):
                line = file.readline(_MOST_LINE)
                if not line:
                    return
            try:
                yield parse(line) if whole_line else None
            except ValueError:
                yield None


def _add(columns: Mapping[str, array[float]], row: Mapping[str, Any]) -> None:
    values = {name: _optional(row, name) for name in _COLUMNS if name not in _OF_GPUS}
    values["step"] = whole(row["step"])
    gpu = entries(_or(row.get("gpu"), {}))
    values |= {name: _optional(gpu, name) for name in _OF_GPUS}
    for name, value in values.items():
        columns[name].append(value)


def _or(value: Any, other: Any) -> Any:
    """A value, or another where there is none."""
    return other if value is None else value


def _optional(row: Mapping[str, Any], name: str) -> float:
    """A number of a row; NaN where it is not there or null."""
    value = row.get(name)
    return float("nan") if value is None else number(value)


def _evaluation(row: Mapping[str, Any]) -> Evaluation:
    iou = _shares(row["iou"])
    if not 1 <= len(iou) <= _MOST_CLASSES:
        raise ValueError("it has no classes, or too many")
    time, seconds = _optional(row, "time"), _optional(row, "seconds")
    return Evaluation(
        step=whole(row["step"]),
        epoch=whole(row["epoch"]) if row.get("epoch") is not None else None,
        time=None if np.isnan(time) else time,
        seconds=None if np.isnan(seconds) else seconds,
        left_out=whole(row.get("left_out", 0)),
        miou=None if row["miou"] is None else share(row["miou"]),
        iou=iou,
        precision=_shares(_or(row.get("precision"), {})),
        recall=_shares(_or(row.get("recall"), {})),
        f1=_shares(_or(row.get("f1"), {})),
        loss={
            label(name): number(value)
            for name, value in entries(_or(row.get("loss"), {})).items()
            if value is not None
        },
        confusion=_confusion(_or(row.get("confusion"), []), len(iou)),
        best=_tiles(_or(row.get("best"), {})),
        worst=_tiles(_or(row.get("worst"), {})),
    )


def _shares(value: Any) -> Shares:
    return {label(name): None if part is None else share(part) for name, part in entries(value).items()}


def _confusion(value: Any, classes: int) -> tuple[tuple[int, ...], ...]:
    matrix = tuple(tuple(map(whole, items(row))) for row in items(value))
    if matrix and {len(matrix), *map(len, matrix)} != {classes}:
        raise ValueError("the confusion matrix is of other classes")
    return matrix


def _tiles(value: Any) -> dict[str, tuple[Tile, ...]]:
    found: dict[str, tuple[Tile, ...]] = {}
    for name, pairs in entries(value).items():
        tiles = []
        for pair in items(pairs):
            key, iou = items(pair)
            tiles.append(Tile(key=label(key), iou=share(iou)))
        found[label(name)] = tuple(tiles)
    return found


def _keep(evaluations: dict[int, Evaluation], whole_ones: set[int]) -> set[int]:
    """Forget what is large of evaluations that are neither the best nor the last; the steps kept."""
    best = best_step({step: evaluations[step].miou for step in whole_ones})
    keep = {step for step in (best, max(whole_ones)) if step is not None}
    for step in whole_ones - keep:
        small = vars(evaluations[step]) | {"confusion": (), "best": {}, "worst": {}}
        evaluations[step] = Evaluation(**small)
    return keep
