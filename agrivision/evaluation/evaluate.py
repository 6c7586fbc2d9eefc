"""A model and a split → its score: every tile once over all ranks, integers added up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from agrivision.data.fields import FieldStatistics, of_tiles
from agrivision.data.loader import Batch, evaluation_batches
from agrivision.data.normalise import Normaliser
from agrivision.data.quarantine import Damage, refusal
from agrivision.data.shards import SplitReader
from agrivision.distributed import Ranks
from agrivision.errors import StorageError
from agrivision.evaluation.confusion import Scores, confusion_matrices, scores
from agrivision.evaluation.curves import THRESHOLDS, threshold_counts
from agrivision.evaluation.presence import PresenceScores, presence, tile_presence
from agrivision.evaluation.tiles import TileCounts, tile_counts
from agrivision.model.losses import LabelSetLoss
from agrivision.model.padding import dense_logits
from agrivision.model.precision import Precision, autocast
from agrivision.phase import moved

_AGREE_EVERY = 8  # rounds: seconds, where a round takes as long as a batch

# A batch and its images (tiles, bands, height, width), pixels as in the data set, on the device → their
# probabilities (tiles, classes, height, width) float32, there too.
Forward = Callable[[Batch, torch.Tensor], torch.Tensor]
# A batch, its probabilities and its label bits (tiles, height, width) → class ids of the same shape, on
# the device.
Decide = Callable[[Batch, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        scores: the challenge's score, over pixels.
        presence: which classes are in which tiles.
        tiles: pixels of each tile by class; of tiles that are left out zeros.
        left_out: tiles that could not be read: all is exact over the others.
        losses: `total` and its parts, means over the tiles; None where no loss was asked for, or no
            tile could be read.
        curves: int64 (classes, 2, THRESHOLDS), as from `threshold_counts`; None where nobody asked.
    """

    scores: Scores
    presence: PresenceScores
    tiles: TileCounts
    left_out: tuple[Damage, ...] = ()
    losses: dict[str, float] | None = None
    curves: torch.Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the scores' keys, and `presence` by class."""
        return self.scores.to_dict() | {"presence": self.presence.to_dict()}


def evaluate(
    model: nn.Module,
    reader: SplitReader,
    normaliser: Normaliser | None,
    ranks: Ranks,
    device: torch.device,
    *,
    batch_size: int,
    threads: int,
    precision: Precision = "fp32",
    loss: LabelSetLoss | None = None,
    fields: FieldStatistics | None = None,
    curves: bool = False,
    allowed: int = 0,
    forward: Forward | None = None,
    decide: Decide | None = None,
    stop: Callable[[], bool] = lambda: False,
    report: Callable[[int], None] = lambda _: None,
) -> Evaluation | None:
    """Score a model on a split.

    Args:
        model: any network that `dense_logits` takes; it is left in evaluation mode.
        reader: of the split.
        normaliser: with the statistics that the model was trained with; None where the model takes
            pixels as they are and gives probabilities of them, as an exported one does.
        ranks: each takes its turn at the batches; all get the same result.
        device: where the model is.
        batch_size: tiles in one forward pass.
        threads: decoding threads.
        precision: of the forward pass.
        loss: to be computed of each tile; a model that gives probabilities has no logits for it.
        fields: of the split, where the model sees pixels relative to their field; None takes each tile
            for a field of its own then.
        curves: count pixels by probability too.
        allowed: how many tiles may be unreadable, and are left out then.
        forward: takes the place of the model, where that is not all: it looks from several sides.
        decide: makes class ids of a batch's probabilities; None takes the likeliest class.
        stop: asked between batches; once true on any rank, all leave within a few batches.
        report: called with the number of tiles that this rank has finished since the last call.

    Returns:
        The same evaluation on all ranks, or None if it was stopped.

    Raises:
        DatasetError: more tiles than allowed cannot be read; on all ranks.
        StorageError: a rank could read none of its tiles; on all ranks.
        PeerLost: another rank is gone.
    """
    classes = reader.schema.classes
    parts = () if loss is None else loss.parts
    found = _Found(len(reader), len(classes), losses=parts, curves=curves)
    model.eval()
    batches = evaluation_batches(
        reader,
        ranks.world,
        batch_size=batch_size,
        threads=threads,
        pinned=device.type == "cuda",
        isolate=True,
    )
    missing = _Missing(reader, ranks, allowed)
    with closing(batches):
        for batch in _in_step(batches, -(-len(reader) // batch_size), ranks, stop, missing):
            if batch is None:
                return None
            if forward is None:
                probabilities, labels, losses = _predict(
                    model, batch, normaliser, device, precision=precision, loss=loss, fields=fields
                )
            else:
                pixels, losses = batch.pixels.to(device), None
                probabilities, labels = forward(batch, pixels.images()), pixels.label_bits()
            ids = probabilities.argmax(1) if decide is None else decide(batch, probabilities, labels)
            found.add(batch.tiles, ids, probabilities, labels, losses)
            report(batch.count)
            moved()
    found.sum(ranks)
    left_out = missing.agreed()
    seen = torch.ones(len(reader), dtype=torch.bool)
    seen[[damage.tile for damage in left_out]] = False
    return Evaluation(
        scores=scores(found.matrix, classes),
        presence=presence(found.rows[0, seen].float(), found.rows[1, seen].bool(), classes),
        tiles=TileCounts.of(found.tiles),
        left_out=left_out,
        losses=_means(parts, found.losses[seen]) if parts and seen.any() else None,
        curves=found.curves if curves else None,
    )


class _Found:
    """What is counted of a split's tiles.

    A tile's row is filled by one rank and zero on the others, so that the ranks' sum puts the rows
    together: what is computed of them does not depend on who had which.

    Args:
        tiles: of the split.
        classes: how many.
        losses: their names.
        curves: make room for them.

    Attributes:
        matrix: the challenge's.
        rows: score and truth of each class by tile.
        tiles: hits, predicted and true pixels by tile.
        losses: by tile, in the order of the names.
        curves: pixels by probability.
    """

    def __init__(self, tiles: int, classes: int, *, losses: Sequence[str], curves: bool) -> None:
        self.matrix = torch.zeros(classes, classes, dtype=torch.int64)
        self.rows = torch.zeros(2, tiles, classes, dtype=torch.float64)
        self.tiles = torch.zeros(tiles, 3, classes, dtype=torch.int64)
        self.losses = torch.zeros(tiles, len(losses), dtype=torch.float64)
        self.curves = torch.zeros(classes if curves else 0, 2, THRESHOLDS, dtype=torch.int64)

    def add(
        self,
        tiles: Sequence[int],
        ids: torch.Tensor,
        probabilities: torch.Tensor,
        labels: torch.Tensor,
        losses: torch.Tensor | None,
    ) -> None:
        """Count a batch; see `_predict`."""
        matrices = confusion_matrices(ids, labels, len(self.matrix)).cpu()
        self.matrix += matrices.sum(0)
        self.tiles[tiles] = tile_counts(matrices)
        found, truth = tile_presence(probabilities, labels)
        self.rows[0, tiles] = found.cpu().double()
        self.rows[1, tiles] = truth.cpu().double()
        if losses is not None:
            self.losses[tiles] = losses.cpu().double()
        if len(self.curves):
            self.curves += threshold_counts(probabilities, labels).cpu()

    def sum(self, ranks: Ranks) -> None:
        """Put the ranks' parts together, on all of them.

        Raises:
            PeerLost: another rank is gone.
        """
        for name, part in vars(self).items():
            if part.numel():
                setattr(self, name, ranks.sum(part))


def _means(names: Sequence[str], losses: torch.Tensor) -> dict[str, float]:
    """Means over the tiles, rounded once, of float64 (tiles, names)."""
    columns = zip(names, losses.T.tolist(), strict=True)
    return {name: math.fsum(column) / len(column) for name, column in columns}


class _Missing:
    """The tiles that cannot be read, and when they are too many.

    Args:
        reader: of the split.
        ranks: connected.
        allowed: how many there may be, over all ranks.
    """

    def __init__(self, reader: SplitReader, ranks: Ranks, allowed: int) -> None:
        self._reader, self._ranks, self._allowed = reader, ranks, allowed
        self._mine: list[Damage] = []
        self._cut_off = ""

    def add(self, batch: Batch) -> None:
        """Take note of what a batch lacks."""
        self._mine += batch.found
        if batch.cut_off and not self._cut_off:
            self._cut_off = batch.found[0].why

    def check(self, stopped: bool) -> bool:
        """Agree with the other ranks whether to go on; returns whether one of them was asked to stop.

        Raises:
            DatasetError: too many tiles cannot be read.
            StorageError: a rank can read nothing.
        """
        mine = (int(stopped), len(self._mine), int(bool(self._cut_off)))
        stops, count, cut_off = self._ranks.sum(torch.tensor(mine)).tolist()
        if cut_off:
            why = next(filter(None, self._ranks.from_all(self._cut_off)))
            raise StorageError(
                f"a rank can read none of its tiles of {self._reader.dataset} ({why}): once the disk is"
                " back, the same command goes on"
            )
        if count > self._allowed:
            raise refusal(self._reader, self.agreed(), self._allowed)
        return bool(stops)

    def agreed(self) -> tuple[Damage, ...]:
        """Those of all ranks, by number."""
        told = self._ranks.from_all([damage.to_dict() for damage in self._mine])
        found = [Damage(**damage) for rank in told for damage in rank]
        return tuple(sorted(found, key=lambda damage: damage.tile))


def _in_step(
    batches: Iterator[Batch], total: int, ranks: Ranks, stop: Callable[[], bool], missing: _Missing
) -> Iterator[Batch | None]:
    """This rank's batches; None, and no more, once a rank was asked to stop.

    Every few rounds, and at the end, the ranks agree: a scheduler's grace is shorter than a long
    evaluation, and a rank that cannot read its tiles must not leave the others waiting for their sum.

    Raises:
        DatasetError, StorageError: see `_Missing.check`.
    """
    rounds = -(-total // ranks.world.size)  # some ranks have one batch less
    for number in range(rounds):
        batch = next(batches, None)
        if batch is not None:
            missing.add(batch)
            yield batch
        if (number % _AGREE_EVERY == 0 or number == rounds - 1) and missing.check(stop()):
            yield None
            return


@torch.inference_mode()
def _predict(
    model: nn.Module,
    batch: Batch,
    normaliser: Normaliser | None,
    device: torch.device,
    *,
    precision: Precision,
    loss: LabelSetLoss | None,
    fields: FieldStatistics | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Probabilities (tiles, classes, height, width) float32, label bits (tiles, height, width), losses.

    Losses are (tiles, parts of the loss); a model that gives probabilities has none.
    """
    pixels = batch.pixels.to(device)
    labels = pixels.label_bits()
    with autocast(device, precision):
        statistics = of_tiles(fields, batch.tiles, device)
        if normaliser is None:
            known = () if statistics is None else (statistics,)
            return model(pixels.images().float(), *known), labels, None
        logits = dense_logits(model, normaliser(pixels.images(), statistics=statistics))
    losses = None if loss is None else loss.reported(loss(logits, labels)).T
    return logits.float().softmax(1), labels, losses
