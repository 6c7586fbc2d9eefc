"""The UNet of Ronneberger, Fischer and Brox (2015), and the parts that other decoders share.

O. Ronneberger, P. Fischer, T. Brox: U-Net: Convolutional Networks for Biomedical Image Segmentation,
MICCAI 2015, arXiv:1505.04597.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Convolution = Literal["same", "valid"]
UpSampling = Literal["transposed", "bilinear"]
Norm = Literal["batch", "group", "none"]

_MOST_GROUPS = 32  # Wu and He 2018, Group Normalization
_LEAST_GROUP = 4  # channels: a group of one at the bottom of a small image would normalise itself away


class UNet(nn.Module):
    """A U of two 3x3 convolutions a level, max-pooling on the way down and skips on the way up.

    Args:
        bands: of the images.
        classes: of the logits.
        base_channels: channels of the first level; each deeper level has twice as many.
        depth: how often the resolution is halved.
        convolution: `same` pads with zeros and keeps the size; `valid` is the paper's: no padding,
            each output pixel sees only pixels of the image, and the output is smaller than the input.
        up: `transposed` 2x2 convolutions as in the paper, or `bilinear` up-sampling with a 1x1
            convolution.
        norm: after each 3x3 convolution; the paper has none.
        dropout: probability at the end of the contracting path.
    """

    def __init__(
        self,
        bands: int,
        classes: int,
        *,
        base_channels: int = 64,
        depth: int = 4,
        convolution: Convolution = "same",
        up: UpSampling = "transposed",
        norm: Norm = "batch",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.depth = depth
        self.convolution: Convolution = convolution
        channels = [base_channels * 2**level for level in range(depth + 1)]
        self.contract = nn.ModuleList(
            convolution_pair(before, after, convolution=convolution, norm=norm)
            for before, after in zip([bands, *channels], channels, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(dropout)
        self.expand = nn.ModuleList(
            Expansion(deep, wide, wide, convolution=convolution, up=up, norm=norm)
            for wide, deep in zip(channels[-2::-1], channels[:0:-1], strict=True)
        )
        self.head = nn.Conv2d(base_channels, classes, 1)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every class.

        Args:
            images: float (B, bands, H, W).

        Returns:
            (B, classes, H', W'): H' = H and W' = W for `same`; for `valid` they are smaller by
            `margin` and centred, for example 388 for 572 at depth 4.

        Raises:
            ValueError: the network cannot halve that height or width `depth` times.
        """
        require_fit(images, self.input_size, self.margin)
        skips: list[Tensor] = []
        features = self.contract[0](images)
        for level in self.contract[1:]:
            skips.append(features)
            features = level(self.pool(features))
        features = self.dropout(features)
        for expansion in self.expand:
            features = expansion(features, skips.pop())
        logits: Tensor = self.head(features)
        return logits

    @property
    def margin(self) -> int:
        """By how many pixels the logits are smaller than the image, both sides together."""
        return 0 if self.convolution == "same" else 12 * 2**self.depth - 8

    def input_size(self, output: int) -> int:
        """The smallest side in pixels of an image whose logits, centred in it, have >= `output`."""
        scale: int = 2**self.depth
        if self.convolution == "same":
            return -(-output // scale) * scale
        # A bottom that enters with b pixels leaves 2**depth * (b - 8) + 4 of the image's
        # 2**depth * (b + 4) - 4. One pixel of output asks for b > 4, of which something is left. Whole
        # numbers alone: an exported graph does these sums, too.
        bottom = 8 - (4 - output) // scale
        return scale * (bottom + 4) - 4


class Expansion(nn.Module):
    """One level up: twice the resolution, joined with what the way down had seen there.

    Args:
        deep: channels of the features that come from below.
        skip: channels of the features that come across; 0 where there are none.
        channels: of the output.
        convolution: as in `UNet`.
        up: as in `UNet`.
        norm: as in `UNet`.
    """

    def __init__(
        self,
        deep: int,
        skip: int,
        channels: int,
        *,
        convolution: Convolution = "same",
        up: UpSampling,
        norm: Norm,
    ) -> None:
        super().__init__()
        self.up = (
            nn.ConvTranspose2d(deep, channels, 2, 2) if up == "transposed" else Bilinear(deep, channels)
        )
        self.merge = convolution_pair(channels + skip, channels, convolution=convolution, norm=norm)

    def forward(self, deep: Tensor, skip: Tensor | None) -> Tensor:
        """Features (B, channels, 2h, 2w) from (B, deep, h, w); `skip` may be larger than 2h x 2w."""
        features: Tensor = self.up(deep)
        if skip is not None:
            height, width = features.shape[-2:]
            features = torch.cat([centre(skip, height, width), features], dim=1)
        merged: Tensor = self.merge(features)
        return merged


class Bilinear(nn.Module):
    """A 1x1 convolution, then bilinear up-sampling by two.

    Both are linear and the weights of the interpolation add up to one, so their order does not change
    the result; this one costs a quarter.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(before, after, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, after, 2H, 2W) from (B, before, H, W)."""
        return double(self.project(features))


def double(images: Tensor) -> Tensor:
    """Bilinear up-sampling by two: (B, C, H, W) to (B, C, 2H, 2W).

    Equal to `F.interpolate(scale_factor=2, mode="bilinear", align_corners=False)`, whose backward has
    no deterministic kernel on CUDA; slices and sums have.
    """
    return _double_along(_double_along(images, 2), 3)


def _double_along(images: Tensor, dim: int) -> Tensor:
    """The centres of the new pixels lie a quarter of an old pixel before and after each old centre."""
    size = images.shape[dim]
    first, last = images.narrow(dim, 0, 1), images.narrow(dim, size - 1, 1)
    before = torch.cat([first, images.narrow(dim, 0, size - 1)], dim)
    after = torch.cat([images.narrow(dim, 1, size - 1), last], dim)
    pair = torch.stack([torch.lerp(images, before, 0.25), torch.lerp(images, after, 0.25)], dim + 1)
    return pair.flatten(dim, dim + 1)


def convolution_pair(before: int, after: int, *, convolution: Convolution, norm: Norm) -> nn.Sequential:
    """Two times 3x3 convolution, normalisation, ReLU: from `before` to `after` channels."""
    layers: list[nn.Module] = []
    for channels in (before, after):
        # A normalisation has its own shift; a bias before it would be a parameter without effect.
        padding = 1 if convolution == "same" else 0
        layers.append(nn.Conv2d(channels, after, 3, padding=padding, bias=norm == "none"))
        if norm != "none":
            layers.append(nn.BatchNorm2d(after) if norm == "batch" else _group_norm(after))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def _group_norm(channels: int) -> nn.GroupNorm:
    most = min(_MOST_GROUPS, max(1, channels // _LEAST_GROUP))
    return nn.GroupNorm(max(g for g in range(1, most + 1) if channels % g == 0), channels)


def initialise(module: nn.Module) -> None:
    """Draw weights after He et al. 2015 (arXiv:1502.01852) for the convolutions inside `module`.

    A 3x3 convolution feeds a ReLU and gets the variance 2 / fan-in that makes up for it; the others
    feed none and get 1 / fan-in, so that features keep their magnitude from level to level.
    """
    for layer in module.modules():
        if isinstance(layer, nn.ConvTranspose2d):
            # Kernel and stride are equal: an output pixel sees one tap, so the fan-in is the channels.
            nn.init.normal_(layer.weight, std=layer.in_channels**-0.5)
        elif isinstance(layer, nn.Conv2d):
            nonlinearity: Literal["linear", "relu"] = (
                "linear" if layer.kernel_size == (1, 1) else "relu"
            )
            nn.init.kaiming_normal_(layer.weight, nonlinearity=nonlinearity)
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


def centre(images: Tensor, height: int, width: int) -> Tensor:
    """The middle of the last two dimensions: (…, height, width); a view."""
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


def require_fit(images: Tensor, input_size: Callable[[int], int], margin: int) -> None:
    """Refuse images whose height or width a network cannot halve often enough.

    Args:
        images: (…, H, W).
        input_size: as in `UNet`.
        margin: as in `UNet`.

    Raises:
        ValueError: a side does not fit; the message names the next that does.
    """
    height, width = images.shape[-2:]
    fits = [input_size(max(1, side - margin)) for side in (height, width)]
    if fits != [height, width]:
        raise ValueError(
            f"images of {height} x {width} pixels do not fit the network: {fits[0]} x {fits[1]} would"
        )
