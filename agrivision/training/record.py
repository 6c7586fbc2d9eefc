"""What a run leaves behind besides checkpoints: log lines, metrics, curves, pictures, sample lists.

Rank 0 writes all of it; the other ranks only their lists of samples. A run that goes on from step S
first removes what the interrupted attempt wrote about later steps, so that each step stands there once.
"""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch

from agrivision.errors import AgrivisionError
from agrivision.evaluation.curves import above
from agrivision.evaluation.evaluate import Evaluation
from agrivision.late import SECONDS, await_seen, is_late
from agrivision.monitor import summaries
from agrivision.monitor.metrics import MetricsLog, keep_steps
from agrivision.monitor.pictures import Picture, confusion_picture
from agrivision.monitor.progress import Progress, progress
from agrivision.monitor.tensorboard import TensorBoard
from agrivision.rundir import RunDirectory
from agrivision.storage import detach, make_private, storage_error, write_atomically
from agrivision.training.about import About
from agrivision.training.saver import Saved
from agrivision.world import World

Extremes = Mapping[str, Mapping[str, Sequence[tuple[str, float]]]]
_NO_TILES: Extremes = {}

log = logging.getLogger(__name__)


class Record:
    """Writes about a run into its directory; use it in a `with` statement.

    Args:
        run: its directory; it exists.
        world: who writes.
        resume_step: the step that the run goes on from, 0 for a new one.
        total_steps: of the whole run.
        about: what TensorBoard shows of the run; None writes no event files.
        samples: write the list of samples.
    """

    def __init__(
        self,
        run: RunDirectory,
        world: World,
        *,
        resume_step: int,
        total_steps: int,
        about: About | None,
        samples: bool,
    ) -> None:
        self._stack = ExitStack()
        # Rank 0 may have made the folder, which this node may see late.
        seconds = 0.0 if world.is_main else SECONDS
        await_seen(lambda: make_private(run.log), is_late, seconds)
        self._metrics: MetricsLog | None = None
        self._board: TensorBoard | None = None
        self._bar: Progress | None = None
        self._samples: MetricsLog | None = None
        if samples:
            samples_file = run.log / f"samples-{world.rank}.jsonl"
            self._samples = self._open(await_seen(lambda: MetricsLog(samples_file), is_late, seconds))
        if not world.is_main:
            return
        self._metrics = self._open(MetricsLog(run.metrics))
        self._attempt = 1 if about is None else about.attempt
        if about is not None:
            done = resume_step in run.evaluations()
            again = _never if done else _is_score
            self._board = self._open(
                TensorBoard(run.tensorboard, resume_step, again, about.summaries())
            )
            self._board.text("run/attempts", about.attempt_text)
        self._bar = progress("training", total_steps, done=resume_step)
        self._rates = _Rates()

    def _open(self, thing: Any) -> Any:
        return self._stack.enter_context(thing)

    def __enter__(self) -> Record:
        if self._bar is not None:
            self._stack.enter_context(self._bar)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def sampled(self, step: int, epoch: int, keys: Sequence[str]) -> None:
        """A step consumed these tiles on this rank."""
        if self._samples is not None:
            self._samples.append({"epoch": epoch, "step": step, "keys": list(keys)})

    def stepped(self, images: int, pixels: int) -> None:
        """A step is done, with this many images over all ranks, of so many pixels each."""
        if self._bar is not None:
            self._rates.add(images, pixels)
            self._bar.advance(1)

    def trained(
        self,
        step: int,
        epoch: int,
        values: Mapping[str, float],
        waited: float,
        gpus: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """Write the means since the last such call.

        Args:
            step: optimiser steps done.
            epoch: of the step.
            values: the loss and its parts, `gradient_norm`, `learning_rate`, `quarantined`.
            waited: seconds that rank 0 has waited for pixels since the start of the process.
            gpus: as from `Gpus.take`.
        """
        if self._metrics is None:
            return
        values = dict(values) | self._rates.take(waited)
        row = {"kind": "training", "step": step, "epoch": epoch, **values}
        self._append(row | {"gpu": _together(gpus)} if any(gpus) else row)
        if self._board is not None:
            points = {_TAGS.get(name, name): value for name, value in values.items()}
            self._board.scalars(step, points | dict(_gpu_tags(gpus)) | {_ATTEMPT: self._attempt})
        if self._bar is not None:
            shown = {"loss": values["total"]} if "total" in values else {}
            self._bar.advance(0, **shown, **{"images/s": values["images_per_second"]})

    def saved(self, checkpoint: Saved) -> None:
        """A checkpoint is on the disk; another thread than the others' may say so."""
        seconds = {"seconds": checkpoint.seconds, "stall_seconds": checkpoint.stall_seconds}
        known = {"kind": "checkpoint", "step": checkpoint.step, "epoch": checkpoint.epoch}
        self._append(known | seconds)
        if self._board is not None:
            points = {f"checkpoint/{name}": value for name, value in seconds.items()}
            self._board.scalars(checkpoint.step, points)

    def scored(self, step: int, evaluation: Evaluation, seconds: float) -> None:
        """Add an evaluation of the validation split to the curves."""
        if self._board is None:
            return
        found = evaluation.scores
        self._board.scalars(step, dict(_score_tags(evaluation)) | {_EVALUATION_SECONDS: seconds})
        self._board.pictures(step, _CONFUSION, confusion_picture(found.confusion, found.classes))
        for summary in _curves(evaluation):
            self._board.add(step, summary)

    def evaluated(
        self,
        step: int,
        epoch: int,
        evaluation: Evaluation,
        seconds: float,
        extremes: Extremes = _NO_TILES,
    ) -> None:
        """Write the row of an evaluation; without it, whoever resumes at its step evaluates again.

        So call it last, when its curves and pictures are on the disk.

        Args:
            step: optimiser steps done.
            epoch: whole epochs done.
            evaluation: of the validation split.
            seconds: that it took.
            extremes: `best` and `worst`, by class the tiles' keys and their IoU.
        """
        if self._metrics is None:
            return
        found = evaluation.scores
        left_out = len(evaluation.left_out)
        row: dict[str, Any] = {
            "kind": "evaluation",
            "step": step,
            "epoch": epoch,
            "miou": found.miou,
            "iou": found.iou,
            "precision": found.precision,
            "recall": found.recall,
            "f1": found.f1,
            "confusion": found.confusion,
            "left_out": left_out,
            "seconds": seconds,
            **extremes,
        }
        self._append(row if evaluation.losses is None else row | {"loss": evaluation.losses})
        if self._bar is not None:
            self._bar.advance(0, mIoU=found.miou if found.miou is not None else "none")
            line = f"epoch {epoch}, step {step}: mIoU {_three(found.miou)} ({_by_class(found.iou)})"
            self._bar.note(f"{line}, without {left_out} tiles" if left_out else line)

    def weights(self, step: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Draw histograms of tensors, by tag."""
        if self._board is not None:
            for tag, tensor in tensors:
                summary = summaries.histogram(tag, tensor.detach().float().cpu().numpy())
                if summary is not None:
                    self._board.add(step, summary)

    def ended_early(self, step: int, epoch: int, reason: str) -> None:
        """The run ends before its last step."""
        self._append({"kind": "end", "step": step, "epoch": epoch, "reason": reason})

    def ended(self, step: int) -> None:
        """All steps are done, scored and saved."""
        if self._board is not None:
            self._board.add(step, summaries.session_end(time.time()))

    def _append(self, row: Mapping[str, Any]) -> None:
        """Write a row, with its time in seconds since 1970."""
        if self._metrics is not None:
            self._metrics.append({**row, "time": round(time.time(), 3)})

    def pictures(self, step: int, panels: Mapping[str, Picture]) -> None:
        """Draw panels in TensorBoard."""
        if self._board is not None:
            for tag, picture in panels.items():
                self._board.pictures(step, tag, picture)

    def flush(self) -> None:
        """Bring everything onto the disk, before a checkpoint that counts on it."""
        for file in (self._metrics, self._board, self._samples):
            if file is not None:
                file.flush()


_TAGS = {
    "total": "loss/total",
    "cross_entropy": "loss/cross_entropy",
    "dice": "loss/dice",
    "lovasz": "loss/lovasz",
    "pnc": "loss/pnc",
    "gradient_norm": "train/gradient_norm",
    "learning_rate": "train/learning_rate",
    "quarantined": "data/quarantined",
    "images_per_second": "speed/images_per_second",
    "megapixels_per_second": "speed/megapixels_per_second",
    "waiting_share": "speed/waiting_share",
    "memory_gib": "speed/memory_gib",
}
_ATTEMPT = "run/attempt"
_LEFT_OUT = "data/left_out"
_CONFUSION = "score/confusion"
_EVALUATION_SECONDS = "speed/evaluation_seconds"
_SCORES = ("score/", "validation/", "iou/", "precision/", "recall/", "pr/", "tiles/", "worst/")
_ADDED = ("power_watts", "energy_joules")  # over GPUs; of the others the mean counts
_MOST_GPUS = 16  # that have curves of their own


def _is_score(tag: str) -> bool:
    """Whether a curve or picture is of an evaluation."""
    return tag.startswith(_SCORES) or tag in (_LEFT_OUT, _EVALUATION_SECONDS)


def _never(_: str) -> bool:
    return False


def _score_tags(evaluation: Evaluation) -> Iterator[tuple[str, float]]:
    found = evaluation.scores
    yield _LEFT_OUT, len(evaluation.left_out)
    if found.miou is not None:
        yield "score/miou", found.miou
    for name, loss in (evaluation.losses or {}).items():
        yield f"validation/{name}", loss
    for kind in ("iou", "precision", "recall"):
        for name, value in getattr(found, kind).items():
            if value is not None:
                yield f"{kind}/{name}", value


def _curves(evaluation: Evaluation) -> Iterator[Any]:
    """Precision over recall of each class that some pixel has."""
    if evaluation.curves is None:
        return
    hits, false = above(evaluation.curves)
    for class_id, name in enumerate(evaluation.scores.classes):
        true = int(hits[class_id, 0])
        if true:
            called = (hits[class_id] + false[class_id]).numpy()
            yield summaries.precision_recall(f"pr/{name}", hits[class_id].numpy(), called, true)


def _gpu_tags(gpus: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, float]]:
    """Curves of each GPU, by rank, and the mean over those that are told of."""
    for name in dict.fromkeys(name for gpu in gpus for name in gpu):
        told = {rank: gpu[name] for rank, gpu in enumerate(gpus) if name in gpu}
        yield f"gpu/{name}/mean", sum(told.values()) / len(told)
        if 1 < len(gpus) <= _MOST_GPUS:
            for rank, value in told.items():
                yield f"gpu/{name}/rank_{rank}", value


def _together(gpus: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What all GPUs do: a row is as long whatever their number.

    Returns:
        Means of utilisation and memory, sums of power and energy, over those that tell.
    """
    found = {}
    for name in dict.fromkeys(name for gpu in gpus for name in gpu):
        told = [gpu[name] for gpu in gpus if name in gpu]
        found[name] = sum(told) / (1 if name in _ADDED else len(told))
    return found


def _three(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _by_class(iou: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {_three(value)}" for name, value in iou.items())


class _Rates:
    """Images a second, the share of time spent waiting for data, and memory, since the last look."""

    def __init__(self) -> None:
        self._images, self._pixels = 0, 0
        self._since = time.perf_counter()
        self._waited = 0.0

    def add(self, images: int, pixels: int) -> None:
        self._images += images
        self._pixels += images * pixels

    def take(self, waited: float) -> dict[str, float]:
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        rates = {
            "images_per_second": self._images / seconds,
            "megapixels_per_second": self._pixels / seconds / 1e6,
            "waiting_share": min(1.0, (waited - self._waited) / seconds),
            "memory_gib": _memory_gib(),
        }
        self._images, self._pixels, self._since, self._waited = 0, 0, now, waited
        return rates


def _memory_gib() -> float:
    """Peak memory of the GPU, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def write_quarantine(run: RunDirectory, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the list of the tiles that a run goes on without, or remove an empty one; for rank 0.

    The checkpoint holds the list that counts, so a disk that refuses this one costs a line.

    Args:
        run: its directory.
        rows: `Quarantine.rows`.
    """
    try:
        if rows:
            content = "".join(f"{json.dumps(row)}\n" for row in rows)
            write_atomically(run.quarantine, content.encode())
        else:
            run.quarantine.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s", storage_error(run.quarantine, error))
    except AgrivisionError as refusal:
        log.warning("%s", refusal)


def forget_after(run: RunDirectory, step: int) -> None:
    """Remove what an interrupted attempt wrote about steps after `step`; rank 0 does it for all.

    Also for ranks that do not exist any more: a run may go on with fewer. And the files are made anew:
    ranks on a node that Slurm has lost may still have them open.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    for path in (run.metrics, *sorted(run.log.glob("samples-*.jsonl"))):
        keep_steps(path, step)
        detach(path)
