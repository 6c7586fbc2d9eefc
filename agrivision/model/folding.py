"""Normalisation folded into the convolutions before it, for networks that only predict."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def folded(module: nn.Module) -> nn.Module:
    """A copy in which each convolution does what the BatchNorm right after it did.

    In evaluation BatchNorm is a factor and a shift for each channel. As a part of the weights they cost
    nothing; the logits differ by rounding.

    Args:
        module: in evaluation mode; pairs are looked for in `nn.Sequential`s. One without any is given
            back itself: an exported network cannot be copied.
    """
    if not any(True for _ in _pairs(module)):
        return module
    made = copy.deepcopy(module)
    for sequence, name, after in list(_pairs(made)):
        fused = fuse_conv_bn_eval(getattr(sequence, name), getattr(sequence, after))
        setattr(sequence, name, fused)
        setattr(sequence, after, nn.Identity())
    return made


def _pairs(module: nn.Module) -> Iterator[tuple[nn.Sequential, str, str]]:
    """Where a BatchNorm follows a convolution: the sequence, and the names of the two in it."""
    for sequence in module.modules():
        if isinstance(sequence, nn.Sequential):
            for (name, layer), (after, norm) in pairwise(sequence.named_children()):
                if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    yield sequence, name, after
