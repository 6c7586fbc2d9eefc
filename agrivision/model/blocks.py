"""What every level of a U is made of: two convolutions, and how they begin."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Convolution = Literal["same", "valid"]
Norm = Literal["batch", "group", "none"]
Block = Literal["plain", "residual"]

_MOST_GROUPS = 32  # Wu and He 2018, Group Normalization
_LEAST_GROUP = 4  # channels: a group of one at the bottom of a small image would normalise itself away


class Part(nn.Module):
    """A module that begins otherwise than its convolutions by themselves would."""

    def begin(self) -> None:
        """Change the weights that `initialise` has just drawn."""
        raise NotImplementedError


class Residual(Part):
    """Two convolutions that learn what to add to their input (He et al. 2016, arXiv:1512.03385).

    As in the deep residual U-Net of Zhang, Liu and Wang 2018 (arXiv:1711.10684), a 1x1 convolution
    stands in the shortcut where the number of channels changes; the order of normalisation and ReLU is
    that of `convolution_pair`, so that both kinds of block fold into bare convolutions.

    Args:
        before: channels of the input.
        after: channels of the output.
        convolution: as in `UNet`; `valid` takes two pixels off each edge of the shortcut, too.
        norm: as in `UNet`.
    """

    def __init__(self, before: int, after: int, *, convolution: Convolution, norm: Norm) -> None:
        super().__init__()
        self.pair = convolution_pair(before, after, convolution=convolution, norm=norm)[:-1]
        projection = [nn.Conv2d(before, after, 1, bias=norm == "none"), *_normalisation(after, norm)]
        self.shortcut = nn.Sequential(*projection) if before != after else nn.Identity()
        self.activation = nn.ReLU(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        """(B, after, H', W') from (B, before, H, W), as from `convolution_pair`."""
        change = self.pair(features)
        kept = self.shortcut(centre(features, *change.shape[-2:]))
        activated: Tensor = self.activation(change + kept)
        return activated

    def begin(self) -> None:
        """Without a normalisation, halve the variance of the change: two things are added up."""
        last = self.pair[-1]
        if isinstance(last, nn.Conv2d):
            with torch.no_grad():
                last.weight.mul_(0.5**0.5)


def make_block(
    before: int, after: int, *, block: Block, convolution: Convolution, norm: Norm
) -> nn.Module:
    """What a level does: from `before` to `after` channels."""
    make = Residual if block == "residual" else convolution_pair
    return make(before, after, convolution=convolution, norm=norm)


def convolution_pair(before: int, after: int, *, convolution: Convolution, norm: Norm) -> nn.Sequential:
    """Two times 3x3 convolution, normalisation, ReLU: from `before` to `after` channels."""
    layers: list[nn.Module] = []
    for channels in (before, after):
        # A normalisation has its own shift; a bias before it would be a parameter without effect.
        padding = 1 if convolution == "same" else 0
        layers.append(nn.Conv2d(channels, after, 3, padding=padding, bias=norm == "none"))
        layers.extend(_normalisation(after, norm))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def _normalisation(channels: int, norm: Norm) -> list[nn.Module]:
    """One layer, or none."""
    if norm == "none":
        return []
    return [nn.BatchNorm2d(channels) if norm == "batch" else _group_norm(channels)]


def _group_norm(channels: int) -> nn.GroupNorm:
    most = min(_MOST_GROUPS, max(1, channels // _LEAST_GROUP))
    return nn.GroupNorm(max(g for g in range(1, most + 1) if channels % g == 0), channels)


def initialise(module: nn.Module) -> None:
    """Draw weights after He et al. 2015 (arXiv:1502.01852) for the convolutions inside `module`.

    A 3x3 convolution feeds a ReLU and gets the variance 2 / fan-in that makes up for it; the others
    feed none and get 1 / fan-in, so that features keep their magnitude from level to level. Each `Part`
    then has its own way.
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
    for part in module.modules():
        if isinstance(part, Part):
            part.begin()


def centre(images: Tensor, height: int, width: int) -> Tensor:
    """The middle of the last two dimensions: (…, height, width); a view."""
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]
