"""A run and a split → the factors and least areas with which its maps score best, and what to expect.

The network is asked once; see `recorded`. Then come the factors, and the least areas of the maps that
the factors give. Whatever is chosen on a split fits it better than any other, so the same is done for
each half of the fields and scored on the other half: that is what to expect of fields that nobody has
seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agrivision.data.loader import Batch
from agrivision.data.shards import SplitReader
from agrivision.distributed import Ranks
from agrivision.errors import BadInput, Busy, Interrupted
from agrivision.evaluation.choosing import OBJECTIVES, Count, Objective, ascend, halves, objective
from agrivision.evaluation.confusion import Scores, confusion_matrix, matrices_of_counts, scores
from agrivision.inference.counting import (
    AREAS,
    FACTORS,
    UNCHANGED,
    AreaCounts,
    AreasFound,
    areas_of,
    at_each_factor,
    first_wins,
    weights,
)
from agrivision.inference.postprocessing import FILE, Chosen, Postprocessing, run_of, weights_digest
from agrivision.inference.recorded import Recording, Spill
from agrivision.inference.scoring import Looking, Subject
from agrivision.inference.shared import by_cores
from agrivision.locks import FileLock
from agrivision.maps.legend import NODATA
from agrivision.maps.specks import without_specks
from agrivision.monitor.log import configure_log
from agrivision.monitor.progress import progress
from agrivision.ownership import require_own
from agrivision.part import Stop, never
from agrivision.phase import phase
from agrivision.storage import storage_error
from agrivision.watchdog import Watchdog
from agrivision.world import World

_LOCK = ".tune.lock"
# The halves of the fields that each search looks at: both for the result, one each for what to expect.
_HALVES = ((0, 1), (0,), (1,))

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was found.

    Attributes:
        path: of the file that was written.
        chosen: its content.
        fields: how many there are.
        before: scores without post-processing.
        after: with it, on the tiles that it was chosen on.
        crossed: each half of the fields with what was chosen on the other; None with one field.
    """

    path: Path
    chosen: Chosen
    fields: int
    before: Scores
    after: Scores
    crossed: Scores | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the scores as `evaluate --json` has them, what to expect first."""
        how = self.chosen.how
        return {
            "crossed": None if self.crossed is None else self.crossed.to_dict(),
            "after": self.after.to_dict(),
            "before": self.before.to_dict(),
            "objective": self.chosen.objective,
            "step": self.chosen.step,
            "split": self.chosen.split,
            "fields": self.fields,
            "classes": list(how.classes),
            "factors": dict(zip(how.classes, how.factors, strict=True)),
            "areas": dict(zip(how.classes, how.areas, strict=True)),
        }

    def lines(self) -> list[str]:
        """For people, what to expect first."""
        about, split = self.chosen, self.chosen.split
        name = OBJECTIVES[about.objective]
        before = _number(about.before)
        if about.crossed is None or about.before is None or about.after is None:
            lines = [f"what to expect is not known: all tiles of {split} are of one field"]
        else:
            lines = [
                f"{name} {about.crossed:.4f} is to be expected, {before} without: each half of the"
                f" {self.fields} fields of {split} scored with what was chosen on the other half",
            ]
            if about.crossed <= about.before:
                lines.append(f"what is chosen on some fields does not help on others: leave {FILE} out")
        hopeful = "optimistic, since it was chosen on these very tiles"
        if about.crossed is not None and about.after is not None:
            hopeful += f": by {about.after - about.crossed:.4f}"
        lines.append(f"{name} {_number(about.after)} on {split} itself, {before} without; {hopeful}")
        return lines


def tune(
    run: Path,
    data: Path,
    split: str = "val",
    *,
    kind: Objective = "miou",
    factors: bool = True,
    areas: bool = True,
    how: Looking | None = None,
    world: World | None = None,
    stop: Stop = never,
    stall_minutes: float | None = None,
) -> Tuned | None:
    """Choose the post-processing of a run, and write it into the run's `postprocessing.json`.

    Args:
        run: a run directory, or one of its checkpoints.
        data: a prepared data set.
        split: with labels.
        kind: what is to become largest.
        factors: whether to choose factors; else all are 1.
        areas: whether to choose least areas; else areas of any size stay.
        how: the network looks at tiles.
        world: this process among the ranks; None reads the environment.
        stop: asked between batches, and between passes over what was predicted.
        stall_minutes: end the process with exit code 1 when a rank has been at one thing for so long
            without getting on, and say which, and where; None waits for ever.

    Returns:
        What was found, on rank 0; None on the others.

    Raises:
        BadInput: there is nothing to choose, or the network is no run's.
        Busy: another process chooses for the same run.
        Untrusted: the run directory is somebody else's.
        Interrupted: a rank was asked to stop; nothing is kept.
        AgrivisionError: in one line, what is wrong and what to do.
    """
    if not (factors or areas):
        raise BadInput("there is nothing to choose: leave out --classes_only or --areas_only")
    how, world = how or Looking(), world or World.from_environment()
    configure_log(world.rank, None)
    with Watchdog(world, stall_minutes) as watchdog:
        subject = Subject.open(run, data, split, world)
        folder = run_of(subject.trained)
        if folder is None:
            raise BadInput(f"{run} is an exported network: give the run that it was exported from")
        _require(folder)
        with (
            subject.among_ranks(watchdog, stop) as ranks,
            FileLock(folder / _LOCK) as lock,
            Spill(folder) as spill,
        ):
            if not ranks.from_main(world.is_main and lock.take(alone=True)):
                raise Busy(f"another process chooses the post-processing of {folder}: wait for it")
            work = _Work(subject, ranks, spill, kind, stop)
            work.record(how, spread=FACTORS[-1] / FACTORS[0] if factors else 1.0)
            with phase("choose"):
                found = work.choose(factors=factors, areas=areas)
                tables = work.judge(found)
            return _result(subject, how, kind, found, tables) if world.is_main else None


def _require(folder: Path) -> None:
    try:
        require_own(folder)
    except OSError as error:
        raise storage_error(folder, error) from error


class _Work:
    """Choosing, on one rank among others.

    Args:
        subject: network and split.
        ranks: connected.
        spill: for what is predicted.
        kind: of score.
        stop: whether this rank was asked to stop.
    """

    def __init__(
        self, subject: Subject, ranks: Ranks, spill: Spill, kind: Objective, stop: Stop
    ) -> None:
        self._subject, self._ranks, self._spill = subject, ranks, spill
        self._kind, self._stop = kind, stop
        self._classes = subject.trained.description.classes
        self._half = half_of_tiles(subject.reader)

    def record(self, how: Looking, spread: float) -> None:
        """Ask the network, and agree on which label sets there are."""
        classes, world = len(self._classes), self._ranks.world
        made = Recording(self._spill, classes, spread)

        def decide(batch: Batch, probabilities: Tensor, labels: Tensor) -> Tensor:
            for tile, each, bits in zip(batch.tiles, probabilities, labels, strict=True):
                made.add(int(self._half[tile]), each, bits)
            return probabilities.argmax(1)

        share = -(-len(self._subject.reader) // world.size)
        with progress("predicting", share, unit="tile", show=world.is_main) as bar:
            self._subject.evaluate(self._ranks, how, decide=decide, stop=self._stop, report=bar.advance)
        seen = self._ranks.sum(made.seen)
        seen[0] = 1  # the empty set has the number 0
        self._sets = seen.nonzero().flatten()
        self._kinds = np.zeros(1 << classes, np.uint16)
        self._kinds[self._sets.numpy()] = np.arange(len(self._sets))
        self._settled = made.settled[:, :, self._sets.numpy()]
        self._made = made

    def choose(self, *, factors: bool, areas: bool) -> list[Postprocessing]:
        """By search, what was found."""
        classes, searches = len(self._classes), len(_HALVES)
        places = [[UNCHANGED] * classes for _ in range(searches)]
        bounds = [[0] * classes for _ in range(searches)]
        with progress("choosing", unit="sweep", show=self._ranks.world.is_main) as bar:

            def counted(count: Count) -> Count:
                def pass_(class_id: int | None, now: Sequence[Sequence[int]]) -> list[Tensor]:
                    self._agree()
                    found = [
                        matrices_of_counts(self._ranks.sum(each), self._sets, classes)
                        for each in count(class_id, now)
                    ]
                    bar.advance(1)
                    return found

                return pass_

            if factors:
                places = ascend(places, counted(self._at_factors), self._kind)
            if areas:
                self._areas = self._find_areas(places)
                bounds = ascend(bounds, counted(self._at_bounds), self._kind, together=True)
        return [
            Postprocessing(
                classes=self._classes,
                factors=tuple(FACTORS[place] for place in factor),
                areas=tuple(AREAS[place] for place in bound),
            )
            for factor, bound in zip(places, bounds, strict=True)
        ]

    def judge(self, found: Sequence[Postprocessing]) -> Tensor:
        """Score, tile by tile, what was found: int64 (1 + searches, 2, classes, classes) by half.

        The first of the rows is without post-processing.
        """
        self._agree()
        ways = [Postprocessing.neutral(self._classes), *found]
        classes = len(self._classes)

        def score(number: int) -> tuple[int, Tensor]:
            tile = self._made.tile(number)
            labels = tile.labels()[None]
            matrices = []
            for way in ways:
                ids = without_specks(tile.likeliest(way.weights), way.areas)
                ids = np.where(ids == NODATA, np.uint8(0), ids)  # where nothing counts
                matrices.append(confusion_matrix(torch.from_numpy(ids)[None], labels, classes))
            return self._made.half[number], torch.stack(matrices)

        sums = torch.zeros(len(ways), 2, classes, classes, dtype=torch.int64)
        for half, matrices in self._each(score):
            sums[:, half] += matrices
        return self._ranks.sum(sums)

    def _at_factors(self, class_id: int | None, places: Sequence[Sequence[int]]) -> list[Tensor]:
        assert class_id is not None  # factors that are all the same change nothing
        count = len(self._sets)

        def look(number: int) -> list[tuple[int, NDArray[np.int64]]]:
            tile, half = self._made.tile(number), self._made.half[number]
            return [
                (search, first_wins(tile, places[search], class_id, self._kinds, count))
                for search, wanted in enumerate(_HALVES)
                if half in wanted
            ]

        shape = (len(FACTORS) + 1, len(self._classes), count)
        wins = [np.zeros(shape, np.int64) for _ in _HALVES]
        for found in self._each(look):
            for search, each in found:
                wins[search] += each
        return [
            torch.from_numpy(at_each_factor(self._settled[list(wanted)].sum(0), each, class_id))
            for wanted, each in zip(_HALVES, wins, strict=True)
        ]

    def _find_areas(self, places: Sequence[Sequence[int]]) -> list[AreaCounts]:
        """The areas of the maps that the factors of each search give, of its halves."""
        classes, count = len(self._classes), len(self._sets)
        areas = [AreaCounts(self._spill, classes, count) for _ in _HALVES]

        def look(number: int) -> list[tuple[int, AreasFound]]:
            tile, half = self._made.tile(number), self._made.half[number]
            return [
                (
                    search,
                    areas_of(
                        tile.likeliest(weights(places[search])), tile.sets, self._kinds, classes, count
                    ),
                )
                for search, wanted in enumerate(_HALVES)
                if half in wanted
            ]

        self._agree()
        for found in self._each(look):
            for search, each in found:
                areas[search].add(each)
        for counts in areas:
            counts.close()
        return areas

    def _at_bounds(self, class_id: int | None, places: Sequence[Sequence[int]]) -> list[Tensor]:
        sums = [np.repeat(areas.settled[None], len(AREAS), axis=0) for areas in self._areas]
        work = [(search, group) for search, areas in enumerate(self._areas) for group in areas.groups]

        def look(item: tuple[int, int]) -> tuple[int, NDArray[np.int64]]:
            search, group = item
            return search, self._areas[search].at_each_bound(group, places[search], class_id)

        with closing(by_cores(look, work)) as done:
            for search, found in done:
                sums[search] += found
        return [torch.from_numpy(each) for each in sums]

    def _each(self, look: Callable[[int], _T]) -> Generator[_T, None, None]:
        with closing(by_cores(look, range(len(self._made)))) as done:
            yield from done

    def _agree(self) -> None:
        """Go on only if no rank was asked to stop.

        Raises:
            Interrupted: one was.
        """
        if any(self._ranks.largest(int(self._stop()))):
            raise Interrupted("stopped before anything was chosen: the same command begins anew")


def half_of_tiles(reader: SplitReader) -> NDArray[np.int64]:
    """The half of the fields that each tile of a split belongs to, 0 or 1."""
    names = [
        bytes(name).decode(errors="replace") for index in reader.indexes() for name in index["field"]
    ]
    half = halves(Counter(names))
    return np.array([half[name] for name in names], np.int64)


def _result(
    subject: Subject, how: Looking, kind: Objective, found: Sequence[Postprocessing], tables: Tensor
) -> Tuned:
    trained, reader = subject.trained, subject.reader
    folder = run_of(trained)
    assert folder is not None  # seen before
    before, after = tables[0].sum(0), tables[1].sum(0)
    crossed = tables[2, 1] + tables[3, 0]  # each half with what was chosen on the other
    fields = len({bytes(name) for index in reader.indexes() for name in index["field"]})
    classes = trained.description.classes
    chosen = Chosen(
        how=found[0],
        step=trained.step,
        weights=weights_digest(trained),
        data_fingerprint=reader.schema.fingerprint,
        split=reader.name,
        objective=kind,
        symmetries=how.symmetries,
        precision=how.precision,
        before=objective(before, kind),
        after=objective(after, kind),
        crossed=objective(crossed, kind) if fields > 1 else None,
    )
    return Tuned(
        path=chosen.write(folder),
        chosen=chosen,
        fields=fields,
        before=scores(before, classes),
        after=scores(after, classes),
        crossed=scores(crossed, classes) if fields > 1 else None,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
