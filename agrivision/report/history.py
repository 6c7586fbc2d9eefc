"""What a run directory tells, gathered: metrics, attempts, configuration, data set."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from agrivision.config import flatten
from agrivision.data.schema import Schema
from agrivision.errors import DatasetError, one_line
from agrivision.reading import read_plain
from agrivision.report.attempts import FINISHED, UNKNOWN, Attempt, read_attempts
from agrivision.report.rows import Metrics, Numbers, read_metrics
from agrivision.rundir import RunDirectory

_MOST_CONFIG = 1 << 20  # bytes
_DEEPEST = 20


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data set of a run, where it still is.

    Attributes:
        folder: of it.
        schema: its dataset.json.
    """

    folder: Path
    schema: Schema


@dataclass(frozen=True, kw_only=True)
class History:
    """What is known of a run.

    Attributes:
        name: how the page calls it.
        run: its directory.
        metrics: what it measured.
        attempts: oldest first.
        config: as its YAML has it; empty where that cannot be read.
        data: its data set, or a sentence that says why it is not there.
    """

    name: str
    run: RunDirectory
    metrics: Metrics
    attempts: tuple[Attempt, ...]
    config: dict[str, Any]
    data: Data | str

    @cached_property
    def values(self) -> dict[str, Any]:
        """The configuration by dotted key."""
        return flatten(self.config)

    @property
    def state(self) -> str:
        """Finished, running or interrupted; not known without a word on its attempts."""
        return self.attempts[-1].state if self.attempts else UNKNOWN

    @property
    def finished(self) -> bool:
        """Whether it has done all of its steps."""
        return self.state == FINISHED

    @property
    def resumed_at(self) -> tuple[int, ...]:
        """The steps that the attempts after the first went on from."""
        return tuple(attempt.from_step for attempt in self.attempts[1:])

    @property
    def batch_size(self) -> int | None:
        """Images in a step."""
        size = self.values.get("data.batch_size")
        return size if type(size) is int and size > 0 else None

    @cached_property
    def seconds(self) -> float | None:
        """That all attempts together took; None where an end is not known."""
        known = [attempt.seconds for attempt in self.attempts]
        return sum(s for s in known if s is not None) if known and None not in known else None

    @cached_property
    def rank_seconds(self) -> float | None:
        """The same, each attempt times its ranks."""
        if self.seconds is None or not all(attempt.ranks for attempt in self.attempts):
            return None
        return sum((attempt.seconds or 0.0) * attempt.ranks for attempt in self.attempts)

    @cached_property
    def images_per_second(self) -> float | None:
        """Over all rows, with what evaluations and checkpoints took."""
        return self.over_time("images_per_second")

    def over_time(self, name: str) -> float | None:
        """The mean of a column over time, each row with the seconds that its steps took."""
        training = self.metrics.training
        rates, values = training["images_per_second"], training[name]
        steps = np.diff(training["step"], prepend=0.0)
        good = np.isfinite(rates) & np.isfinite(values) & (rates > 0) & (steps > 0)
        if not good.any():
            return None
        seconds = steps[good] / rates[good]
        return float((values[good] * seconds).sum() / seconds.sum())

    @cached_property
    def hours(self) -> Numbers:
        """Of the rows on training, since the beginning of the first attempt; empty without times."""
        times = self.metrics.training["time"]
        if not len(times) or not np.isfinite(times).all():
            return np.empty(0)
        return (times - self.began) / 3600

    @property
    def began(self) -> float:
        """Seconds since 1970; the first row's where no attempt is known."""
        times = self.metrics.training["time"]
        first = float(times[0]) if len(times) and np.isfinite(times[0]) else 0.0
        known = self.attempts[0].started if self.attempts else None
        return first if known is None else min(known, first or known)


def read_history(path: Path, now: float, data: Path | None = None) -> History:
    """Read a run directory, without writing anything into it.

    Args:
        path: of the run.
        now: seconds since 1970.
        data: where its data set is now; None looks where the configuration says.

    Raises:
        BadInput: there is no run, or it has no rows.
    """
    run = RunDirectory(path)
    metrics = read_metrics(run.metrics)
    config = _read_config(run.config)
    attempts = read_attempts(run, metrics.last_step, metrics.last_time, now)
    return History(
        name=one_line(path.resolve().name or str(path)),
        run=run,
        metrics=metrics,
        attempts=attempts,
        config=config,
        data=_find_data(run, config, attempts, data),
    )


def _read_config(path: Path) -> dict[str, Any]:
    """What config.yaml holds; nothing where it is none of ours."""
    try:
        content = read_plain(path, _MOST_CONFIG)
        depth = 0
        for event in yaml.parse(content, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            # With aliases a few lines can stand for billions.
            if depth > _DEEPEST or isinstance(event, yaml.AliasEvent):
                return {}
        config = yaml.safe_load(content)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return _texts(config) if isinstance(config, dict) else {}


def _texts(tree: dict[Any, Any]) -> dict[str, Any]:
    """The same with keys that are text."""
    return {
        str(key): _texts(value) if isinstance(value, dict) else value for key, value in tree.items()
    }


def _find_data(
    run: RunDirectory, config: dict[str, Any], attempts: tuple[Attempt, ...], given: Path | None
) -> Data | str:
    """The data set that a run was trained on, told by its fingerprint."""
    fingerprint = next((a.about["Data set"] for a in attempts[::-1] if "Data set" in a.about), None)
    section = config.get("data")
    named = section.get("path") if isinstance(section, dict) else None
    places = [] if given is None else [given]
    if isinstance(named, str) and named and "\0" not in named:
        places.append(Path(named))
        if not places[-1].is_absolute():  # to the folder where the training was started
            places += [parent / named for parent in run.path.resolve().parents]
    others = []
    for place in places:
        try:
            schema = Schema.read(place)
        except DatasetError:
            continue
        if fingerprint in (None, schema.fingerprint):
            return Data(folder=place, schema=schema)
        others.append(place)
    if others:
        where = one_line(str(others[0]))
        return f"The data set at {where} is another one than this run's: its fingerprint differs."
    if not places:
        return "The configuration does not say where the data set is; --data says it."
    return f"The data set is not at {one_line(str(places[0]))} any more; --data says where it is."
