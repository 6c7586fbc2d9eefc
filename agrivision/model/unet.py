"""The UNet of Ronneberger, Fischer and Brox (2015).

O. Ronneberger, P. Fischer, T. Brox: U-Net: Convolutional Networks for Biomedical Image Segmentation,
MICCAI 2015, arXiv:1505.04597.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from agrivision.errors import ConfigurationError
from agrivision.model.blocks import Block, Convolution, Norm, initialise, make_block
from agrivision.model.expansion import (
    Attention,
    CoarseHeads,
    Expansion,
    Logits,
    UpSampling,
    lost,
    together,
)


class UNet(nn.Module):
    """A U of two 3x3 convolutions a level, max-pooling on the way down and skips on the way up.

    Args:
        bands: of the images.
        classes: of the logits.
        base_channels: channels of the first level; each deeper level has twice as many.
        depth: how often the resolution is halved.
        convolution: `same` pads with zeros and keeps the size; `valid` is the paper's: no padding,
            each output pixel sees only pixels of the image, and the output is smaller than the input.
        up: `transposed` 2x2 convolutions as in the paper, `bilinear` up-sampling with a 1x1
            convolution, or `pixel_shuffle` after a 3x3 convolution.
        norm: after each 3x3 convolution; the paper has none.
        block: `plain` as in the paper; `residual` puts a shortcut beside the two convolutions.
        attention: `none` as in the paper; `gate` weighs the skips by what is seen below.
        dropout: probability at the end of the contracting path.
        deep_supervision: how many coarser levels give logits, too, in training.

    Raises:
        ConfigurationError: there are not so many levels, or `valid` convolutions have shifted them.
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
        block: Block = "plain",
        attention: Attention = "none",
        dropout: float = 0.0,
        deep_supervision: int = 0,
    ) -> None:
        super().__init__()
        if deep_supervision and convolution == "valid":
            raise ConfigurationError(
                "model.deep_supervision needs levels of half the size: not model.convolution `valid`"
            )
        self.depth = depth
        self.convolution: Convolution = convolution
        self._lost = lost(up)
        channels = [base_channels * 2**level for level in range(depth + 1)]
        self.contract = nn.ModuleList(
            make_block(before, after, block=block, convolution=convolution, norm=norm)
            for before, after in zip([bands, *channels], channels, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(dropout)
        self.expand = nn.ModuleList(
            Expansion(
                deep,
                wide,
                wide,
                convolution=convolution,
                up=up,
                norm=norm,
                block=block,
                attention=attention,
            )
            for wide, deep in zip(channels[-2::-1], channels[:0:-1], strict=True)
        )
        self.head = nn.Conv2d(base_channels, classes, 1)
        self.coarse = CoarseHeads(channels[1:-1], classes, deep_supervision)
        initialise(self)

    def forward(self, images: Tensor) -> Logits:
        """Logits of every class.

        Args:
            images: float (B, bands, H, W).

        Returns:
            (B, classes, H', W'): H' = H and W' = W for `same`; for `valid` they are smaller by
            `margin` and centred, for example 388 for 572 at depth 4. With deep supervision, in training
            only, a tuple of these and those of (B, classes, H / 2, W / 2), (B, classes, H / 4, W / 4) …

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
        coarse: list[Tensor] = []
        for expansion in self.expand:
            features = expansion(features, skips.pop())
            coarse += self.coarse.of(len(skips), features)
        return together(self.head(features), coarse)

    @property
    def margin(self) -> int:
        """By how many pixels the logits are smaller than the image, both sides together."""
        return 0 if self.convolution == "same" else (8 + self._lost) * 2**self.depth - 4 - self._lost

    def input_size(self, output: int) -> int:
        """The smallest side in pixels of an image whose logits, centred in it, have >= `output`."""
        scale: int = 2**self.depth
        if self.convolution == "same":
            return -(-output // scale) * scale
        # With e pixels lost at a level up, a bottom that enters with b pixels leaves
        # 2**depth * (b - 4 - e) + e of the image's 2**depth * (b + 4) - 4. One pixel of output asks for
        # b > e, of which something is left. Whole numbers alone: an exported graph does these sums,
        # too.
        bottom = 4 + self._lost - (self._lost - output) // scale
        return scale * (bottom + 4) - 4


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
