"""What stays the same over an attempt, and what must fit together before anything is written."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from agrivision.config import Config
from agrivision.data.growing import GrowingCrop
from agrivision.data.jpeg_pixels import check_decoder
from agrivision.data.normalise import Normaliser
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.data.staging import StagedSplit, stage
from agrivision.distributed import Ranks, pick_device
from agrivision.errors import ConfigurationError
from agrivision.model.build import build_model
from agrivision.model.encoders import EncoderUNet
from agrivision.model.unet import UNet
from agrivision.phase import moved
from agrivision.rundir import RunDirectory
from agrivision.training.preemption import StopRequest
from agrivision.world import World


@dataclass(frozen=True, kw_only=True)
class Data:
    """A prepared data set, opened.

    Attributes:
        schema: its dataset.json.
        train: the split to learn from.
        val: the split to be scored on.
    """

    schema: Schema
    train: SplitReader
    val: SplitReader


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What stays the same over an attempt.

    Attributes:
        config: of the run.
        run: its directory, held.
        data: where tiles come from.
        ranks: connected.
        device: of this rank.
        stop: asks the run to stop.
        still_ours: raises where another attempt has taken over the run.
        profile: write a trace of a few steps.
    """

    config: Config
    run: RunDirectory
    data: Data
    ranks: Ranks
    device: torch.device
    stop: StopRequest
    still_ours: Callable[[], None]
    profile: bool

    @property
    def normaliser(self) -> Normaliser:
        """Of the data set, as the configuration wants it."""
        return normaliser_of(self.config, self.data)


def normaliser_of(config: Config, data: Data) -> Normaliser:
    """What stands before the network.

    Raises:
        ConfigurationError: the data set lacks a band that an index needs.
    """
    return Normaliser.of(data.schema, config.data.normalisation, config.data.index_names)


def open_data(config: Config) -> Data:
    """Open the data set that a configuration names.

    Raises:
        ConfigurationError: it names none.
        DatasetError: there is none, or it lacks a split or its labels.
    """
    if not config.data.path:
        raise ConfigurationError("data.path is missing: give the folder of a prepared data set")
    folder = Path(config.data.path)
    schema = Schema.read(folder)
    schema.split(config.data.train_split, labelled=True)
    schema.split(config.data.val_split, labelled=True)
    return Data(
        schema=schema,
        train=SplitReader(folder, schema, config.data.train_split),
        val=SplitReader(folder, schema, config.data.val_split),
    )


def stage_data(config: Config, data: Data, world: World, stop: StopRequest) -> Data:
    """The same data, read from this node's own disk where that is wanted and possible."""
    if config.data.stage is None:
        return data
    folder, splits = Path(config.data.path), (config.data.train_split, config.data.val_split)

    def asked() -> bool:  # between two pieces of the copy, which may take long
        moved()
        return stop.made

    copy = stage(
        folder,
        data.schema,
        splits,
        config.data.stage,
        stop=asked,
        speaks=world.local_rank == 0,
    )
    if copy is None:
        return data
    train, val = (StagedSplit(copy, folder, data.schema, split) for split in splits)
    return dataclasses.replace(data, train=train, val=val)


def check_fit(config: Config, data: Data, world: World) -> None:
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


def unit_of(network: nn.Module) -> int:
    """What the sides of a network's images differ by, in pixels, where it takes more than one."""
    if isinstance(network, EncoderUNet):
        return network.unit
    assert isinstance(network, UNet)
    unit: int = 2**network.depth
    return unit


def _try_shapes(config: Config, data: Data, world: World) -> None:
    """Push the smallest batches that will come through the network, without computing anything."""
    samples = _fewest_samples(config, world)
    model = dataclasses.replace(config.model, encoder_weights=None)
    channels = normaliser_of(config, data).channels
    with torch.device("meta"):
        probe = build_model(model, channels, len(data.schema.classes))
        for key, side in _sides(config, data.schema.tile, unit_of(probe)):
            images = torch.empty(samples, channels, side, side)
            try:
                probe(images)
            except ValueError as error:
                raise ConfigurationError(
                    f"{key} is {side}, with {samples} samples at a time: {error}"
                ) from None


def _sides(config: Config, tile: int, unit: int) -> list[tuple[str, int]]:
    """The keys that sides of training images follow from, and the sides."""
    end, start = config.data.crop or tile, config.data.crop_start
    if start is not None and (end - start) % unit:
        raise ConfigurationError(
            f"data.crop_start is {start} and data.crop is {end}: with this network they must differ by"
            f" a multiple of {unit}"
        )
    growing = GrowingCrop.of(config, unit)
    smaller = [] if growing is None else growing.sides[:-1]
    return [("data.crop", end), *((f"data.crop_start is {start}; a crop", side) for side in smaller)]


def _fewest_samples(config: Config, world: World) -> int:
    """The fewest samples that ever go through the network at once."""
    size, micro = config.data.batch_size, config.training.micro_batch_size
    if config.training.invariant and micro is not None:
        return size % micro or micro
    shares = (size // world.size, -(-size // world.size))
    return min(part if micro is None or micro >= part else part % micro or micro for part in shares)


def prepare_kernels(config: Config, world: World) -> None:
    """Choose how this process computes; before the device is used for the first time."""
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
