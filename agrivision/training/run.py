"""A run from configuration to score: where data, model, training, evaluation and monitor meet."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from agrivision.config import Config
from agrivision.data.augment import Augment
from agrivision.data.fields import fields_of
from agrivision.data.growing import GrowingCrop
from agrivision.data.loader import TrainLoader
from agrivision.data.order import Order
from agrivision.data.sampling import RareCrops, Repeats, class_counts, repeats_of
from agrivision.data.shards import SplitReader
from agrivision.distributed import connected, pick_device, waiting_time
from agrivision.errors import (
    AgrivisionError,
    ExitCode,
)
from agrivision.model.build import build_model
from agrivision.model.losses import LabelSetLoss, class_weights
from agrivision.monitor.log import configure_log
from agrivision.options import to_yaml
from agrivision.rundir import RunDirectory
from agrivision.storage import write_atomically
from agrivision.training import provenance
from agrivision.training.about import About
from agrivision.training.loop import Loop
from agrivision.training.preemption import StopRequest
from agrivision.training.record import Record
from agrivision.training.schedule import peak_rate
from agrivision.training.setting import (
    Setting,
    check_fit,
    open_data,
    prepare_kernels,
    stage_data,
    unit_of,
)
from agrivision.training.start import await_data_set, find_start, held, make_run_directory
from agrivision.training.trainer import Progress, Trainer
from agrivision.watchdog import Watchdog
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
    with Watchdog(world, config.training.stall_minutes) as watchdog:
        return _attempt(
            config,
            RunDirectory(run_dir),
            world,
            stop or StopRequest(),
            watchdog,
            resume_with_changes=resume_with_changes,
            profile=profile,
        )


def _attempt(
    config: Config,
    run: RunDirectory,
    world: World,
    stop: StopRequest,
    watchdog: Watchdog,
    *,
    resume_with_changes: bool,
    profile: bool,
) -> ExitCode:
    await_data_set(config, world)
    data = open_data(config)
    check_fit(config, data, world)
    make_run_directory(run, world)
    configure_log(world.rank, None)
    prepare_kernels(config, world)
    device = pick_device(world)
    try:
        with (
            connected(
                world,
                device,
                run.path,
                lambda: stop.made,
                timeout=waiting_time(config.training.stall_minutes),
            ) as ranks,
            watchdog.among(ranks.store),
            held(run, ranks) as still_ours,
        ):
            configure_log(world.rank, run.log / f"rank-{world.rank}.log")
            watchdog.write_to(run.log / f"rank-{world.rank}.log")
            data = stage_data(config, data, world, stop)
            setting = Setting(
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


def _train(setting: Setting, *, resume_with_changes: bool) -> ExitCode:
    config, data, ranks = setting.config, setting.data, setting.ranks
    loaded = find_start(
        config, setting.run, ranks, data.schema.fingerprint, resume_with_changes=resume_with_changes
    )
    repeats = repeats_of(data.train, config.data.rare_sampling, config.seed)
    loader = TrainLoader(
        data.train,
        _order(config, data.train, repeats),
        ranks.world,
        threads=config.data.threads,
        prefetch=config.data.prefetch,
        pinned=setting.device.type == "cuda",
        decoder=config.data.decoder,
        crops=_rare_crops(config, data.train),
    )
    with loader:
        trainer = _build_trainer(setting, loader, repeats, fresh=loaded is None)
        if loaded is not None:
            trainer.load_states(loaded.states)
            if resume_with_changes and len(trainer.quarantine):
                log.warning("the %d tiles in quarantine are read again", len(trainer.quarantine))
                trainer.quarantine.load(())
        trainer.total_steps = _total_steps(config, loader.order, trainer.progress)
        if ranks.world.is_main:
            _write_about(setting, trainer.progress.step)
        record = Record(
            setting.run,
            ranks.world,
            resume_step=trainer.progress.step,
            total_steps=trainer.total_steps,
            about=About.of(config, data.schema, setting.run) if config.monitor.tensorboard else None,
            samples=config.monitor.log_samples,
        )
        with record:
            return Loop(setting, loader, trainer, record).go()


def _rare_crops(config: Config, train: SplitReader) -> RareCrops | None:
    share = config.data.rare_crops
    return RareCrops.of(share, train.split.class_pixels, config.seed) if share else None


def _order(config: Config, train: SplitReader, repeats: Repeats | None) -> Order:
    # In the invariant mode a micro-batch is one rank's as a whole, whatever the number of ranks.
    micro = config.training.micro_batch_size if config.training.invariant else None
    return Order(
        size=len(train) if repeats is None else repeats.size,
        batch_size=config.data.batch_size,
        seed=config.seed,
        window=config.data.shuffle_window,
        unit=micro or 1,
        repeats=repeats,
    )


def _build_trainer(
    setting: Setting, loader: TrainLoader, repeats: Repeats | None, *, fresh: bool
) -> Trainer:
    config, data, device = setting.config, setting.data, setting.device
    schema = data.schema
    torch.manual_seed(config.seed)
    # A run that goes on has the encoder's weights in its checkpoint; the file may be gone by then.
    encoder_weights = config.model.encoder_weights if fresh else None
    network = dataclasses.replace(config.model, encoder_weights=encoder_weights)
    normaliser = setting.normaliser
    model: nn.Module = build_model(network, normaliser.channels, len(schema.classes))
    unit = unit_of(model)
    if config.training.sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    layout = torch.channels_last if config.training.channels_last else torch.contiguous_format
    model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
    pixels = _class_pixels(data.train, repeats)
    weights = class_weights(
        pixels,
        config.loss.class_weights,
        config.loss.max_class_weight,
        beta=config.loss.effective_beta,
        tile_pixels=schema.tile**2,
    )
    return Trainer(
        config,
        model,
        LabelSetLoss(weights, config.loss).to(device),
        Augment(
            config=config.augment,
            normaliser=normaliser,
            crop=config.data.crop,
            seed=config.seed,
            growing=GrowingCrop.of(config, unit),
        ),
        loader=loader,
        ranks=setting.ranks,
        device=device,
        fields=fields_of(data.train, normaliser.scope),
    )


def _class_pixels(train: SplitReader, repeats: Repeats | None) -> Sequence[float]:
    """Pixels of each class in an epoch, on average; crops are taken to be cut anywhere."""
    if repeats is None:
        return train.split.class_pixels
    expected: list[float] = (repeats.factors @ class_counts(train)).tolist()
    return expected


def _total_steps(config: Config, order: Order, progress: Progress) -> int:
    """Steps of the whole run: those done, and those that the epochs still take."""
    total = progress.step + order.steps_left(progress.cursor, config.training.epochs)
    return total if config.training.max_steps is None else min(total, config.training.max_steps)


def _write_about(setting: Setting, step: int) -> None:
    setting.still_ours()
    config, run, ranks, device = setting.config, setting.run, setting.ranks, setting.device
    write_atomically(run.config, to_yaml(config.to_dict()).encode())
    attempt = provenance.describe(ranks.world, device, setting.data.schema.fingerprint, step)
    provenance.add_attempt(run, attempt)
    log.info(
        "%s: %d ranks on %s, %s %d", run.path, ranks.world.size, attempt["device"],
        "going on from step" if step else "starting at step", step,
    )  # fmt: skip
    if config.optimizer.reference_batch is not None:
        log.info(
            "the peak learning rate is %.4g: optimizer.lr %.4g is for batches of %d, not %d (%s)",
            peak_rate(config.optimizer, config.data.batch_size),
            config.optimizer.lr,
            config.optimizer.reference_batch,
            config.data.batch_size,
            config.optimizer.lr_scaling,
        )
