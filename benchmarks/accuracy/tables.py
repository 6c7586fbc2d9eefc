"""Tables in Markdown, of nothing but the lines of the results.

Seeds are paired: a difference is taken between two runs of the same seed, and its standard error is
that of the mean of those differences. With three seeds that is a hint, no proof; so the tables also
count the seeds that agree.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.accuracy.bench import PLAIN_RECIPE, RECOMMENDED
from benchmarks.accuracy.contestants import OURS, PEERS
from benchmarks.accuracy.results import Row
from benchmarks.common import table

Runs = Mapping[int, Row]  # by seed
_SYMMETRIC = "+ all eight positions of a tile, averaged (prediction alone)"


@dataclass(frozen=True)
class Paired:
    """Differences between two contestants by seed.

    Attributes:
        values: in points of mIoU (0 to 100), of the seeds that both have.
    """

    values: tuple[float, ...]

    @classmethod
    def of(cls, runs: Runs, base: Runs) -> Paired:
        """By how much `runs` are better than `base`."""
        seeds = sorted(runs.keys() & base.keys())
        return cls(tuple(100 * (runs[seed]["miou"] - base[seed]["miou"]) for seed in seeds))

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None with one seed."""
        if len(self.values) < 2:
            return None
        return statistics.stdev(self.values) / math.sqrt(len(self.values))

    def __str__(self) -> str:
        return f"{self.mean:+.1f}" + ("" if self.error is None else f" ± {self.error:.1f}")

    @property
    def better(self) -> str:
        """How many of the seeds are better."""
        return f"{sum(value > 0 for value in self.values)} of {len(self.values)}"


def tables(rows: Sequence[Row]) -> str:
    """All tables that there are lines for.

    Args:
        rows: of the results, the oldest first: of a contestant, a recipe and a change those count that
            have the settings of the last one.
    """
    parts = []
    for group in _by(rows, lambda row: json.dumps([row["task"], row["data"], row["budget"]])).values():
        parts += [f"### {_heading(group[0])}", *_peers(group), *_ingredients(group)]
    return "\n\n".join(parts) + "\n" if parts else "no results yet\n"


def _heading(row: Row) -> str:
    budget = row["budget"]
    limit = f"{budget['steps']:,} steps" if budget["seconds"] is None else f"{budget['seconds']:.0f} s"
    crops = f"{budget['batch']} crops of {budget['crop']} x {budget['crop']}"
    return f"{row['task']}: {limit} of {crops}, UNet of {budget['base_channels']} channels"


def _by(rows: Sequence[Row], name: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(name(row), []).append(row)
    return groups


def _runs(rows: Sequence[Row], contestant: str, recipe: str = "", change: str = "") -> Runs:
    """The runs of one, by seed."""
    wanted = (contestant, recipe, change)
    mine = [row for row in rows if (row["contestant"], row["recipe"], row["change"]) == wanted]
    return {row["seed"]: row for row in mine if row["settings"] == mine[-1]["settings"]}


def _peers(rows: Sequence[Row]) -> Iterator[str]:
    """Everybody beside our recommended recipe, the best first; then their classes."""
    ours = _runs(rows, OURS, RECOMMENDED)
    entries = {"**agrivision, recommended recipe**": ours}
    entries["agrivision, plain recipe"] = _runs(rows, OURS, PLAIN_RECIPE)
    entries |= {peer.title: _runs(rows, name) for name, peer in PEERS.items()}
    ranked = sorted(
        ((title, runs) for title, runs in entries.items() if runs), key=lambda entry: -_mean(entry[1])
    )
    if not ranked:
        return
    header = ["contestant", "mIoU, %", "lowest, highest", "worst class, %", "ours is ahead by, points"]
    header += ["parameters, M", "GFLOP a crop", "steps", "seconds"]
    yield table(header, [_entry(title, runs, ours) for title, runs in ranked])
    classes = list(next(iter(ranked[0][1].values()))["iou"])
    cells = [
        [title, *(f"{100 * _class_mean(runs, name):.1f}" for name in classes)] for title, runs in ranked
    ]
    yield table(["IoU, %", *classes], cells)


def _entry(title: str, runs: Runs, ours: Runs) -> list[object]:
    first = next(iter(runs.values()))
    ahead = "" if runs is ours or not ours.keys() & runs.keys() else str(Paired.of(ours, runs))
    worst = min(_class_mean(runs, name) for name in first["iou"])
    return [
        title,
        _spread(runs),
        _range(runs),
        f"{100 * worst:.1f}",
        ahead,
        f"{first['parameters'] / 1e6:.2f}",
        f"{first['gflops']:.2f}",
        f"{statistics.fmean(row['steps'] for row in runs.values()):,.0f}",
        f"{statistics.fmean(row['seconds'] for row in runs.values()):,.0f}",
    ]


def _ingredients(rows: Sequence[Row]) -> Iterator[str]:
    """Each recipe and what changes in it, the most useful first."""
    words = {PLAIN_RECIPE: "plain recipe", RECOMMENDED: "recommended recipe"}
    for recipe, title in words.items():
        base = _runs(rows, OURS, recipe)
        ours = [row for row in rows if row["recipe"] == recipe and row["change"]]
        changes = {name: _runs(rows, OURS, recipe, name) for name in _by(ours, lambda r: r["change"])}
        # What was changed in a recipe that has changed since is of no use.
        base_settings = next(iter(base.values()))["settings"] if base else None
        current = {
            name: runs
            for name, runs in changes.items()
            if runs.keys() & base.keys() and next(iter(runs.values()))["base"] == base_settings
        }
        symmetric = {seed: row | row["symmetric"] for seed, row in base.items() if row["symmetric"]}
        if symmetric:
            current[_SYMMETRIC] = symmetric
        if not current:
            continue
        paired = {name: Paired.of(runs, base) for name, runs in current.items()}
        cells = [[f"**{title}**", _spread(base), _range(base), "", "", _seconds(base)]]
        for name in sorted(current, key=lambda name: -paired[name].mean):
            runs, by = current[name], paired[name]
            cells.append([name, _spread(runs), _range(runs), str(by), by.better, _seconds(runs)])
        header = [
            "change",
            "mIoU, %",
            "lowest, highest",
            "difference, points",
            "seeds better",
            "seconds",
        ]
        yield table(header, cells)


def _mean(runs: Runs) -> float:
    return statistics.fmean(row["miou"] for row in runs.values())


def _class_mean(runs: Runs, name: str) -> float:
    """Mean IoU of a class; a class that a run has nothing of counts as 0."""
    return statistics.fmean(row["iou"][name] or 0.0 for row in runs.values())


def _spread(runs: Runs) -> str:
    values = [100 * row["miou"] for row in runs.values()]
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def _range(runs: Runs) -> str:
    values = [100 * row["miou"] for row in runs.values()]
    return f"{min(values):.1f}, {max(values):.1f}"


def _seconds(runs: Runs) -> str:
    return f"{statistics.fmean(row['seconds'] for row in runs.values()):,.0f}"
