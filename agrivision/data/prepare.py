"""A source → a data set, in parallel; interrupted anywhere, it goes on where it was.

The plan (which tile goes into which shard) depends on the source and the options alone, and so does
every byte of the result: not on the number of workers, nor on how often the work was interrupted.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agrivision.data.finished import is_made_of
from agrivision.data.pool import run_jobs
from agrivision.data.raw import uncompressed
from agrivision.data.schema import MAX_TILE, Schema, Split
from agrivision.data.shard_job import Job, Made, ShardMaker, plan_digest
from agrivision.data.sharing import Common, Sharing, shared
from agrivision.data.sources.agriculture_vision import open_agriculture_vision
from agrivision.data.sources.layouts import LAYOUTS
from agrivision.data.sources.source import (
    UNDIVIDED,
    Problem,
    Problems,
    Reference,
    Report,
    Silence,
    Source,
)
from agrivision.data.sources.survey import open_rasters
from agrivision.data.splits import TRAIN, VAL, divide
from agrivision.data.statistics import Sums, add_up, band_statistics
from agrivision.data.workplace import Workplace
from agrivision.errors import SourceError
from agrivision.part import Part, Stop, never

logger = logging.getLogger(__name__)

_ORDER = (TRAIN, VAL, "test")
_FREE_OPTIONS: dict[str, Any] = {"workers": None, "strict": False}  # the bytes do not depend on them


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """How a source becomes a data set.

    Attributes:
        workers: processes; 1 works in this process, None takes one for each core it may use.
        val: scenes or fields that validate; empty lets a hash of their names decide.
        val_fraction: share of the tiles that validate where the hash decides.
        tile: side in pixels of the tiles cut from scenes.
        stride: pixels from one tile of a scene to the next; None for `tile`.
        classes: value and name in label rasters, in order of the ids; None takes the values found.
        bands: names of the scenes' bands, in order; None takes those in the files, or the usual ones.
        ignore: value in label rasters that does not count.
        edition: of Agriculture-Vision, `2020` or `2021`; None finds it by the class folders.
        assume_valid: take all pixels as valid where boundaries or masks are missing as a whole.
        strict: stop at the first problem instead of leaving the tile out.
        shard_tiles: tiles in a shard.
        raw: store the pixels uncompressed instead of the source's JPEGs or GeoTIFFs.
        allow_vrt: take VRTs as scenes and labels, where their sources are plain files.
    """

    workers: int | None = None
    val: tuple[str, ...] = ()
    val_fraction: float = 0.2
    tile: int = 256
    stride: int | None = None
    classes: tuple[tuple[int, str], ...] | None = None
    bands: tuple[str, ...] | None = None
    ignore: int | None = None
    edition: str | None = None
    assume_valid: bool = False
    strict: bool = False
    shard_tiles: int = 128
    raw: bool = False
    allow_vrt: bool = False

    def __post_init__(self) -> None:
        for name in ("workers", "tile", "stride", "shard_tiles"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SourceError(f"{name} is {value}: it must be at least 1")
        if self.tile > MAX_TILE:
            raise SourceError(f"tile is {self.tile}: it must be at most {MAX_TILE}")
        if not (math.isfinite(self.val_fraction) and 0 <= self.val_fraction < 1):
            raise SourceError(f"val_fraction is {self.val_fraction}: it must be at least 0 and below 1")

    def to_dict(self) -> dict[str, Any]:
        """What decides the bytes of the data set, as JSON can hold it."""
        content = dataclasses.asdict(self)
        return {name: content[name] for name in content if name not in _FREE_OPTIONS}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PrepareOptions:
        """What `to_dict` gave, perhaps in another version of this program.

        Raises:
            SourceError: it is something else.
        """
        try:
            options = {name: _as_tuple(value) for name, value in content.items()}
            return cls(**options)
        except (TypeError, ValueError) as error:
            raise SourceError(f"the options of the data set cannot be read: {error}") from None


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True)
class PrepareSummary:
    """What `prepare` did.

    Attributes:
        out: the data set.
        schema: its dataset.json.
        blank: tiles left out because they have no valid pixel.
        problems: the first thousand things that were not as they should be.
        problem_kinds: how many there were, by kind.
    """

    out: Path
    schema: Schema
    blank: int
    problems: tuple[Problem, ...]
    problem_kinds: Mapping[str, int]

    @property
    def tiles(self) -> int:
        """Tiles in all splits."""
        return sum(split.tiles for split in self.schema.splits.values())

    def lines(self) -> list[str]:
        """For people: what there is now, and what was left out or ignored on the way."""
        splits = ", ".join(f"{name} {split.tiles:,}" for name, split in self.schema.splits.items())
        lines = [f"{self.tiles:,} tiles in {self.out} ({splits})"]
        if self.blank:
            lines.append(f"{self.blank:,} tiles without a valid pixel were left out")
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(self.problem_kinds.items()))
        if kinds:
            lines.append(f"{sum(self.problem_kinds.values()):,} problems in the source: {kinds}")
        return lines


@dataclass(frozen=True, kw_only=True)
class PartSummary:
    """What a part of a `prepare` did that was not the last one, or came when nothing was left to do.

    Attributes:
        out: the data set.
        part: which part.
        made: shards that are this part's, and are there now.
        missing: shards of other parts that are not; 0 where the data set is finished.
    """

    out: Path
    part: Part
    made: int
    missing: int

    def lines(self) -> list[str]:
        """For people."""
        if not self.missing:
            return [f"part {self.part}: {self.out} is finished"]
        return [
            f"part {self.part}: its {self.made:,} shards are made; {self.missing:,} of other parts are"
            f" still missing in {self.out}"
        ]


def prepare(
    source_path: Path,
    out: Path,
    options: PrepareOptions = PrepareOptions(),
    report: Report | None = None,
    *,
    stop: Stop = never,
) -> PrepareSummary:
    """Make a data set.

    Args:
        source_path: an Agriculture-Vision folder, a folder with `scenes/` and `labels/`, or a CSV
            table of scenes.
        out: folder to make; after an interruption `OUT.partial` holds what is done so far.
        options: how.
        report: is told of the progress and of every problem.
        stop: whether to stop before the next shard.

    Raises:
        SourceError: the source cannot be used, or (strict) something in it is not as it should be.
        DatasetError: `out` exists already.
        Busy: another process is making it, and stays.
        Interrupted: asked to stop; run it again and it goes on.
        StorageError, NotWritable: the disk refused; run it again and it goes on.
    """
    workplace = _workplace(out)
    workplace.check_free()
    task = _Task.of(source_path, workplace, options, report or Silence(), stop)
    problems = task.problems()
    task.report.total(_count_tiles(task.jobs))
    with workplace.held(stop):
        workplace.tidy(_names(task.jobs))
        workplace.agree(task.digest, parts=1)
        made = task.make(task.jobs, problems)
        summary = task.finish(out, made, problems)
    workplace.sweep()
    return summary


def prepare_part(
    source_path: Path,
    out: Path,
    options: PrepareOptions,
    part: Part,
    report: Report | None = None,
    *,
    stop: Stop = never,
) -> PrepareSummary | PartSummary:
    """Make one part's shards of a data set, beside processes that make the others.

    The shards are divided by their place in the plan. Whoever finds all of them there puts the data
    set together: the same bytes as from `prepare`.

    Args:
        source_path: see `prepare`.
        out: see `prepare`.
        options: the same for every part, but for `workers` and `strict`.
        part: which shards to make.
        report: is told of this part's progress and problems.
        stop: whether to stop before the next shard.

    Returns:
        What `prepare` returns, problems of all parts included, where this part put the data set
        together; else what this part did.

    Raises:
        SourceError, Interrupted, StorageError, NotWritable: see `prepare`.
        DatasetError: `out` exists already and is another data set, or other parts have other options.
        Busy: a whole `prepare` or the same part is at work, and stays.
    """
    workplace = _workplace(out)
    if not os.path.lexists(workplace.out):
        workplace.check_free()
    task = _Task.of(source_path, workplace, options, report or Silence(), stop)
    try:
        task.check_out()
        with shared(task.common(part), part, stop) as sharing:
            summary = _share(task, out, part, sharing)
    except _Finished:
        summary = PartSummary(out=out, part=part, made=0, missing=0)
    workplace.sweep()
    return summary


class _Finished(Exception):
    """The data set is there: made from this source, by this plan."""


def _share(task: _Task, out: Path, part: Part, sharing: Sharing) -> PrepareSummary | PartSummary:
    mine = [place for place in range(len(task.jobs)) if part.takes(place)]
    task.report.total(_count_tiles(task.jobs[place] for place in mine))
    made = dict(
        zip(mine, task.make([task.jobs[place] for place in mine], task.problems()), strict=True)
    )
    if not sharing.ended():
        return PartSummary(out=out, part=part, made=len(mine), missing=sharing.missing)
    with sharing.alone():
        task.workplace.tidy(_names(task.jobs))
        task.report.total(_count_tiles(task.jobs))
        rest = [place for place in range(len(task.jobs)) if not part.takes(place)]
        # The other parts have told of their problems, each in its log; here all are only counted.
        quiet = Problems(report=_Advances(task.report))
        made |= zip(rest, task.make([task.jobs[place] for place in rest], quiet), strict=True)
        problems = Problems(strict=task.options.strict)
        problems.add(task.source.problems)
        for place in range(len(task.jobs)):
            problems.add(made[place].problems)
        return task.finish(out, [made[place] for place in range(len(task.jobs))], problems)


class _Advances(Silence):
    """Tells a report how far the work has come, and no problems."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def advance(self, tiles: int) -> None:
        self._report.advance(tiles)


@dataclass(frozen=True, kw_only=True)
class _Task:
    """All shards of a data set, and what makes them."""

    source: Source
    jobs: Sequence[Job]
    workplace: Workplace
    options: PrepareOptions
    report: Report
    stop: Stop

    @classmethod
    def of(
        cls,
        source_path: Path,
        workplace: Workplace,
        options: PrepareOptions,
        report: Report,
        stop: Stop,
    ) -> _Task:
        source = open_source(source_path, options)
        _warn_of_idle(source_path, source, options)
        return cls(
            source=source,
            jobs=plan(source, options),
            workplace=workplace,
            options=options,
            report=report,
            stop=stop,
        )

    @property
    def digest(self) -> str:
        """The same for all parts that may work together."""
        how = dataclasses.replace(self.options, **_FREE_OPTIONS)
        return plan_digest(self.source.reader, self.jobs, how)

    def problems(self) -> Problems:
        """Those found while looking at the source."""
        problems = Problems(strict=self.options.strict, report=self.report)
        problems.add(self.source.problems)
        return problems

    def common(self, part: Part) -> Common:
        return Common(
            workplace=self.workplace,
            plan=self.digest,
            shards=_names(self.jobs),
            busy=frozenset(place % part.of for place in range(len(self.jobs))),
            check_out=self.check_out,
        )

    def check_out(self) -> None:
        """See whether something stands at OUT.

        Raises:
            _Finished: what is being made.
            DatasetError: something else.
        """
        if os.path.lexists(self.workplace.out):
            if is_made_of(self.workplace.out, self.source, self.jobs):
                raise _Finished
            self.workplace.check_free()

    def make(self, jobs: Sequence[Job], problems: Problems) -> list[Made]:
        maker = ShardMaker(
            reader=self.source.reader,
            workplace=self.workplace,
            bands=tuple(self.source.bands),
            classes=len(self.source.classes),
            strict=self.options.strict,
        )
        workers = self.options.workers or len(os.sched_getaffinity(0))
        made: list[Made] = []
        # Whatever happens, no worker goes on.
        with closing(run_jobs(maker, jobs, workers, self.stop)) as shards:
            for job, shard in zip(jobs, shards, strict=True):
                made.append(shard)
                problems.add(shard.problems)
                problems.report.advance(len(job.references))
        return made

    def finish(self, out: Path, made: Sequence[Made], problems: Problems) -> PrepareSummary:
        schema = _describe(self.source, self.jobs, made)
        self.workplace.finish(schema, self.options.to_dict())
        return PrepareSummary(
            out=out,
            schema=schema,
            blank=sum(shard.blank for shard in made),
            problems=tuple(problems.kept),
            problem_kinds=dict(problems.kinds),
        )


def _workplace(out: Path) -> Workplace:
    return Workplace(Path(os.path.abspath(out)))  # noqa: PTH100 - resolve() would follow OUT itself


def _count_tiles(jobs: Iterable[Job]) -> int:
    return sum(len(job.references) for job in jobs)


def open_source(path: Path, options: PrepareOptions) -> Source:
    """Find out what kind of source this is, and look through it.

    Raises:
        SourceError: none that is known, or one that cannot be used.
    """
    if not path.exists():
        raise SourceError(f"no such file or folder: {path}")
    try:
        source = _look(path, options)
    except OSError as error:
        raise SourceError(f"cannot read {error.filename or path}: {error.strerror}") from None
    if source is None:
        images = " or ".join(layout.rgb for layout in LAYOUTS)
        raise SourceError(
            f"{path} is no source: neither {images} (also under train, val or test), nor scenes and"
            " labels, nor a .csv table with the columns scene and label"
        )
    return uncompressed(source) if options.raw else source


# Options that only one kind of source asks for.
_OF_RASTERS = ("tile", "stride", "classes", "bands", "ignore", "allow_vrt")
_OF_AGRICULTURE_VISION = ("edition", "assume_valid")


def _warn_of_idle(path: Path, source: Source, options: PrepareOptions) -> None:
    """Say which options do nothing for a source of this kind, so that nobody takes them for done."""
    usual, of_rasters = PrepareOptions(), source.kind == "rasters"
    idle = list(_OF_AGRICULTURE_VISION if of_rasters else _OF_RASTERS)
    if UNDIVIDED not in source.splits:
        idle.append("val_fraction")
    given = [f"--{name}" for name in idle if getattr(options, name) != getattr(usual, name)]
    if given:
        kind = "scenes and labels" if of_rasters else "an Agriculture-Vision folder"
        logger.warning("%s is %s: %s does nothing there", path, kind, ", ".join(given))


def _look(path: Path, options: PrepareOptions) -> Source | None:
    return open_rasters(
        path,
        tile=options.tile,
        stride=options.stride or options.tile,
        classes=options.classes,
        bands=options.bands,
        ignore=options.ignore,
        allow_vrt=options.allow_vrt,
    ) or open_agriculture_vision(path, edition=options.edition, assume_valid=options.assume_valid)


def plan(source: Source, options: PrepareOptions) -> list[Job]:
    """Every shard to make, split by split.

    Raises:
        SourceError: there is no tile, or `val` does not fit the source.
    """
    splits: dict[str, Sequence[Reference]] = dict(source.splits)
    if UNDIVIDED in splits:
        splits = _divide(source, options)
    elif options.val:
        raise SourceError(f"the source has its own splits ({', '.join(splits)}): leave out --val")
    order = [name for name in _ORDER if name in splits] + sorted(set(splits) - set(_ORDER))
    jobs = [job for name in order for job in _jobs(name, splits[name], options.shard_tiles)]
    if not jobs:
        raise SourceError("the source has no complete tile")
    return jobs


def _divide(source: Source, options: PrepareOptions) -> dict[str, Sequence[Reference]]:
    references = source.splits[UNDIVIDED]
    tiles = Counter(reference.field for reference in references)
    split_of = divide(tiles, options.val, options.val_fraction, source.aliases)
    return {
        name: [reference for reference in references if split_of[reference.field] == name]
        for name in (TRAIN, VAL)
    }


def _jobs(split: str, references: Sequence[Reference], size: int) -> Iterator[Job]:
    ordered = sorted(references)
    for number, start in enumerate(range(0, len(ordered), size)):
        chunk = tuple(ordered[start : start + size])
        yield Job(split=split, name=f"{number:05d}", references=chunk)


def _names(jobs: Sequence[Job]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for job in jobs:
        names.setdefault(job.split, []).append(job.name)
    return names


def _describe(source: Source, jobs: Sequence[Job], made: Sequence[Made]) -> Schema:
    shards: dict[str, list[Made]] = {}
    for job, shard in zip(jobs, made, strict=True):
        if shard.info is not None:
            shards.setdefault(job.split, []).append(shard)
    sums = {
        name: add_up((s.sums for s in of_split), bands=len(source.bands), classes=len(source.classes))
        for name, of_split in shards.items()
    }
    counted = [TRAIN] if TRAIN in sums else list(sums)
    whole = add_up(
        (sums[name] for name in counted), bands=len(source.bands), classes=len(source.classes)
    )
    if whole.pixels == 0:
        raise SourceError("not one valid pixel in the source: nothing to learn from")
    return Schema(
        source=source.kind,
        bands=source.bands,
        dtype=source.dtype,
        tile=source.tile,
        parts=source.parts,
        classes=source.classes,
        class_values=source.class_values,
        unscored=source.unscored,
        nodata=source.nodata,
        resolution=source.resolution,
        splits={
            name: _split(shards[name], sums[name], labelled=name not in source.unlabelled)
            for name in sums
        },
        statistics=band_statistics(whole, counted),
    )


def _split(shards: Sequence[Made], sums: Sums, *, labelled: bool) -> Split:
    return Split(
        tiles=sums.tiles,
        labelled=labelled,
        shards=tuple(shard.info for shard in shards if shard.info is not None),
        pixels=sums.pixels,
        class_pixels=sums.class_pixels,
        class_tiles=sums.class_tiles,
    )
