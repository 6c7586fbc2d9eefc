"""What happens between the steps: log, evaluate, save, leave."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from agrivision.data.fields import fields_of
from agrivision.data.loader import TrainLoader
from agrivision.data.quarantine import Damage, most_damaged
from agrivision.errors import AgrivisionError, Diverged, ExitCode, PeerLost
from agrivision.evaluation.evaluate import Evaluation, evaluate
from agrivision.inference.trained import Description
from agrivision.monitor.gpus import Gpus, reader
from agrivision.phase import moved, phase
from agrivision.training import provenance
from agrivision.training.early import exhausted
from agrivision.training.patience import DiskPatience
from agrivision.training.profiling import profiled
from agrivision.training.record import Extremes, Record, write_quarantine
from agrivision.training.saver import Saved, Saver, SaveWatch
from agrivision.training.setting import Setting
from agrivision.training.showcase import Worst, draw_panels
from agrivision.training.tally import Look
from agrivision.training.trainer import Step, Trainer

log = logging.getLogger(__name__)


class Loop:
    """An attempt, from its first step to the one that it leaves after.

    Args:
        setting: of the attempt.
        loader: of the training split.
        trainer: at the step that the attempt goes on from.
        record: of what happens.
    """

    _MARGIN = 1.5  # the next step and the next save may be slower than any before

    def __init__(self, setting: Setting, loader: TrainLoader, trainer: Trainer, record: Record) -> None:
        self._config, self._run, self._ranks = setting.config, setting.run, setting.ranks
        self._device, self._data, self._stop = setting.device, setting.data, setting.stop
        self._loader, self._trainer, self._record = loader, trainer, record
        self._normaliser = setting.normaliser
        self._val_fields = fields_of(self._data.val, self._normaliser.scope)
        main = self._ranks.world.is_main
        self._patience = DiskPatience(
            60 * self._config.training.save_patience_minutes, lambda: self._stop.made
        )
        self._saver = Saver(
            self._run,
            keep_last=self._config.training.keep_last,
            allowed=setting.still_ours,
            attempt=len(provenance.attempts(self._run)) if main else 0,
            whole=trainer.progress.step or None,
            patience=self._patience,
            flush=record.flush,
            saved=self._saved,
        )
        trainer.isolated = self._isolated
        trainer.before_change = self._saver.copied  # on rank 0 alone there is anything to wait for
        self._clock = SaveWatch(
            self._config.training.checkpoint_every_minutes if main else None,
            saver=self._saver,
        )
        self._saved_step = trainer.progress.step if trainer.progress.step else -1
        self._warning_seconds = setting.ranks.world.signal_seconds
        self._slowest_step = 0.0
        self._gpus = Gpus(self._ranks, reader(self._device))
        self._profile = self._run.profile if setting.profile else None
        self._still_ours = setting.still_ours
        self._left_out: set[int] = set()  # validation tiles that the log has named
        self._missed = 0  # the last skipped step that the log knows of

    def go(self) -> ExitCode:
        """Train to the end, or until somebody asks to stop; what was saved is then on the disk."""
        profile = profiled(self._profile, self._ranks.world.rank)
        with phase("train"), self._saver, profile as self._profile_step:
            return self._train()

    def _train(self) -> ExitCode:
        progress = self._trainer.progress
        self._write_quarantine()
        if progress.step and not self._evaluate_if_due():  # the attempt before may have missed it
            return self._leave()
        since = time.perf_counter()
        for step in () if self._ends_early() else self._trainer.steps(self._stop, self._clock):
            self._profile_step()
            self._slowest_step = max(self._slowest_step, time.perf_counter() - since)
            self._write(step)
            if self._ranks.world.is_main:
                self._saver.prepare(self._states)  # now that the optimiser has states
            if self._save_is_due(step):
                self._look()
                self._save()
            if step.trouble is not None:
                self._finish_saving()
                raise step.trouble
            if step.stop or not self._evaluate_if_due():
                return self._leave()
            if self._ends_early():
                break
            since = time.perf_counter()
        if self._saved_step != progress.step:
            self._save()
        self._finish_saving()
        self._record.ended(progress.step)
        log.info("done after %d steps; results in %s", progress.step, self._run.path)
        return ExitCode.DONE

    @property
    def _epoch(self) -> int:
        return self._trainer.progress.cursor // self._loader.order.size

    def _ends_epoch(self) -> bool:
        return self._trainer.progress.cursor % self._loader.order.size == 0

    def _is_last(self) -> bool:
        return self._trainer.progress.step >= self._trainer.total_steps

    def _write(self, step: Step) -> None:
        whole = step.batch.whole
        assert whole is not None
        if self._config.monitor.log_samples:
            keys = [self._data.train.key(tile) for tile in step.batch.counted]
            self._record.sampled(step.number, whole.epoch, keys)
        side = self._trainer.augment.side(whole.epoch, self._data.schema.tile)
        self._record.stepped(whole.count, side**2)
        if step.number % self._config.monitor.log_every_steps == 0 or self._is_last():
            values = self._look().means | {
                "learning_rate": step.learning_rate,
                "quarantined": len(self._trainer.quarantine),
            }
            self._trainer.tally.restart()
            gpus = self._gpus.take()
            self._record.trained(step.number, whole.epoch, values, self._loader.waited, gpus)
        if self._config.monitor.histograms and (self._ends_epoch() or self._is_last()):
            self._record.weights(step.number, self._tensors())

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights and their gradients, clipped as the step took them, by tag."""
        for name, weight in self._trainer.model.named_parameters():
            yield f"weights/{name}", weight
            if weight.grad is not None:
                yield f"gradients/{name}", weight.grad

    def _isolated(self, found: Sequence[Damage], step: int) -> None:
        """Name tiles that are in quarantine from a step on."""
        quarantine = self._trainer.quarantine
        for damage in found:
            log.log(
                logging.WARNING if self._ranks.world.is_main else logging.DEBUG,
                "tile %s is left out from step %d on: %s (%d tiles in quarantine, at most %d may be)",
                damage.name,
                step,
                damage.why,
                len(quarantine),
                quarantine.allowed,
            )
        self._write_quarantine()

    def _write_quarantine(self) -> None:
        if self._ranks.world.is_main:
            self._still_ours()
            write_quarantine(self._run, self._trainer.quarantine.rows)

    def _look(self) -> Look:
        """Wait for the device, and see whether the steps up to here were good."""
        with phase("wait for the device"):
            look = self._trainer.tally.look()
        most = self._config.training.max_nonfinite_steps
        if look.most_in_a_row >= most:
            raise Diverged(
                f"the loss was not finite in {look.most_in_a_row} steps in a row, the last one step"
                f" {look.last_missed}: lower optimizer.lr, or train in fp32"
            )
        if look.last_missed > self._missed:
            self._missed = look.last_missed
            log.warning(
                "the loss was not finite in %d of the steps up to %d: they are skipped",
                look.missed,
                look.last_missed,
            )
        return look

    def _save_is_due(self, step: Step) -> bool:
        training = self._config.training
        epochs, steps = training.checkpoint_every_epochs, training.checkpoint_every_steps
        due = (
            step.save
            or step.stop
            or step.trouble is not None
            or (steps is not None and step.number % steps == 0)
            or (epochs > 0 and self._ends_epoch() and self._epoch % epochs == 0)
        )
        # What is scored is saved: else the best could be a step that nobody has.
        return due or self._evaluation_is_due()

    def _save(self) -> None:
        """Copy the states on rank 0, where they are written behind the next steps.

        All ranks learn whether what was saved before is on the disk.
        """
        if self._config.monitor.log_samples:  # a checkpoint counts on the lists of all ranks
            self._together(self._keep_samples)
        self._on_main(self._save_on_main)
        self._clock.restart()
        self._saved_step = self._trainer.progress.step

    def _finish_saving(self) -> None:
        """Wait until what was saved is on the disk; all ranks learn whether it is."""
        self._on_main(self._saver.wait)

    def _on_main(self, act: Callable[[], None]) -> None:
        """Let rank 0 save or wait; where that fails, all ranks leave."""
        self._together(act if self._ranks.world.is_main else lambda: None)

    def _together(self, act: Callable[[], None]) -> None:
        """Let each rank bring something onto the disk; where one fails, all leave."""
        error = None
        try:
            with phase("wait for the disk"):
                act()
        except AgrivisionError as refusal:
            error = refusal
        # The lowest rank that failed: its own line says why.
        size, rank = self._ranks.world.size, self._ranks.world.rank
        failed = size - self._ranks.largest(size - rank if error is not None else 0)[0]
        if failed < size:
            raise error or PeerLost(f"rank {failed} could not save: see its own line")

    def _keep_samples(self) -> None:
        if not self._ranks.world.is_main:  # rank 0 does it behind the next steps
            self._patience.persist(self._record.flush, moved)

    def _save_on_main(self) -> None:
        progress, training = self._trainer.progress, self._config.training
        milestone = (
            training.keep_every > 0 and self._ends_epoch() and self._epoch % training.keep_every == 0
        )
        self._saver.save(self._states(), step=progress.step, epoch=self._epoch, milestone=milestone)

    def _states(self) -> Mapping[str, Mapping[str, Any]]:
        """What training needs to go on, and what inference needs besides."""
        known = Description.of(
            self._config.model, self._data.schema, self._normaliser, self._config.data.index_names
        )
        return self._trainer.states() | {"description": known.to_dict()}

    def _saved(self, checkpoint: Saved) -> None:
        self._record.saved(checkpoint)
        self._check_warning(checkpoint.seconds)

    def _check_warning(self, save_seconds: float) -> None:
        """Say, once, if the job's warning before its end leaves no time for a step and a save."""
        needed = self._MARGIN * (self._slowest_step + save_seconds)
        if 0 < self._warning_seconds < needed:
            log.warning(
                "the job is warned %d s before its time limit, but a step (%.1f s) and a save (%.1f s)"
                " may take longer: ask for --signal=USR1@%d or more",
                self._warning_seconds,
                self._slowest_step,
                save_seconds,
                math.ceil(2 * needed),
            )
            self._warning_seconds = 0

    def _evaluate_if_due(self) -> bool:
        """Evaluate where the configuration wants it; False when it was stopped on the way."""
        step = self._trainer.progress.step
        if not self._evaluation_is_due() or self._ranks.from_main(step in self._run.evaluations()):
            return True
        begin = time.perf_counter()
        with phase("evaluate"):
            evaluation = self._evaluate()
        if evaluation is None:
            return False
        seconds = time.perf_counter() - begin
        self._name(evaluation.left_out)
        worst = self._extremes(evaluation.tiles.worst)
        drawn = self._ranks.world.is_main and self._config.monitor.tensorboard
        with phase("draw"):
            # Before anything is written: it takes its time.
            panels = self._panels(worst) if drawn else {}
        self._finish_saving()  # what has a score has a checkpoint
        self._record.scored(step, evaluation, seconds)
        self._record.pictures(step, panels)
        # Its row comes last: it says that the rest is there, and need not be made again.
        self._on_main(lambda: self._patience.persist(self._record.flush, moved))
        extremes = {"best": self._extremes(evaluation.tiles.best), "worst": worst}
        self._record.evaluated(step, self._epoch, evaluation, seconds, self._named(extremes))
        return True

    def _ends_early(self) -> bool:
        """Whether the run ends with the evaluation of this step, as it gets no better."""
        training, step = self._config.training, self._trainer.progress.step
        if training.patience is None or not self._evaluation_is_due():
            return False
        # All rows are there before they are read, also on a disk that took the last one late.
        self._on_main(lambda: self._patience.persist(self._record.flush, moved))
        reason = exhausted(training, self._run.evaluations(), step, self._trainer.total_steps)
        reason = self._ranks.from_main(reason)
        if reason is None:
            return False
        log.info("%s", reason)
        if step not in self._run.early_ends():  # an attempt before may have written it
            self._record.ended_early(step, self._epoch, reason)
        return True

    def _extremes(self, which: Callable[[int, int], list[tuple[int, float]]]) -> Worst:
        """Some tiles of each class, and their IoU."""
        count = self._config.monitor.worst_tiles
        return {name: which(number, count) for number, name in enumerate(self._data.schema.classes)}

    def _named(self, extremes: Mapping[str, Worst]) -> Extremes:
        """The same tiles by their keys; rank 0 alone writes them."""
        if not self._ranks.world.is_main:
            return {}
        key = self._data.val.key
        return {
            which: {name: [(key(tile), iou) for tile, iou in tiles] for name, tiles in found.items()}
            for which, found in extremes.items()
        }

    def _name(self, left_out: Sequence[Damage]) -> None:
        """Name validation tiles that are not in the score, each once."""
        for damage in left_out:
            if self._ranks.world.is_main and damage.tile not in self._left_out:
                log.warning("tile %s is left out of the score: %s", damage.name, damage.why)
        self._left_out.update(damage.tile for damage in left_out)

    def _evaluation_is_due(self) -> bool:
        every = self._config.training.evaluate_every_epochs
        due = every > 0 and self._ends_epoch() and self._epoch % every == 0
        return due or self._is_last()

    def _evaluate(self) -> Evaluation | None:
        model = self._trainer.evaluated
        # BatchNorm's running statistics have seen each rank's own samples; those of rank 0 count.
        self._ranks.take_from_main(model.buffers())
        return evaluate(
            model,
            self._data.val,
            self._normaliser,
            self._ranks,
            self._device,
            batch_size=self._config.evaluation.batch_size,
            threads=self._config.data.threads,
            precision=self._config.training.precision,
            fields=self._val_fields,
            loss=self._trainer.loss,
            curves=self._config.monitor.tensorboard and self._config.monitor.pr_curves,
            allowed=most_damaged(self._config.data.max_damaged_share, len(self._data.val)),
            stop=lambda: self._stop.made,
        )

    def _panels(self, worst: Worst) -> Mapping[str, Any]:
        return draw_panels(
            self._trainer.evaluated,
            self._data.val,
            self._normaliser,
            self._device,
            count=self._config.monitor.images,
            worst=worst,
            fields=self._val_fields,
            precision=self._config.training.precision,
        )

    def _leave(self) -> ExitCode:
        if self._saved_step != self._trainer.progress.step:
            self._save()
        self._finish_saving()
        reason = self._stop.reason or "another rank was asked to stop"
        log.info("stopped at step %d (%s); the same command goes on", self._saved_step, reason)
        return ExitCode.STOPPED
