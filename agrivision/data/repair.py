"""Damaged shards of a data set, made again from its source, byte for byte.

The new files grow in `DATASET/.repair`, where an interrupted repair leaves what it has made and the
next one finds it. All of them are made and compared with what dataset.json knows before the first takes
its place; each file then does so by a rename, and no other file is touched.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from agrivision.data import recipe
from agrivision.data.finished import about
from agrivision.data.inspect import Finding, find_damage
from agrivision.data.pool import run_jobs
from agrivision.data.prepare import PrepareOptions, open_source, plan
from agrivision.data.schema import Schema, ShardInfo
from agrivision.data.shard_job import Job, ShardMaker
from agrivision.data.sources.source import Report, Silence, Source
from agrivision.data.workplace import Workplace
from agrivision.errors import Busy, DatasetError, SourceError, StorageError
from agrivision.locks import Patience
from agrivision.part import Stop, never
from agrivision.storage import storage_error, sync_folder

_Place = tuple[str, str]  # split and name of a shard


@dataclass(frozen=True, kw_only=True)
class RepairSummary:
    """What a repair did.

    Attributes:
        dataset: the data set.
        shards: those made again, `SPLIT/NAME`.
        damage: how many things were damaged.
        tiles: how many tiles could not be used.
    """

    dataset: Path
    shards: tuple[str, ...]
    damage: int
    tiles: int

    def lines(self) -> list[str]:
        """For people."""
        if not self.shards:
            return [f"{self.dataset}: every record is whole, nothing was changed"]
        return [
            f"{self.dataset}: {self.damage:,} damages, {self.tiles:,} tiles could not be used",
            f"made again, byte for byte: {', '.join(self.shards)}",
        ]


class _RepairPlace(Workplace):
    """Where shards of a data set grow that take the place of others."""

    @property
    def folder(self) -> Path:
        """See Workplace."""
        return self.out / ".repair"

    @contextmanager
    def held(self, stop: Stop = never) -> Iterator[None]:
        """Have the folder for this process alone.

        It is gone when the block ends well, or with an error that doing the same again cannot mend.

        Raises:
            Busy: another process repairs the data set.
            Interrupted: asked to stop while another process was at work on it.
            StorageError, NotWritable: the disk refused.
        """
        try:
            with self.lock() as lock:
                patience = Patience(f"another process repairs {self.out}", stop)
                while not lock.take(alone=True):
                    patience.wait()
                if not lock.in_place:
                    raise Busy(f"another process has just repaired {self.out}: run it again to see")
                yield
        except (SourceError, DatasetError):
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        shutil.rmtree(self.folder, ignore_errors=True)


def repair(
    source_path: Path,
    dataset: Path,
    options: PrepareOptions,
    report: Report | None = None,
    *,
    stop: Stop = never,
) -> RepairSummary:
    """Find the damaged shards of a data set, and make them again from its source.

    Args:
        source_path: what the data set was made from, as it was then.
        dataset: finished, with a whole dataset.json.
        options: how it was made; those that it holds itself take their place, but for `workers`.
        report: is told of the progress and of every damage.
        stop: whether to stop before the next shard.

    Returns:
        What was done.

    Raises:
        DatasetError: dataset.json is missing or damaged.
        SourceError: the source is not, or no longer, what the data set was made from; nothing was
            replaced.
        Busy: another process repairs it, and stays.
        Interrupted: asked to stop; run it again and it goes on.
        StorageError, NotWritable: the disk refused; run it again and it goes on.
    """
    report = report or Silence()
    schema = Schema.read(dataset)
    place = _RepairPlace(dataset.absolute())
    with place.held(stop):
        found = _look(dataset, schema, report, stop)
        damaged = list(dict.fromkeys((finding.split, finding.shard) for finding in found))
        if damaged:
            known = recipe.read_recipe(dataset)
            if known is not None:
                options = replace(PrepareOptions.from_dict(known[0]), workers=options.workers)
            source = open_source(source_path, options)
            task = _Task(
                source_path=source_path,
                source=source,
                options=options,
                schema=schema,
                place=place,
                versions=None if known is None else known[1],
            )
            jobs = task.jobs(damaged)
            report.total(_count(schema) + sum(len(job.references) for job in jobs))
            task.make(jobs, report, stop)
            _replace(place, damaged)
    return RepairSummary(
        dataset=dataset,
        shards=tuple(f"{split}/{name}" for split, name in damaged),
        damage=len(found),
        tiles=sum(finding.tiles for finding in found),
    )


def _look(dataset: Path, schema: Schema, report: Report, stop: Stop) -> list[Finding]:
    report.total(_count(schema))
    found = []
    for finding in find_damage(dataset, schema, report, stop=stop):
        report.problem(finding.path, finding.what)
        found.append(finding)
    return found


def _count(schema: Schema) -> int:
    """Tiles of a data set."""
    return sum(split.tiles for split in schema.splits.values())


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What is to be made again, and of what.

    Attributes:
        source_path: of the source.
        source: looked through.
        options: that the data set was made with.
        schema: its dataset.json.
        place: where shards grow.
        versions: of the programs that it was made with; None where it does not say.
    """

    source_path: Path
    source: Source
    options: PrepareOptions
    schema: Schema
    place: _RepairPlace
    versions: Mapping[str, str] | None

    def jobs(self, damaged: Sequence[_Place]) -> list[Job]:
        """How the damaged shards are made.

        Raises:
            SourceError: they cannot be made of this source.
        """
        if about(self.source) != about(self.schema):
            raise self._refusal(f"{self.source_path} holds something else than {self.place.out}")
        jobs = {(job.split, job.name): job for job in plan(self.source, self.options)}
        for split, name in damaged:
            if (split, name) not in jobs:
                raise self._refusal(f"{self.source_path} has no tiles for the shard {split}/{name}")
        return [jobs[each] for each in damaged]

    def make(self, jobs: Sequence[Job], report: Report, stop: Stop) -> None:
        """Make shards beside the data set, and see that they are the same bytes.

        Raises:
            SourceError: one is another one.
            StorageError: one cannot be read back.
        """
        names: dict[str, list[str]] = {}
        for job in jobs:
            names.setdefault(job.split, []).append(job.name)
        self.place.tidy(names)
        maker = ShardMaker(
            reader=self.source.reader,
            workplace=self.place,
            bands=tuple(self.source.bands),
            classes=len(self.source.classes),
            strict=False,
        )
        workers = self.options.workers or len(os.sched_getaffinity(0))
        with closing(run_jobs(maker, jobs, workers, stop)) as shards:
            for job, made in zip(jobs, shards, strict=True):
                if made.info != self._known(job):
                    raise self._refusal(
                        f"the shard {job.split}/{job.name}, made again from {self.source_path}, is not"
                        " the one that dataset.json knows"
                    )
                report.advance(len(job.references))
        for finding in find_damage(self.place.folder, self._only(names), stop=stop):
            raise StorageError(f"a shard that was just made cannot be read back: {finding}")

    def _known(self, job: Job) -> ShardInfo:
        shards = self.schema.splits[job.split].shards
        return next(info for info in shards if info.name == job.name)

    def _only(self, names: Mapping[str, Sequence[str]]) -> Schema:
        """The schema of some of the shards."""
        splits = {}
        for name, wanted in names.items():
            split = self.schema.splits[name]
            shards = tuple(info for info in split.shards if info.name in wanted)
            splits[name] = replace(split, shards=shards)
        return replace(self.schema, splits=splits)

    def _refusal(self, line: str) -> SourceError:
        """One line: what does not fit, why that may be, and that nothing has happened."""
        if self.versions is None:
            why = "the data set cannot say how it was made: give the options that it was made with"
        else:
            why = f"the source has changed since{self._other_programs()}"
        return SourceError(f"{line}: {why}; nothing was replaced")

    def _other_programs(self) -> str:
        here, then = recipe.made_with(self.schema.parts), self.versions or {}
        others = [
            f"{name} {then.get(name, 'none')} and not {version}"
            for name, version in here.items()
            if then.get(name) != version
        ]
        return f", or it is that {', '.join(others)} made the data set" if others else ""


def _replace(place: _RepairPlace, damaged: Sequence[_Place]) -> None:
    """Give the new files the names of the old ones."""
    for split, name in damaged:
        folder = place.out / split
        for new in place.shard(split, name):
            try:
                folder.mkdir(exist_ok=True)
                new.replace(folder / new.name)
                sync_folder(folder)
            except OSError as error:
                raise storage_error(folder / new.name, error) from error
