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

Normalisation = Literal[
    "bands", "range", "tile", "field", "bands+tile", "range+tile", "bands+field", "range+field"
]

_INDICES = ("ndvi", "ndwi", "ndre")  # of agrivision.data.indices, which a test compares


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
        crop_start: side of the crops of the first epoch, from where they grow to `crop` in equal steps
            of whole multiples of what the network divides by; null: `crop` from the beginning.
        crop_growth: share of the epochs that the growth takes, at least one epoch.
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
            which keeps the ratios between bands that indices such as NDVI are made of; `tile` gives
            each channel, indices included, zero mean and unit variance within each tile, or window of
            a scene; `field` within the tile's field, or the scene, whatever its light and season. Two
            with a plus between, such as `range+field`, give the network all channels in both ways.
        indices: spectral indices that follow the bands as further channels of the network, with commas
            between: `ndvi`, `ndwi`, `ndre`.
        rare_sampling: classes that are in a smaller share of the training tiles than this are rare, and
            their tiles come more than once an epoch, by the square root of how rare they are; 0: never.
        rare_crops: share of the samples whose crop is placed upon a pixel of one of the tile's classes,
            a rare one rather than a common one; the others are cut anywhere.
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
    crop_start: int | None = None
    crop_growth: float = 0.5
    threads: int = 2
    prefetch: int = 2
    decoder: Literal["cpu", "gpu"] = "cpu"
    shuffle_window: int | None = None
    train_split: str = "train"
    val_split: str = "val"
    normalisation: Normalisation = "bands"
    indices: str = ""
    rare_sampling: float = 0.0
    rare_crops: float = 0.0
    stage: str | None = None
    max_damaged_share: float = 0.001

    def __post_init__(self) -> None:
        _fraction("data.max_damaged_share", self.max_damaged_share)
        _fraction("data.rare_sampling", self.rare_sampling)
        _fraction("data.rare_crops", self.rare_crops)
        if self.rare_crops and self.crop is None:
            raise ConfigurationError("data.rare_crops places crops, but data.crop is null")
        known = all(name in _INDICES for name in self.index_names)
        once = len(set(self.index_names)) == len(self.index_names)
        _require(known and once, "data.indices", self.indices, f"of {', '.join(_INDICES)}, each once")
        _at_least("data.batch_size", self.batch_size, 1)
        _require(self.crop is None or self.crop >= 1, "data.crop", self.crop, "at least 1, or null")
        _require(0 < self.crop_growth <= 1, "data.crop_growth", self.crop_growth, "above 0, at most 1")
        start = self.crop_start
        if start is not None and not 1 <= start < (self.crop or 0):
            raise ConfigurationError(f"data.crop_start is {start}: it must be below data.crop")
        _at_least("data.threads", self.threads, 0)
        _at_least("data.prefetch", self.prefetch, 1)
        window = self.shuffle_window
        _require(window is None or window >= 2, "data.shuffle_window", window, "at least 2, or null")
        _require(_is_stage(self.stage), "data.stage", self.stage, "null, auto or an absolute path")

    @property
    def index_names(self) -> tuple[str, ...]:
        """The indices, one by one."""
        return tuple(name.strip() for name in self.indices.split(",") if name.strip())


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of the training samples, drawn anew for each sample and epoch.

    Attributes:
        flip: mirror half of the samples.
        rotate90: turn by a random multiple of 90 degrees; with `flip`, all eight symmetries.
        scale: samples are enlarged by a factor drawn between 1 / (1 + scale) and 1 + scale.
        rotate: samples are turned by an angle drawn between -rotate and rotate degrees.
        elastic: samples are bent: standard deviation in pixels by which the points of a grid of 3 x 3
            are moved, with cubic interpolation between them; 10 in the UNet's paper, for crops of 512.
        brightness: half-width of a shift added to all bands, in standard deviations of each band.
        contrast: all bands are multiplied by a factor between 1 - contrast and 1 + contrast.
        band_gain: like contrast, drawn for each band by itself.
        band_shift: like brightness, drawn for each band by itself.
    """

    flip: bool = True
    rotate90: bool = True
    scale: float = 0.0
    rotate: float = 0.0
    elastic: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    band_gain: float = 0.0
    band_shift: float = 0.0

    def __post_init__(self) -> None:
        _at_least("augment.scale", self.scale, 0)
        _require(0 <= self.rotate <= 180, "augment.rotate", self.rotate, "0 to 180 degrees")
        _at_least("augment.elastic", self.elastic, 0)
        _at_least("augment.brightness", self.brightness, 0)
        _at_least("augment.band_shift", self.band_shift, 0)
        _fraction("augment.contrast", self.contrast, below_one=True)
        _fraction("augment.band_gain", self.band_gain, below_one=True)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. The numbers of bands and classes come from the data set.

    Attributes:
        base_channels: channels of the first level; each deeper level has twice as many.
        depth: how often the resolution is halved.
        convolution: `same` keeps the size; `valid` is the paper's, without padding.
        up: `transposed` convolutions as in the paper, `bilinear` up-sampling and a 1x1 convolution, or
            `pixel_shuffle` after a 3x3 convolution.
        norm: normalisation after each convolution.
        block: `plain` pairs of convolutions as in the paper, or `residual` ones with a shortcut; with
            an encoder, those of the way up.
        attention: `gate` weighs what comes across by what is seen below; `none` takes all of it.
        deep_supervision: how many coarser levels give logits, too, while training: of 1/2, 1/4, … of
            the resolution. Predictions cost the same.
        dropout: probability at the bottom of the U.
        encoder: null for the UNet's own; else the name of a timm model (needs the extra `encoders`).
        encoder_weights: local safetensors file of that timm model; null starts from random weights.
    """

    base_channels: int = 64
    depth: int = 4
    convolution: Literal["same", "valid"] = "same"
    up: Literal["transposed", "bilinear", "pixel_shuffle"] = "transposed"
    norm: Literal["batch", "group", "none"] = "batch"
    block: Literal["plain", "residual"] = "plain"
    attention: Literal["none", "gate"] = "none"
    deep_supervision: int = 0
    dropout: float = 0.0
    encoder: str | None = None
    encoder_weights: str | None = None

    def __post_init__(self) -> None:
        _at_least("model.base_channels", self.base_channels, 1)
        _require(1 <= self.depth <= 8, "model.depth", self.depth, "1 to 8")
        _fraction("model.dropout", self.dropout, below_one=True)
        _at_least("model.deep_supervision", self.deep_supervision, 0)
        self._check_supervision()
        if self.encoder_weights is not None and self.encoder is None:
            raise ConfigurationError("model.encoder_weights is set, but model.encoder is null")
        if self.encoder is not None and self.convolution == "valid":
            raise ConfigurationError("model.convolution `valid` is for the UNet's own encoder only")

    def _check_supervision(self) -> None:
        """How many levels an encoder has is seen where it is built."""
        if self.deep_supervision and self.convolution == "valid":
            raise ConfigurationError(
                "model.deep_supervision needs levels of half the size: not model.convolution `valid`"
            )
        if self.encoder is None and self.deep_supervision >= max(1, self.depth):
            raise ConfigurationError(
                f"model.deep_supervision is {self.deep_supervision}: a UNet of model.depth {self.depth}"
                f" has {self.depth - 1} coarser levels on its way up"
            )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Cross-entropy on label sets plus soft Dice, and what may be added.

    Attributes:
        dice_weight: weight of the Dice part; the cross-entropy has weight 1.
        class_weights: `none`, or weights ~ frequency ** -0.5 (`sqrt`) or ** -1 (`inverse`) from the
            data set's pixel counts, or ~ the effective number of tiles ** -1 (`effective`), which lets
            all classes that are frequent enough weigh the same.
        max_class_weight: no class weighs more than this many times the lightest.
        effective_beta: of `effective`: n tiles full of a class count as (1 - beta ** n) / (1 - beta),
            so that more than 1 / (1 - beta) of them add little.
        focal_gamma: the cross-entropy of a pixel is multiplied by (1 - p) ** gamma, p the probability
            of its true labels: easy pixels count less. 2 in the paper; 0 is plain cross-entropy.
        tversky_alpha: weight of false positives in the Dice part, which is Tversky's index then.
        tversky_beta: weight of false negatives in it, more than `tversky_alpha` for recall; with 0.5
            for both it is Dice.
        tversky_gamma: the part is taken to the power of 1 / gamma; 4 / 3 in the paper on focal Tversky.
        lovasz_weight: weight of the Lovász-softmax part, 1 - IoU made continuous; 0 leaves it out.
        pnc_weight: weight of MSCG-Net's balance of positive and negative classes; 0 leaves it out.
        border_weight: the cross-entropy counts up to 1 + border_weight times where label sets meet; 10
            in the UNet's paper.
        border_sigma: standard deviation in pixels of the Gaussian of the distance to a border by which
            `border_weight` and `border_smoothing` fall off.
        border_smoothing: share of the target that the labels of the neighbourhood get at a border.
        deep_supervision_decay: weight of each coarser level of a network with `model.deep_supervision`
            relative to the one before.
    """

    dice_weight: float = 1.0
    class_weights: Literal["none", "sqrt", "inverse", "effective"] = "sqrt"
    max_class_weight: float = 20.0
    effective_beta: float = 0.999
    focal_gamma: float = 0.0
    tversky_alpha: float = 0.5
    tversky_beta: float = 0.5
    tversky_gamma: float = 1.0
    lovasz_weight: float = 0.0
    pnc_weight: float = 0.0
    border_weight: float = 0.0
    border_sigma: float = 5.0
    border_smoothing: float = 0.0
    deep_supervision_decay: float = 0.5

    def __post_init__(self) -> None:
        _at_least("loss.dice_weight", self.dice_weight, 0)
        _at_least("loss.max_class_weight", self.max_class_weight, 1)
        _fraction("loss.effective_beta", self.effective_beta, below_one=True)
        _at_least("loss.focal_gamma", self.focal_gamma, 0)
        _at_least("loss.tversky_alpha", self.tversky_alpha, 0)
        _at_least("loss.tversky_beta", self.tversky_beta, 0)
        _at_least("loss.tversky_gamma", self.tversky_gamma, 1)
        _at_least("loss.lovasz_weight", self.lovasz_weight, 0)
        _at_least("loss.pnc_weight", self.pnc_weight, 0)
        _at_least("loss.border_weight", self.border_weight, 0)
        _require(0 < self.border_sigma <= 100, "loss.border_sigma", self.border_sigma, "above 0 to 100")
        _fraction("loss.border_smoothing", self.border_smoothing, below_one=True)
        _fraction("loss.deep_supervision_decay", self.deep_supervision_decay)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How gradients change weights.

    Attributes:
        name: `adamw` or `sgd` (with Nesterov momentum where momentum > 0).
        lr: peak learning rate, after the warm-up.
        lr_scaling: how the peak follows `data.batch_size`: multiplied by (batch size / reference) to
            the power of 0 (`none`), 0.5 (`sqrt`, for AdamW) or 1 (`linear`, for SGD).
        reference_batch: the batch size at which `lr` is the peak; needed for a scaling.
        encoder_lr: share of the learning rate that the parameters of `model.encoder` get; null is all
            of it. 0.1 is usual for weights that have been trained before.
        weight_decay: decoupled for AdamW; never applied to biases and normalisation.
        beta1: AdamW's decay of the first moment.
        beta2: AdamW's decay of the second moment.
        momentum: SGD's momentum.
        clip_norm: gradients are scaled down to this L2 norm; null never clips.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"
    reference_batch: int | None = None
    encoder_lr: float | None = None
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    momentum: float = 0.9
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        _positive("optimizer.lr", self.lr)
        _positive("optimizer.reference_batch", self.reference_batch)
        _positive("optimizer.encoder_lr", self.encoder_lr)
        if (self.lr_scaling == "none") != (self.reference_batch is None):
            raise ConfigurationError(
                "optimizer.lr_scaling and optimizer.reference_batch need one another: give the batch"
                " size at which optimizer.lr is right, or leave both out"
            )
        _at_least("optimizer.weight_decay", self.weight_decay, 0)
        _fraction("optimizer.beta1", self.beta1, below_one=True)
        _fraction("optimizer.beta2", self.beta2, below_one=True)
        _fraction("optimizer.momentum", self.momentum, below_one=True)
        _positive("optimizer.clip_norm", self.clip_norm)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the steps: a linear warm-up, then a decay.

    Attributes:
        name: shape of the decay. `trapezoid` stays at the peak until its decay begins.
        warmup: share of all steps that the warm-up takes.
        decay: share of all steps that the decay of `trapezoid` takes; those after the warm-up at most.
        final: learning rate at the end of a decay, as a share of the peak.
        power: exponent of the polynomial decay.
    """

    name: Literal["cosine", "polynomial", "linear", "trapezoid", "constant"] = "cosine"
    warmup: float = 0.05
    decay: float = 0.2
    final: float = 0.0
    power: float = 0.9

    def __post_init__(self) -> None:
        _fraction("schedule.warmup", self.warmup)
        _fraction("schedule.decay", self.decay)
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
        tail_average: share of the steps, the last ones, whose weights are averaged evenly; the average
            is evaluated and saved like that of `ema_decay`, which excludes it. 0 switches it off.
        patience: end the run when this many evaluations in a row have found no better mIoU; null never.
        min_improvement: by how much a mIoU, 0 to 1, must exceed the best before it to be better.
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
    tail_average: float = 0.0
    patience: int | None = None
    min_improvement: float = 0.0
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
        _fraction("training.tail_average", self.tail_average)
        if self.ema_decay and self.tail_average:
            raise ConfigurationError(
                "training.ema_decay and training.tail_average are two averages of the weights: set one"
                " of them to 0"
            )
        self._check_patience()
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

    def _check_patience(self) -> None:
        _positive("training.patience", self.patience)
        _fraction("training.min_improvement", self.min_improvement)
        if self.patience is None and self.min_improvement:
            raise ConfigurationError("training.min_improvement is for training.patience, which is null")
        if self.patience is not None and self.evaluate_every_epochs == 0:
            raise ConfigurationError(
                "training.patience counts evaluations: training.evaluate_every_epochs must not be 0"
            )

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
        if self.optimizer.encoder_lr is not None and self.model.encoder is None:
            raise ConfigurationError("optimizer.encoder_lr is set, but model.encoder is null")

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
