"""A run from configuration to score: where data, model, training, evaluation and monitor meet."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from agrivision.config import Config
from agrivision.data.augment import Augment, Normaliser
from agrivision.data.jpeg_pixels import check_decoder
from agrivision.data.loader import TrainLoader
from agrivision.data.order import Order
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.data.staging import StagedSplit, stage
from agrivision.distributed import Ranks, connected, pick_device
from agrivision.errors import (
    AgrivisionError,
    BadInput,
    ConfigurationError,
    Diverged,
    ExitCode,
    PeerLost,
)
from agrivision.evaluation.evaluate import Evaluation, evaluate
from agrivision.inference.trained import Description
from agrivision.model.build import build_model
from agrivision.model.losses import LabelSetLoss, class_weights
from agrivision.monitor.log import configure_log
from agrivision.rundir import RunDirectory
from agrivision.storage import make_private, write_atomically
from agrivision.training import provenance
from agrivision.training.preemption import StopRequest
from agrivision.training.profiling import profiled
from agrivision.training.record import Record
from agrivision.training.saver import Saver, SaveWatch
from agrivision.training.showcase import draw_panels
from agrivision.training.start import find_start, held
from agrivision.training.tally import Look
from agrivision.training.trainer import Progress, Step, Trainer
from agrivision.world import World

log = logging.getLogger(__name__)


def train(
    config: Config,
    run_dir: Path,
    *,
    world: World | None = None,
    stop: StopRequest | None = None,
    resume_with_changes: bool = False,
    profile: bool = False,
) -> ExitCode:
    """Train, from the beginning or from the latest checkpoint in the run directory.

    Args:
        config: of the run.
        run_dir: made if it does not exist, readable by its owner only.
        world: this process among the ranks; None reads the environment.
        stop: asks the run to stop; None for never.
        resume_with_changes: go on although the configuration or the data set differs.
        profile: write a trace of a few steps.

    Returns:
        DONE when all steps are done and scored, STOPPED after a stop was asked for and saved.

    Raises:
        AgrivisionError: in one line, what is wrong and what to do.
    """
    world = world or World.from_environment()
    stop = stop or StopRequest()
    data = _open_data(config)
    _check_fit(config, data, world)
    run = RunDirectory(run_dir)
    make_private(run.path)
    configure_log(world.rank, None)
    _prepare_kernels(config, world)
    device = pick_device(world)
    try:
        with (
            connected(world, device, run.path, lambda: stop.made) as ranks,
            held(run, ranks) as still_ours,
        ):
            configure_log(world.rank, run.log / f"rank-{world.rank}.log")
            data = _stage_data(config, data, world, stop)
            setting = _Setting(
                config=config,
                run=run,
                data=data,
                ranks=ranks,
                device=device,
                stop=stop,
                still_ours=still_ours,
                profile=profile,
            )
            return _train(setting, resume_with_changes=resume_with_changes)
    except AgrivisionError as error:
        log.debug("leaving with %d: %s", error.exit_code, error)  # into the rank's log file
        raise


def _prepare_kernels(config: Config, world: World) -> None:
    if config.training.deterministic:
        # cuBLAS is deterministic only with a fixed workspace, which it reads when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.training.deterministic)
    # Else every new tensor is filled with NaN first: a sixth of a step, and nothing here reads it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not config.training.deterministic
    if config.training.invariant:
        # Kernels cut their sums among the threads: on two they give other bits than on one.
        torch.set_num_threads(1)
    elif world.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // world.local_size))


@dataclass(frozen=True, kw_only=True)
class _Data:
    schema: Schema
    train: SplitReader
    val: SplitReader


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """What stays the same over an attempt."""

    config: Config
    run: RunDirectory
    data: _Data
    ranks: Ranks
    device: torch.device
    stop: StopRequest
    still_ours: Callable[[], None]
    profile: bool


def _train(setting: _Setting, *, resume_with_changes: bool) -> ExitCode:
    config, data, ranks = setting.config, setting.data, setting.ranks
    loaded = find_start(
        config, setting.run, ranks, data.schema.fingerprint, resume_with_changes=resume_with_changes
    )
    loader = TrainLoader(
        data.train,
        _order(config, len(data.train)),
        ranks.world,
        threads=config.data.threads,
        prefetch=config.data.prefetch,
        pinned=setting.device.type == "cuda",
        decoder=config.data.decoder,
    )
    with loader:
        trainer = _build_trainer(setting, loader, fresh=loaded is None)
        if loaded is not None:
            trainer.load_states(loaded.states)
        trainer.total_steps = _total_steps(config, loader.order, trainer.progress)
        if ranks.world.is_main:
            _write_about(setting, trainer.progress.step)
        record = Record(
            setting.run,
            ranks.world,
            resume_step=trainer.progress.step,
            total_steps=trainer.total_steps,
            tensorboard=config.monitor.tensorboard,
            samples=config.monitor.log_samples,
        )
        with record:
            return _Run(setting, loader, trainer, record).go()


def _order(config: Config, tiles: int) -> Order:
    # In the invariant mode a micro-batch is one rank's as a whole, whatever the number of ranks.
    micro = config.training.micro_batch_size if config.training.invariant else None
    return Order(
        size=tiles,
        batch_size=config.data.batch_size,
        seed=config.seed,
        window=config.data.shuffle_window,
        unit=micro or 1,
    )


def _open_data(config: Config) -> _Data:
    if not config.data.path:
        raise ConfigurationError("data.path is missing: give the folder of a prepared data set")
    folder = Path(config.data.path)
    schema = Schema.read(folder)
    schema.split(config.data.train_split, labelled=True)
    schema.split(config.data.val_split, labelled=True)
    return _Data(
        schema=schema,
        train=SplitReader(folder, schema, config.data.train_split),
        val=SplitReader(folder, schema, config.data.val_split),
    )


def _stage_data(config: Config, data: _Data, world: World, stop: StopRequest) -> _Data:
    """The same data, read from this node's own disk where that is wanted and possible."""
    if config.data.stage is None:
        return data
    folder, splits = Path(config.data.path), (config.data.train_split, config.data.val_split)
    copy = stage(
        folder,
        data.schema,
        splits,
        config.data.stage,
        stop=lambda: stop.made,
        speaks=world.local_rank == 0,
    )
    if copy is None:
        return data
    train, val = (StagedSplit(copy, folder, data.schema, split) for split in splits)
    return dataclasses.replace(data, train=train, val=val)


def _check_fit(config: Config, data: _Data, world: World) -> None:
    """Find what does not fit together before anything is written."""
    tile, crop = data.schema.tile, config.data.crop
    if crop is not None and crop > tile:
        raise ConfigurationError(f"data.crop is {crop}, but the tiles are {tile} pixels wide")
    if config.data.batch_size < world.size:
        raise ConfigurationError(
            f"data.batch_size is {config.data.batch_size}, but there are {world.size} ranks:"
            " each needs at least one sample"
        )
    if config.training.sync_batchnorm and not torch.cuda.is_available():
        raise ConfigurationError("training.sync_batchnorm works on GPUs only, and there is none here")
    if config.training.sync_batchnorm and config.data.batch_size % world.size:
        raise ConfigurationError(
            f"data.batch_size is {config.data.batch_size}: with training.sync_batchnorm the"
            f" {world.size} ranks must have equal shares"
        )
    if config.data.decoder == "gpu":
        check_decoder(data.schema, pick_device(world))
    _try_shapes(config, data, world)


def _try_shapes(config: Config, data: _Data, world: World) -> None:
    """Push the smallest batch that will come through the network, without computing anything."""
    side, samples = config.data.crop or data.schema.tile, _fewest_samples(config, world)
    model = dataclasses.replace(config.model, encoder_weights=None)
    with torch.device("meta"):
        probe = build_model(model, len(data.schema.bands), len(data.schema.classes))
        images = torch.empty(samples, len(data.schema.bands), side, side)
        try:
            probe(images)
        except ValueError as error:
            raise ConfigurationError(
                f"data.crop is {side}, with {samples} samples at a time: {error}"
            ) from None


def _fewest_samples(config: Config, world: World) -> int:
    """The fewest samples that ever go through the network at once."""
    size, micro = config.data.batch_size, config.training.micro_batch_size
    if config.training.invariant and micro is not None:
        return size % micro or micro
    shares = (size // world.size, -(-size // world.size))
    return min(part if micro is None or micro >= part else part % micro or micro for part in shares)


def _build_trainer(setting: _Setting, loader: TrainLoader, *, fresh: bool) -> Trainer:
    config, data, device = setting.config, setting.data, setting.device
    schema = data.schema
    torch.manual_seed(config.seed)
    # A run that goes on has the encoder's weights in its checkpoint; the file may be gone by then.
    encoder_weights = config.model.encoder_weights if fresh else None
    network = dataclasses.replace(config.model, encoder_weights=encoder_weights)
    model: nn.Module = build_model(network, len(schema.bands), len(schema.classes))
    if config.training.sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    layout = torch.channels_last if config.training.channels_last else torch.contiguous_format
    model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
    pixels = data.train.split.class_pixels
    weights = class_weights(pixels, config.loss.class_weights, config.loss.max_class_weight)
    return Trainer(
        config,
        model,
        LabelSetLoss(weights, config.loss.dice_weight).to(device),
        Augment(
            config=config.augment,
            normaliser=Normaliser.of(schema, config.data.normalisation),
            crop=config.data.crop,
            seed=config.seed,
        ),
        loader=loader,
        ranks=setting.ranks,
        device=device,
    )


def _total_steps(config: Config, order: Order, progress: Progress) -> int:
    """Steps of the whole run: those done, and those that the epochs still take."""
    total = progress.step + order.steps_left(progress.cursor, config.training.epochs)
    return total if config.training.max_steps is None else min(total, config.training.max_steps)


def _write_about(setting: _Setting, step: int) -> None:
    setting.still_ours()
    config, run, ranks, device = setting.config, setting.run, setting.ranks, setting.device
    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    write_atomically(run.config, text.encode())
    attempt = provenance.describe(ranks.world, device, setting.data.schema.fingerprint, step)
    provenance.add_attempt(run, attempt)
    log.info(
        "%s: %d ranks on %s, %s %d", run.path, ranks.world.size, attempt["device"],
        "going on from step" if step else "starting at step", step,
    )  # fmt: skip


class _Run:
    """What happens between the steps: log, evaluate, save, leave."""

    _MARGIN = 1.5  # the next step and the next save may be slower than any before

    def __init__(
        self, setting: _Setting, loader: TrainLoader, trainer: Trainer, record: Record
    ) -> None:
        self._config, self._run, self._ranks = setting.config, setting.run, setting.ranks
        self._device, self._data, self._stop = setting.device, setting.data, setting.stop
        self._loader, self._trainer, self._record = loader, trainer, record
        self._normaliser = Normaliser.of(self._data.schema, self._config.data.normalisation)
        self._saver = Saver(
            self._run,
            keep_last=self._config.training.keep_last,
            allowed=setting.still_ours,
            flush=record.flush,
            saved=self._check_warning,
        )
        trainer.before_change = self._saver.copied  # on rank 0 alone there is anything to wait for
        self._clock = SaveWatch(
            self._config.training.checkpoint_every_minutes if self._ranks.world.is_main else None,
            saver=self._saver,
        )
        self._saved_step = trainer.progress.step if trainer.progress.step else -1
        self._warning_seconds = setting.ranks.world.signal_seconds
        self._slowest_step = 0.0
        self._profile = self._run.profile if setting.profile else None
        self._missed = 0  # the last skipped step that the log knows of

    def go(self) -> ExitCode:
        """Train to the end, or until somebody asks to stop; what was saved is then on the disk."""
        with self._saver, profiled(self._profile, self._ranks.world.rank) as self._profile_step:
            return self._train()

    def _train(self) -> ExitCode:
        config, progress = self._config, self._trainer.progress
        self._record.text("config", f"```yaml\n{yaml.safe_dump(config.to_dict(), sort_keys=False)}```")
        if progress.step and not self._evaluate_if_due():  # the attempt before may have missed it
            return self._leave()
        since = time.perf_counter()
        for step in self._trainer.steps(self._stop, self._clock):
            self._profile_step()
            self._slowest_step = max(self._slowest_step, time.perf_counter() - since)
            self._write(step)
            if self._ranks.world.is_main:
                self._saver.prepare(self._states)  # now that the optimiser has states
            if self._save_is_due(step):
                self._look()
                self._save()
            if step.unreadable:
                self._finish_saving()
                raise self._unreadable()
            if step.stop or not self._evaluate_if_due():
                return self._leave()
            since = time.perf_counter()
        if self._saved_step != progress.step:
            self._save()
        self._finish_saving()
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
            keys = [self._data.train.key(tile) for tile in step.batch.tiles[: step.batch.count]]
            self._record.sampled(step.number, whole.epoch, keys)
        self._record.stepped(whole.count)
        if step.number % self._config.monitor.log_every_steps == 0 or self._is_last():
            values = self._look().means | {"learning_rate": step.learning_rate}
            self._trainer.tally.restart()
            self._record.trained(step.number, whole.epoch, values, self._loader.waited)

    def _look(self) -> Look:
        """Wait for the device, and see whether the steps up to here were good."""
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
            or step.unreadable > 0
            or (steps is not None and step.number % steps == 0)
            or (epochs > 0 and self._ends_epoch() and self._epoch % epochs == 0)
        )
        # What is scored is saved: else the best could be a step that nobody has.
        return due or self._evaluation_is_due()

    def _save(self) -> None:
        """Copy the states on rank 0, where they are written behind the next steps.

        All ranks learn whether what was saved before is on the disk.
        """
        if not self._ranks.world.is_main:
            self._record.flush()  # rank 0 does that behind the next steps, too
        self._on_main(self._save_on_main)
        self._clock.restart()
        self._saved_step = self._trainer.progress.step

    def _finish_saving(self) -> None:
        """Wait until what was saved is on the disk; all ranks learn whether it is."""
        self._on_main(self._saver.wait)

    def _on_main(self, act: Callable[[], None]) -> None:
        """Let rank 0 save or wait; where that fails, all ranks leave."""
        error = None
        if self._ranks.world.is_main:
            try:
                act()
            except AgrivisionError as refusal:
                error = refusal
        if self._ranks.largest(int(error is not None))[0]:
            raise error or PeerLost("rank 0 could not save the checkpoint: see its own line")

    def _save_on_main(self) -> None:
        progress, training = self._trainer.progress, self._config.training
        milestone = (
            training.keep_every > 0 and self._ends_epoch() and self._epoch % training.keep_every == 0
        )
        self._saver.save(self._states(), step=progress.step, epoch=self._epoch, milestone=milestone)

    def _states(self) -> Mapping[str, Mapping[str, Any]]:
        """What training needs to go on, and what inference needs besides."""
        known = Description.of(self._config.model, self._data.schema, self._normaliser)
        return self._trainer.states() | {"description": known.to_dict()}

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
        evaluation = self._evaluate()
        if evaluation is None:
            return False
        seconds = time.perf_counter() - begin
        drawn = self._ranks.world.is_main and self._config.monitor.tensorboard
        panels = self._panels() if drawn else {}  # before anything is written: it takes its time
        self._finish_saving()  # what has a score has a checkpoint
        self._record.evaluated(step, self._epoch, evaluation, seconds)
        self._record.pictures(step, panels)
        return True

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
            stop=lambda: self._stop.made,
        )

    def _panels(self) -> Mapping[str, Any]:
        return draw_panels(
            self._trainer.evaluated,
            self._data.val,
            self._normaliser,
            self._device,
            count=self._config.monitor.images,
            precision=self._config.training.precision,
        )

    def _unreadable(self) -> AgrivisionError:
        trouble = self._trainer.trouble
        return trouble or BadInput("another rank could not read its data: see its own line")

    def _leave(self) -> ExitCode:
        if self._saved_step != self._trainer.progress.step:
            self._save()
        self._finish_saving()
        reason = self._stop.reason or "another rank was asked to stop"
        log.info("stopped at step %d (%s); the same command goes on", self._saved_step, reason)
        return ExitCode.STOPPED
