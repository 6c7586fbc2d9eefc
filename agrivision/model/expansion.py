"""The way up of a U: twice the resolution, joined with what the way down had seen there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from agrivision.errors import ConfigurationError
from agrivision.model.blocks import Block, Convolution, Norm, Part, centre, make_block

UpSampling = Literal["transposed", "bilinear", "pixel_shuffle"]
Attention = Literal["none", "gate"]
Logits = Tensor | tuple[Tensor, ...]

_OPEN = 3.0  # a gate begins with a sigmoid of this: 95 % of the features pass


class Expansion(nn.Module):
    """One level up.

    Args:
        deep: channels of the features that come from below.
        skip: channels of the features that come across; 0 where there are none.
        channels: of the output.
        convolution: as in `UNet`.
        up: as in `UNet`.
        norm: as in `UNet`.
        block: as in `UNet`.
        attention: as in `UNet`.
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
        block: Block = "plain",
        attention: Attention = "none",
    ) -> None:
        super().__init__()
        self.up = _up_sampling(deep, channels, up, convolution)
        self.gate = Gate(skip, deep) if attention == "gate" and skip else None
        self.merge = make_block(
            channels + skip, channels, block=block, convolution=convolution, norm=norm
        )

    def forward(self, deep: Tensor, skip: Tensor | None) -> Tensor:
        """Features (B, channels, 2h, 2w) from (B, deep, h, w); `skip` may be larger than 2h x 2w."""
        features: Tensor = self.up(deep)
        if skip is not None:
            height, width = features.shape[-2:]
            across = centre(skip, height, width)
            if self.gate is not None:
                across = self.gate(across, centre(deep, height // 2, width // 2))
            features = torch.cat([across, features], dim=1)
        merged: Tensor = self.merge(features)
        return merged


def lost(up: UpSampling) -> int:
    """Pixels by which one level up is smaller than twice its input, without padding, both sides."""
    return 8 if up == "pixel_shuffle" else 4


def _up_sampling(deep: int, channels: int, up: UpSampling, convolution: Convolution) -> nn.Module:
    if up == "transposed":
        return nn.ConvTranspose2d(deep, channels, 2, 2)
    return Bilinear(deep, channels) if up == "bilinear" else SubPixel(deep, channels, convolution)


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


class SubPixel(Part):
    """A 3x3 convolution to the four pixels that become of each (Shi et al. 2016, arXiv:1609.05158).

    With a 1x1 convolution it would be what a transposed 2x2 convolution is. It begins as a convolution
    whose pixels are each repeated four times (Aitken et al. 2017, arXiv:1707.02937): without a
    chequerboard.
    """

    def __init__(self, before: int, after: int, convolution: Convolution = "same") -> None:
        super().__init__()
        self.project = nn.Conv2d(before, 4 * after, 3, padding=1 if convolution == "same" else 0)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, features: Tensor) -> Tensor:
        """(B, after, 2H, 2W) from (B, before, H, W); two pixels less at each edge without padding."""
        shuffled: Tensor = self.shuffle(self.project(features))
        return shuffled

    def begin(self) -> None:
        """The same kernel four times; no ReLU follows it."""
        with torch.no_grad():
            kernels = torch.empty_like(self.project.weight[::4])
            nn.init.kaiming_normal_(kernels, nonlinearity="linear")
            self.project.weight.copy_(kernels.repeat_interleave(4, dim=0))


class Gate(Part):
    """Lets through what matters of a skip, as the features below see it (Oktay et al. 2018).

    Additive attention, arXiv:1804.03999, at the resolution of the features below; one weight between 0
    and 1 for each of their pixels, interpolated between them.

    Args:
        skip: channels of the features that come across.
        deep: channels of the features that come from below.
    """

    def __init__(self, skip: int, deep: int) -> None:
        super().__init__()
        between = max(1, skip // 2)
        self.across = nn.Conv2d(skip, between, 2, 2, bias=False)
        self.below = nn.Conv2d(deep, between, 1)
        self.weight = nn.Conv2d(between, 1, 1)

    def forward(self, skip: Tensor, deep: Tensor) -> Tensor:
        """(B, skip, 2h, 2w) from (B, skip, 2h, 2w) and (B, deep, h, w)."""
        seen = torch.relu(self.across(skip) + self.below(deep))
        return skip * double(torch.sigmoid(self.weight(seen)))

    def begin(self) -> None:
        """Open, as in the paper."""
        assert self.weight.bias is not None
        nn.init.constant_(self.weight.bias, _OPEN)


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


class CoarseHeads(nn.ModuleList):
    """Heads of the levels below full resolution, whose logits only training asks for.

    Deep supervision (Lee et al. 2015, arXiv:1409.5185): the loss of coarse logits reaches the deep
    layers by a short way.

    Args:
        widths: channels of the levels on the way up that have 1/2, 1/4, … of the resolution.
        classes: of the logits.
        levels: how many of them have a head, beginning with 1/2.

    Raises:
        ConfigurationError: there are not so many.
    """

    def __init__(self, widths: Sequence[int], classes: int, levels: int) -> None:
        if levels > len(widths):
            raise ConfigurationError(
                f"model.deep_supervision is {levels}: this network has {len(widths)} coarser levels on"
                " its way up"
            )
        super().__init__(nn.Conv2d(width, classes, 1) for width in widths[:levels])

    def of(self, level: int, features: Tensor) -> list[Tensor]:
        """The logits of a level, 1 for half the resolution; none in evaluation, or without a head."""
        if not self.training or not 1 <= level <= len(self):
            return []
        return [self[level - 1](features)]


def together(logits: Tensor, coarse: Sequence[Tensor]) -> Logits:
    """The main logits alone, or in a tuple with those of coarser levels, which come coarsest first."""
    return (logits, *reversed(coarse)) if coarse else logits
