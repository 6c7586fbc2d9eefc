"""A UNet whose way down is a network of timm, with that network's weights from a local file."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from agrivision.errors import ConfigurationError
from agrivision.model.blocks import Block, Norm, initialise
from agrivision.model.expansion import (
    Attention,
    CoarseHeads,
    Expansion,
    Logits,
    UpSampling,
    together,
)
from agrivision.model.unet import require_fit

_SHOWN = 4  # keys of a weights file in an error
_RED, _GREEN, _BLUE = 0, 1, 2


class EncoderUNet(nn.Module):
    """The decoder of `UNet` over the features of a timm network.

    Args:
        bands: of the images; the first three are taken for red, green and blue, the fourth for
            near-infrared.
        classes: of the logits.
        encoder: name of a timm model, for example `resnet34`; any whose features get smaller by
            powers of two. One with windows of a fixed size takes images whose sides are whole multiples
            of the size that it was made for, and its `input_size` says so.
        weights: safetensors file with that model's weights for three bands, or for as many as here;
            None starts from random weights. Nothing is ever downloaded.
        base_channels: channels of the decoder at full resolution; each deeper level has twice as
            many, but no more than the encoder has there.
        up: as in `UNet`.
        norm: of the decoder, as in `UNet`.
        block: of the decoder, as in `UNet`.
        attention: as in `UNet`.
        dropout: probability at the bottom.
        deep_supervision: as in `UNet`.

    Raises:
        ConfigurationError: timm is not installed, has no such model or none that can be used here, or
            the weights do not fit; or there are fewer levels than `deep_supervision` asks for.
    """

    def __init__(
        self,
        bands: int,
        classes: int,
        *,
        encoder: str,
        weights: str | None = None,
        base_channels: int = 64,
        up: UpSampling = "transposed",
        norm: Norm = "batch",
        block: Block = "plain",
        attention: Attention = "none",
        dropout: float = 0.0,
        deep_supervision: int = 0,
    ) -> None:
        super().__init__()
        self.encoder, self.unit = create_encoder(encoder, bands)
        if weights is not None:
            _load(self.encoder, encoder, Path(weights), bands)
        # Some levels of some encoders have the same resolution: the last of them has seen most.
        reductions, widths = _levels(self.encoder)
        channels = dict(zip(reductions, widths, strict=True))
        self.levels = {reduction: level for level, reduction in enumerate(reductions)}
        self.reduction = max(reductions)
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.ModuleList()
        deep, widths = channels[self.reduction], list[int]()
        for scale in self._scales():
            skip = channels.get(scale, 0)
            wide = min(base_channels * scale, skip or base_channels * scale)
            expansion = Expansion(deep, skip, wide, up=up, norm=norm, block=block, attention=attention)
            self.decoder.append(expansion)
            widths.append(wide)
            deep = wide
        self.head = nn.Conv2d(deep, classes, 1)
        self.coarse = CoarseHeads(widths[-2::-1], classes, deep_supervision)
        for part in (self.decoder, self.head, self.coarse):
            initialise(part)

    def forward(self, images: Tensor) -> Logits:
        """Logits of every class at the images' resolution.

        Args:
            images: float (B, bands, H, W); H and W multiples of `unit`.

        Returns:
            (B, classes, H, W); with deep supervision, in training, a tuple as from `UNet`.

        Raises:
            ValueError: H or W is no such multiple.
        """
        require_fit(images, self.input_size, margin=0)
        levels = _features(self.encoder, images)
        features: Tensor = self.dropout(levels[self.levels[self.reduction]])
        coarse: list[Tensor] = []
        for scale, expansion in zip(self._scales(), self.decoder, strict=True):
            level = self.levels.get(scale)
            features = expansion(features, None if level is None else levels[level])
            coarse += self.coarse.of(scale.bit_length() - 1, features)
        return together(self.head(features), coarse)

    def input_size(self, output: int) -> int:
        """The smallest side in pixels of an image whose logits have >= `output`."""
        return -(-output // self.unit) * self.unit

    def _scales(self) -> list[int]:
        """Pixels of the image per pixel of each decoder level, from the deepest up: …, 4, 2, 1."""
        return [2**power for power in reversed(range(self.reduction.bit_length() - 1))]


def _features(encoder: nn.Module, images: Tensor) -> list[Tensor]:
    """Features of each level, (B, C, H / reduction, W / reduction)."""
    levels: list[Tensor] = encoder(images)
    if getattr(encoder, "output_fmt", "NCHW") == "NHWC":
        return [level.permute(0, 3, 1, 2) for level in levels]
    return levels


def _levels(encoder: nn.Module) -> tuple[list[int], list[int]]:
    """By level, what the resolution is divided by, and how many channels there are."""
    info: Any = encoder.feature_info
    return info.reduction(), info.channels()


def create_encoder(name: str, bands: int) -> tuple[nn.Module, int]:
    """A feature extractor with random weights, and what the sides of its images are multiples of.

    Raises:
        ConfigurationError: timm is not installed, or has no such model, or none that can be used here.
    """
    timm = _timm()
    if not timm.is_model(name):
        # timm also takes names that make it download: those are not in its list, and end here.
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=5, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ConfigurationError(f"model.encoder: timm has no model {name!r}{hint}")
    options, unit = _fitting(name, bands)
    encoder: nn.Module = timm.create_model(
        name, features_only=True, pretrained=False, in_chans=bands, **options
    )
    return encoder, unit


def _fitting(name: str, bands: int) -> tuple[dict[str, bool], int]:
    """The options with which a model takes images of most sizes, and what these are multiples of.

    Raises:
        ConfigurationError: there are none.
    """
    reason: Exception | None = None
    # Some models of a fixed size can be told to take any; others have weights for places in a window.
    for options, takes_any in (({}, True), ({"strict_img_size": False}, True), ({}, False)):
        try:
            with torch.device("meta"):
                encoder: nn.Module = _timm().create_model(
                    name, features_only=True, pretrained=False, in_chans=bands, **options
                )
                unit = max(_levels(encoder)[0]) if takes_any else _own_side(encoder)
                _try_out(encoder, bands, 2 * unit)
        except Exception as error:  # timm's models refuse in as many ways as there are models
            reason = reason or error
        else:
            return options, unit
    why = str(reason).partition("\n")[0]
    raise ConfigurationError(f"model.encoder: {name} cannot be a UNet's encoder ({why})") from reason


def list_encoders(pattern: str) -> Iterator[tuple[str, int]]:
    """The models of timm like a pattern that can be encoders, and what sides are multiples of.

    Args:
        pattern: as a shell takes it: `convnext*`; without a star, names that contain it.

    Raises:
        ConfigurationError: timm is not installed.
    """
    wanted = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    for name in fnmatch.filter(_timm().list_models(), wanted):
        try:
            yield name, _fitting(name, 3)[1]
        except ConfigurationError:
            continue


def _own_side(encoder: nn.Module) -> int:
    """The side of the images that a model with windows of a fixed size was made for.

    Raises:
        ValueError: it was made for any.
    """
    about: Any = encoder.default_cfg
    if not about["fixed_input_size"]:
        raise ValueError("its features of images of other sizes do not fit")
    return int(about["input_size"][-1])


def _timm() -> ModuleType:
    try:
        import timm  # noqa: PLC0415  an optional dependency
    except ImportError as error:
        raise ConfigurationError(
            f"model.encoder needs timm ({error}): pip install 'agrivision[encoders]'"
        ) from None
    module: ModuleType = timm
    return module


@torch.no_grad()
def _try_out(encoder: nn.Module, bands: int, side: int) -> None:
    """See for images of `side` pixels that the features are what the network says of them.

    Raises:
        ValueError: they are not, or not reduced by powers of two.
    """
    reductions, channels = _levels(encoder)
    if any(reduction & (reduction - 1) for reduction in reductions):
        raise ValueError(f"it reduces images by {reductions}, not by powers of two")
    levels = _features(encoder.eval(), torch.zeros(1, bands, side, side))
    found = [tuple(level.shape[1:]) for level in levels]
    wanted = [(c, side // r, side // r) for c, r in zip(channels, reductions, strict=True)]
    if found != wanted:
        raise ValueError(f"features of {side} x {side} pixels have the shapes {found}, not {wanted}")


def _load(encoder: nn.Module, name: str, path: Path, bands: int) -> None:
    """Fill the encoder from a weights file of the whole timm model, its classifier ignored."""
    given = _read(path)
    where = f"model.encoder_weights: {path}"
    with torch.device("meta"):
        whole: nn.Module = _timm().create_model(name, pretrained=False)
    known = {_canonical(key) for key in whole.state_dict()}
    unexpected = [key for key in given if _canonical(key) not in known]
    weights = {_canonical(key): weight for key, weight in given.items()}
    wanted = encoder.state_dict()
    # BatchNorm's count of batches is not in older files and has no effect.
    missing = [
        k for k in wanted if _canonical(k) not in weights and not k.endswith("num_batches_tracked")
    ]
    if missing or unexpected:
        parts = [_listed("missing", missing), _listed("unexpected", unexpected)]
        raise ConfigurationError(f"{where} does not fit {name}: {'; '.join(filter(None, parts))}")
    found = {key: weights.get(_canonical(key), value) for key, value in wanted.items()}
    found = {key: _widened(value, wanted[key].shape, bands) for key, value in found.items()}
    odd = [f"{key} {tuple(v.shape)}" for key, v in found.items() if v.shape != wanted[key].shape]
    if odd:
        raise ConfigurationError(f"{where} does not fit {name}: {_listed('of another shape', odd)}")
    encoder.load_state_dict(found)


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"model.encoder_weights: cannot read {path} ({error})") from None


def _canonical(key: str) -> str:
    """The same for a whole timm model and its feature extractor, which renames nested modules."""
    return key.removeprefix("model.").replace(".", "_")


def _listed(what: str, keys: Iterable[str]) -> str:
    keys = list(keys)
    if not keys:
        return ""
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"{what} {', '.join(keys[:_SHOWN])}{more}"


def _widened(weight: Tensor, shape: torch.Size, bands: int) -> Tensor:
    """The kernels of a stem for red, green and blue, made to take `bands` bands.

    Near-infrared starts from the red kernel, further bands from the mean of the three; with fewer than
    three bands, all start from the mean. Scaled by 3 / bands: bands are much alike, so the sum over
    them, and with it the activations, keeps its magnitude.
    """
    three = torch.Size([shape[0], 3, *shape[2:]]) if len(shape) == 4 else None
    if bands == 3 or weight.shape != three or shape[1] != bands:
        return weight
    mean = weight.mean(1)
    colours = [weight[:, _RED], weight[:, _GREEN], weight[:, _BLUE], weight[:, _RED]]
    kernels = (colours if bands > 3 else []) + [mean] * bands
    return torch.stack(kernels[:bands], dim=1) * (3 / bands)
