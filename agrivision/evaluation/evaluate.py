"""A model and a split → its score: every tile once over all ranks, integers added up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from agrivision.data.augment import Normaliser
from agrivision.data.loader import Batch, evaluation_batches
from agrivision.data.quarantine import Damage, refusal
from agrivision.data.shards import SplitReader
from agrivision.distributed import Ranks
from agrivision.errors import StorageError
from agrivision.evaluation.confusion import Scores, confusion_matrix, scores
from agrivision.evaluation.presence import PresenceScores, presence, tile_presence
from agrivision.model.padding import dense_logits
from agrivision.model.precision import Precision, autocast
from agrivision.phase import moved

_AGREE_EVERY = 8  # rounds: seconds, where a round takes as long as a batch


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        scores: the challenge's score, over pixels.
        presence: which classes are in which tiles.
        left_out: tiles that could not be read: both are exact over the others.
    """

    scores: Scores
    presence: PresenceScores
    left_out: tuple[Damage, ...] = ()

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
    allowed: int = 0,
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
        allowed: how many tiles may be unreadable, and are left out then.
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
    matrix = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    # Score and truth of each class by tile; each row is filled by one rank and zero on the others,
    # so that their sum puts the rows together.
    rows = torch.zeros(2, len(reader), len(classes), dtype=torch.float64)
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
            probabilities, labels = _predict(model, batch, normaliser, device, precision)
            matrix += confusion_matrix(probabilities.argmax(1), labels, len(classes)).cpu()
            found, truth = tile_presence(probabilities, labels)
            rows[0, batch.tiles] = found.cpu().double()
            rows[1, batch.tiles] = truth.cpu().double()
            report(batch.count)
            moved()
    matrix, rows = ranks.sum(matrix), ranks.sum(rows)
    left_out = missing.agreed()
    seen = torch.ones(len(reader), dtype=torch.bool)
    seen[[damage.tile for damage in left_out]] = False
    return Evaluation(
        scores=scores(matrix, classes),
        presence=presence(rows[0, seen].float(), rows[1, seen].bool(), classes),
        left_out=left_out,
    )


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
    precision: Precision,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities (tiles, classes, height, width) float32 and label bits (tiles, height, width)."""
    pixels = batch.pixels.to(device)
    with autocast(device, precision):
        if normaliser is None:
            return model(pixels.images().float()), pixels.label_bits()
        logits = dense_logits(model, normaliser(pixels.images()))
    return logits.float().softmax(1), pixels.label_bits()
