"""The score of a trained run on a split, on one process or on many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agrivision.data.fields import FieldStatistics, fields_of, of_tiles
from agrivision.data.labels import VALID_BIT
from agrivision.data.loader import Batch
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.distributed import Ranks, connected, pick_device, waiting_time
from agrivision.errors import BadInput, Interrupted
from agrivision.evaluation.evaluate import Decide, Evaluation, Forward, evaluate
from agrivision.inference.exported import load_model
from agrivision.inference.postprocessing import Postprocessing, find_postprocessing
from agrivision.inference.predictor import Predictor
from agrivision.inference.trained import TrainedModel
from agrivision.model.precision import Precision
from agrivision.monitor.log import configure_log
from agrivision.monitor.progress import progress
from agrivision.part import Stop, never
from agrivision.phase import phase
from agrivision.watchdog import Watchdog
from agrivision.world import World


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network and the split that it is tried on, by one rank.

    Attributes:
        trained: the network.
        reader: of the split, which has labels.
        fields: of the split, where the network sees pixels relative to their field.
        world: this rank.
    """

    trained: TrainedModel
    reader: SplitReader
    fields: FieldStatistics | None
    world: World

    @classmethod
    def open(cls, checkpoint: Path, data: Path, split: str, world: World) -> Subject:
        """Load both, and see that they belong together.

        Raises:
            AgrivisionError: in one line, what is wrong and what to do.
        """
        device = pick_device(world)
        schema = Schema.read(data)
        schema.split(split, labelled=True)
        reader = SplitReader(data, schema, split)
        trained = load_model(checkpoint, device)
        check_fit(trained, schema, data)
        fields = fields_of(reader, trained.description.scope)
        return cls(trained=trained, reader=reader, fields=fields, world=world)

    def evaluate(
        self,
        ranks: Ranks,
        how: Looking,
        *,
        decide: Decide | None = None,
        stop: Stop = never,
        report: Callable[[int], None],
    ) -> Evaluation:
        """Score the network on the split.

        Args:
            ranks: connected.
            how: the network looks at tiles.
            decide: makes class ids of a batch's probabilities; None takes the likeliest class.
            stop: asked between batches.
            report: called with the number of tiles that this rank has finished since the last call.

        Raises:
            Interrupted: a rank was asked to stop.
            DatasetError: a tile cannot be read.
        """
        trained = self.trained
        found = evaluate(
            trained.module,
            self.reader,
            trained.normaliser,
            ranks,
            trained.device,
            batch_size=how.batch_size,
            threads=how.threads,
            precision=how.precision,
            fields=self.fields,
            forward=self._all_sides(how) if how.symmetries else None,
            decide=decide,
            stop=stop,
            report=report,
        )
        if found is None:
            raise Interrupted(
                "stopped before the evaluation was done: the same command begins it anew; if that was"
                " the time limit, give it more time or more ranks"
            )
        return found

    @contextmanager
    def among_ranks(self, watchdog: Watchdog, stop: Stop) -> Iterator[Ranks]:
        """The ranks, connected and watched while the block runs.

        Args:
            watchdog: entered already.
            stop: asked while this rank waits for the others.

        Raises:
            PeerLost: the ranks did not find one another.
            ConfigurationError: ranks would share a GPU.
            Interrupted: asked to stop while waiting.
        """
        timeout = waiting_time(watchdog.minutes)
        with (
            connected(self.world, self.trained.device, stop=stop, timeout=timeout) as ranks,
            watchdog.among(ranks.store),
            phase("evaluate"),
        ):
            yield ranks

    def _all_sides(self, how: Looking) -> Forward:
        """As `predict` does."""
        predictor = Predictor.of([self.trained], symmetries=True, precision=how.precision)

        def forward(batch: Batch, images: torch.Tensor) -> torch.Tensor:
            statistics = of_tiles(self.fields, batch.tiles, images.device)
            return predictor.probabilities(images, statistics=statistics)

        return forward


@dataclass(frozen=True, kw_only=True)
class Looking:
    """How a network looks at the tiles of a split.

    Attributes:
        batch_size: tiles in one forward pass.
        threads: decoding threads of each rank.
        precision: of the forward pass.
        symmetries: show every tile in all eight positions of a square, and average.
    """

    batch_size: int = 8
    threads: int = 2
    precision: Precision = "fp32"
    symmetries: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.threads < 0:
            raise BadInput(
                f"batch_size is {self.batch_size} and threads {self.threads}: at least 1 and at least 0"
            )


def evaluate_run(
    checkpoint: Path,
    data: Path,
    split: str,
    *,
    batch_size: int = 8,
    threads: int = 2,
    precision: Precision = "fp32",
    symmetries: bool = False,
    postprocess: bool | Path = False,
    world: World | None = None,
    stop: Stop = never,
    stall_minutes: float | None = None,
) -> dict[str, Any] | None:
    """Score a run on a split of a data set.

    Args:
        checkpoint: a run directory, a checkpoint or a file in one, or an exported network.
        data: a prepared data set.
        split: with labels.
        batch_size: tiles in one forward pass.
        threads: decoding threads of each rank.
        precision: of the forward pass.
        symmetries: show every tile in all eight positions of a square, and average: 8 x the work.
        postprocess: with what `tune` chose for the run, or with what stands in a file.
        world: this process among the ranks; None reads the environment.
        stop: asked between batches; once true on any rank, all leave within a few batches.
        stall_minutes: end the process with exit code 1 when a rank has been at one thing for so long
            without getting on, and say which, and where; None waits for ever.

    Returns:
        What `Evaluation.to_dict` gives, and `checkpoint`, `step` and `split`, on rank 0, and
        `postprocessing` in words where there was any; None on the others.

    Raises:
        Interrupted: a rank was asked to stop; nothing is kept.
        AgrivisionError: in one line, what is wrong and what to do.
    """
    how = Looking(batch_size=batch_size, threads=threads, precision=precision, symmetries=symmetries)
    world = world or World.from_environment()
    configure_log(world.rank, None)
    with Watchdog(world, stall_minutes) as watchdog:
        subject = Subject.open(checkpoint, data, split, world)
        trained = subject.trained
        after = None
        if postprocess:
            given = postprocess if isinstance(postprocess, Path) else None
            after = find_postprocessing([trained], given, symmetries=symmetries)
        share = -(-len(subject.reader) // world.size)
        with (
            subject.among_ranks(watchdog, stop) as ranks,
            progress("evaluating", share, unit="tile", show=world.is_main) as bar,
        ):
            found = subject.evaluate(
                ranks,
                how,
                decide=None if after is None else _deciding(after),
                stop=stop,
                report=bar.advance,
            )
    if not world.is_main:
        return None
    about = {"checkpoint": str(trained.folder), "step": trained.step, "split": split}
    return found.to_dict() | about | ({"postprocessing": after.line()} if after else {})


def _deciding(after: Postprocessing) -> Decide:
    def decide(batch: Batch, probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
        return after.decide(probabilities, ((labels >> VALID_BIT) & 1).bool())

    return decide


def check_fit(trained: TrainedModel, schema: Schema, data: Path) -> None:
    """A score over other bands or other classes would be a number without a meaning.

    Raises:
        BadInput: they are others.
    """
    description = trained.description
    if description.bands != schema.bands:
        raise BadInput(
            f"{data} has the bands {', '.join(schema.bands)}; the run was trained on"
            f" {', '.join(description.bands)}"
        )
    if description.dtype != schema.dtype:
        raise BadInput(
            f"{data} holds {schema.dtype} pixels; the run was trained on {description.dtype}"
        )
    if description.classes != schema.classes:
        raise BadInput(
            f"{data} has {len(schema.classes)} classes ({', '.join(schema.classes)}); the run was"
            f" trained on {len(description.classes)} ({', '.join(description.classes)})"
        )
