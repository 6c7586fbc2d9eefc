"""Normalisation folded into the convolutions before it, for networks that only predict."""

from __future__ import annotations

import copy
from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def folded(module: nn.Module) -> nn.Module:
    """A copy in which each convolution does what the BatchNorm right after it did.

    In evaluation BatchNorm is a factor and a shift for each channel. As a part of the weights they cost
    nothing; the logits differ by rounding.

    Args:
        module: in evaluation mode; pairs are looked for in `nn.Sequential`s.
    """
    made = copy.deepcopy(module)
    for sequence in made.modules():
        if isinstance(sequence, nn.Sequential):
            layers = list(sequence.named_children())
            for (name, layer), (after, norm) in pairwise(layers):
                if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    setattr(sequence, name, fuse_conv_bn_eval(layer, norm))
                    setattr(sequence, after, nn.Identity())
    return made
