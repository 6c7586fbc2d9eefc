"""The whole configuration of a run: frozen dataclasses, each checked where it is built.

The names of the fields are the keys of the YAML files and of the command line
(`--optimizer.lr 1e-3`). Checks that need one section stand in that section, those that need two in
`Config`. Everything that depends on the data set is checked when the run meets it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from agrivision.errors import ConfigurationError


def _require(condition: bool, key: str, value: object, wanted: str) -> None:
    if not condition:
        raise ConfigurationError(f"{key} is {value!r}: it must be {wanted}")


def _fraction(key: str, value: float, *, below_one: bool = False) -> None:
    good = 0 <= value < 1 if below_one else 0 <= value <= 1
    _require(good, key, value, "at least 0 and below 1" if below_one else "between 0 and 1")


def _positive(key: str, value: float | None) -> None:
    _require(value is None or (math.isfinite(value) and value > 0), key, value, "positive")


def _at_least(key: str, value: float, least: float) -> None:
    _require(math.isfinite(value) and value >= least, key, value, f"at least {least}")


def _is_stage(text: str | None) -> bool:
    return text in (None, "auto") or (text.startswith(("/", "$")) and text.isprintable())


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data, and how it reaches the device.

    Attributes:
        path: folder of a prepared data set (it holds dataset.json).
        batch_size: samples in one optimiser step over all ranks together.
        crop: side in pixels of the random square cut from each training tile; null takes whole tiles.
        threads: decoding threads of each rank; 0 decodes in the main thread.
        prefetch: batches decoded ahead of the step by each rank.
        decoder: `cpu` decodes in the threads; `gpu` lets nvJPEG do it, for nodes with few cores for
            each GPU. Its pixels may differ by a grey level, so a run keeps the one that it began with.
        shuffle_window: null lets a tile come anywhere in an epoch. A number mixes tiles within windows
            of about that many, each drawn from a few places of the split, so that a rank reads few
            shards at a time: for splits of very many shards, or disks that are slow at random reads.
        train_split: split to train on.
        val_split: split to evaluate on.
        normalisation: what the network sees of the pixels: `bands` gives each band zero mean and unit
            variance by the statistics of the data set; `range` divides all bands by its largest value,
            which keeps the ratios between bands that indices such as NDVI are made of.
        stage: copy the two splits to the node's own disk first: `auto` ($SLURM_TMPDIR, else $TMPDIR
            where that is a disk of the node), or an absolute path, in which $NAME is expanded. null
            reads them where they are.
        max_damaged_share: share of a split's tiles that may be unreadable, rounded down to a number of
            tiles; a run goes on without them and names each. With one more it stops, so that in a
            split of fewer than 1,000 tiles the first one does; 0 always stops.
    """

    path: str = ""
    batch_size: int = 16
    crop: int | None = None
    threads: int = 2
    prefetch: int = 2
    decoder: Literal["cpu", "gpu"] = "cpu"
    shuffle_window: int | None = None
    train_split: str = "train"
    val_split: str = "val"
    normalisation: Literal["bands", "range"] = "bands"
    stage: str | None = None
    max_damaged_share: float = 0.001

    def __post_init__(self) -> None:
        _fraction("data.max_damaged_share", self.max_damaged_share)
        _at_least("data.batch_size", self.batch_size, 1)
        _require(self.crop is None or self.crop >= 1, "data.crop", self.crop, "at least 1, or null")
        _at_least("data.threads", self.threads, 0)
        _at_least("data.prefetch", self.prefetch, 1)
        window = self.shuffle_window
        _require(window is None or window >= 2, "data.shuffle_window", window, "at least 2, or null")
        _require(_is_stage(self.stage), "data.stage", self.stage, "null, auto or an absolute path")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of the training samples, drawn anew for each sample and epoch.

    Attributes:
        flip: mirror half of the samples.
        rotate90: turn by a random multiple of 90 degrees; with `flip`, all eight symmetries.
        scale: samples are enlarged by a factor drawn between 1 / (1 + scale) and 1 + scale.
        rotate: samples are turned by an angle drawn between -rotate and rotate degrees.
        brightness: half-width of a shift added to all bands, in standard deviations of each band.
        contrast: all bands are multiplied by a factor between 1 - contrast and 1 + contrast.
        band_gain: like contrast, drawn for each band by itself.
    """

    flip: bool = True
    rotate90: bool = True
    scale: float = 0.0
    rotate: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    band_gain: float = 0.0

    def __post_init__(self) -> None:
        _at_least("augment.scale", self.scale, 0)
        _require(0 <= self.rotate <= 180, "augment.rotate", self.rotate, "0 to 180 degrees")
        _at_least("augment.brightness", self.brightness, 0)
        _fraction("augment.contrast", self.contrast, below_one=True)
        _fraction("augment.band_gain", self.band_gain, below_one=True)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. The numbers of bands and classes come from the data set.

    Attributes:
        base_channels: channels of the first level; each deeper level has twice as many.
        depth: how often the resolution is halved.
        convolution: `same` keeps the size; `valid` is the paper's, without padding.
        up: `transposed` convolutions as in the paper, or `bilinear` up-sampling and a 1x1 convolution.
        norm: normalisation after each convolution.
        dropout: probability at the bottom of the U.
        encoder: null for the UNet's own; else the name of a timm model (needs the extra `encoders`).
        encoder_weights: local safetensors file of that timm model; null starts from random weights.
    """

    base_channels: int = 64
    depth: int = 4
    convolution: Literal["same", "valid"] = "same"
    up: Literal["transposed", "bilinear"] = "transposed"
    norm: Literal["batch", "group", "none"] = "batch"
    dropout: float = 0.0
    encoder: str | None = None
    encoder_weights: str | None = None

    def __post_init__(self) -> None:
        _at_least("model.base_channels", self.base_channels, 1)
        _require(1 <= self.depth <= 8, "model.depth", self.depth, "1 to 8")
        _fraction("model.dropout", self.dropout, below_one=True)
        if self.encoder_weights is not None and self.encoder is None:
            raise ConfigurationError("model.encoder_weights is set, but model.encoder is null")
        if self.encoder is not None and self.convolution == "valid":
            raise ConfigurationError("model.convolution `valid` is for the UNet's own encoder only")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Cross-entropy on label sets plus soft Dice.

    Attributes:
        dice_weight: weight of the Dice part; the cross-entropy has weight 1.
        class_weights: `none`, or weights ~ frequency ** -0.5 (`sqrt`) or ** -1 (`inverse`) from the
            data set's pixel counts.
        max_class_weight: no class weighs more than this many times the lightest.
    """

    dice_weight: float = 1.0
    class_weights: Literal["none", "sqrt", "inverse"] = "sqrt"
    max_class_weight: float = 20.0

    def __post_init__(self) -> None:
        _at_least("loss.dice_weight", self.dice_weight, 0)
        _at_least("loss.max_class_weight", self.max_class_weight, 1)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How gradients change weights.

    Attributes:
        name: `adamw` or `sgd` (with Nesterov momentum where momentum > 0).
        lr: peak learning rate, after the warm-up.
        weight_decay: decoupled for AdamW; never applied to biases and normalisation.
        beta1: AdamW's decay of the first moment.
        beta2: AdamW's decay of the second moment.
        momentum: SGD's momentum.
        clip_norm: gradients are scaled down to this L2 norm; null never clips.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    momentum: float = 0.9
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        _positive("optimizer.lr", self.lr)
        _at_least("optimizer.weight_decay", self.weight_decay, 0)
        _fraction("optimizer.beta1", self.beta1, below_one=True)
        _fraction("optimizer.beta2", self.beta2, below_one=True)
        _fraction("optimizer.momentum", self.momentum, below_one=True)
        _positive("optimizer.clip_norm", self.clip_norm)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the steps: a linear warm-up, then a decay.

    Attributes:
        name: shape of the decay.
        warmup: share of all steps that the warm-up takes.
        final: learning rate at the end of a decay, as a share of the peak.
        power: exponent of the polynomial decay.
    """

    name: Literal["cosine", "polynomial", "constant"] = "cosine"
    warmup: float = 0.05
    final: float = 0.0
    power: float = 0.9

    def __post_init__(self) -> None:
        _fraction("schedule.warmup", self.warmup)
        _fraction("schedule.final", self.final)
        _positive("schedule.power", self.power)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The loop: how long, how precise, and what is saved when.

    Attributes:
        epochs: passes over the training split.
        max_steps: stop after this many optimiser steps, even in the middle of an epoch.
        precision: `bf16` computes convolutions in bfloat16 and keeps weights in fp32.
        deterministic: only kernels that give the same bits every time.
        channels_last: NHWC memory layout, faster for convolutions nearly everywhere.
        micro_batch_size: most samples that a rank pushes through the network at once; a larger share
            of the batch is accumulated. null: no limit.
        sync_batchnorm: BatchNorm statistics over all ranks (GPU only).
        compile: let torch.compile fuse kernels; the first step then takes long (needs a C++ compiler).
        gradient_compression: type that gradients travel between ranks in; `none` is float32.
        invariant: the same bits of all weights on any number of ranks: the gradients of micro-batches,
            which must have a size then, are added in one order. On CPUs each rank then computes with
            one thread.
        ema_decay: decay of the moving average of the weights that is evaluated and saved beside
            them; 0 switches it off.
        max_nonfinite_steps: stop after this many steps in a row whose loss is not finite.
        evaluate_every_epochs: evaluate, and save, after every N-th epoch and at the end; 0: only then.
        checkpoint_every_epochs: save after every N-th epoch; 0: only at the end and when stopped.
        checkpoint_every_steps: save also every N steps.
        checkpoint_every_minutes: save also when this much time has passed since the last save.
        save_patience_minutes: how long a run goes on whose disk refuses its checkpoints or logs (full,
            over quota, not answering): it tries again all the time, says so, and then ends with exit
            code 1; 0 ends it at the first refusal.
        stall_minutes: end the attempt with exit code 1, to be tried again, when a rank has been at one
            thing for so long (a batch, a collective, the disk) without getting on; the log names the
            rank and has its stack. null: never.
        keep_last: how many of the newest checkpoints are kept (the best is always kept).
        keep_every: keep every N-th epoch's checkpoint for good; 0: none.
    """

    epochs: int = 30
    max_steps: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    deterministic: bool = True
    channels_last: bool = True
    micro_batch_size: int | None = None
    sync_batchnorm: bool = False
    compile: bool = False
    gradient_compression: Literal["none", "bf16", "fp16"] = "none"
    invariant: bool = False
    ema_decay: float = 0.0
    max_nonfinite_steps: int = 5
    evaluate_every_epochs: int = 1
    checkpoint_every_epochs: int = 1
    checkpoint_every_steps: int | None = None
    checkpoint_every_minutes: float | None = None
    save_patience_minutes: float = 15.0
    stall_minutes: float | None = 15.0
    keep_last: int = 3
    keep_every: int = 0

    def __post_init__(self) -> None:
        _at_least("training.epochs", self.epochs, 1)
        _positive("training.max_steps", self.max_steps)
        _positive("training.micro_batch_size", self.micro_batch_size)
        _fraction("training.ema_decay", self.ema_decay, below_one=True)
        _at_least("training.max_nonfinite_steps", self.max_nonfinite_steps, 1)
        _at_least("training.evaluate_every_epochs", self.evaluate_every_epochs, 0)
        _at_least("training.checkpoint_every_epochs", self.checkpoint_every_epochs, 0)
        _positive("training.checkpoint_every_steps", self.checkpoint_every_steps)
        _positive("training.checkpoint_every_minutes", self.checkpoint_every_minutes)
        _at_least("training.save_patience_minutes", self.save_patience_minutes, 0)
        _positive("training.stall_minutes", self.stall_minutes)
        _at_least("training.keep_last", self.keep_last, 1)
        _at_least("training.keep_every", self.keep_every, 0)
        if self.invariant:
            self._check_invariant()

    def _check_invariant(self) -> None:
        if self.micro_batch_size is None:
            raise ConfigurationError("training.invariant needs training.micro_batch_size")
        if not self.deterministic:
            raise ConfigurationError("training.invariant needs training.deterministic")
        if self.sync_batchnorm:
            raise ConfigurationError(
                "training.sync_batchnorm depends on the number of ranks: training.invariant forbids it"
            )
        if self.gradient_compression != "none":
            raise ConfigurationError(
                "training.gradient_compression rounds what ranks send: training.invariant forbids it"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How the validation split is scored.

    Attributes:
        batch_size: tiles in one forward pass of one rank.
    """

    batch_size: int = 8

    def __post_init__(self) -> None:
        _at_least("evaluation.batch_size", self.batch_size, 1)


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What a run tells while it runs.

    Attributes:
        tensorboard: write TensorBoard event files.
        log_every_steps: steps between two lines, two points of the curves, two rows of metrics.jsonl.
        log_samples: write log/samples-RANK.jsonl with the epoch, step and keys of every batch.
        images: validation tiles that are drawn in TensorBoard at each evaluation, always the same.
        worst_tiles: validation tiles of each class with the lowest IoU, drawn too, and listed in
            metrics.jsonl with as many of the best.
        pr_curves: draw precision over recall of each class in TensorBoard at each evaluation.
        histograms: draw histograms of all weights and their gradients in TensorBoard after each epoch,
            which takes seconds for large networks.
    """

    tensorboard: bool = True
    log_every_steps: int = 10
    log_samples: bool = False
    images: int = 4
    worst_tiles: int = 1
    pr_curves: bool = True
    histograms: bool = False

    def __post_init__(self) -> None:
        _at_least("monitor.log_every_steps", self.log_every_steps, 1)
        _at_least("monitor.images", self.images, 0)
        _require(0 <= self.worst_tiles <= 20, "monitor.worst_tiles", self.worst_tiles, "from 0 to 20")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides what a run computes.

    Attributes:
        seed: of the weights, the order of the samples and their augmentation.
        data: which data, and how it reaches the device.
        augment: random changes of the training samples.
        model: the network.
        loss: what is minimised.
        optimizer: how gradients change weights.
        schedule: the learning rate over the steps.
        training: how long, how precise, what is saved when.
        evaluation: how the validation split is scored.
        monitor: what a run tells while it runs.
    """

    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**63, "seed", self.seed, "between 0 and 2**63 - 1")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dict, as it is written to config.yaml."""
        return dataclasses.asdict(self)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` → `{"a.b": 1}`: keys as users write them on the command line."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
