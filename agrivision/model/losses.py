"""What is minimised: cross-entropy on label sets, and a soft version of the challenge's score.

A pixel may have several true labels. The score takes a prediction as a hit if it is any of them; so
does the loss, which never asks a network to choose between two labels that are both right.

All losses are per sample and take nothing from other samples, not even a count of valid pixels. The
loss of a global batch is their sum over its size, however it is cut into ranks and micro-batches, and
the gradients of N ranks are the gradients of one without a word between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agrivision.model.unet import centre

_VALID_BIT = 15  # of the label images; the classes have the bits below
_SMOOTH = 1.0  # pixels: keeps the Dice of a class with hardly any pixel from jumping between 0 and 1


class SampleLosses(NamedTuple):
    """Losses by sample, each float32 (B,).

    Attributes:
        total: cross_entropy + dice_weight * dice, to be minimised.
        cross_entropy: weighted, in nats a pixel.
        dice: 1 - soft Dice, mean over the classes in the sample, 0 to 1; 0 where it is not computed.
    """

    total: Tensor
    cross_entropy: Tensor
    dice: Tensor


class LabelSetLoss(nn.Module):
    """Cross-entropy plus soft Dice, both for pixels that may have several true labels.

    Args:
        class_weights: float (classes,), as from `class_weights`.
        dice_weight: of the Dice part; 0 leaves it out.

    Raises:
        ValueError: more classes than bits.
    """

    weight_of_set: Tensor
    size_of_set: Tensor

    def __init__(self, class_weights: Tensor, dice_weight: float) -> None:
        super().__init__()
        if class_weights.ndim != 1 or not 1 <= len(class_weights) <= _VALID_BIT:
            raise ValueError(
                f"weights of shape {tuple(class_weights.shape)}: at most {_VALID_BIT} classes"
            )
        self.classes = len(class_weights)
        self.dice_weight = dice_weight
        # A label set is a number below 2**classes: what depends on the set alone is looked up.
        member = _bits(torch.arange(2**self.classes), self.classes, dim=1).float()
        size = member.sum(1)
        mean = (member * class_weights.float()).sum(1) / size.clamp(min=1)
        self.register_buffer("size_of_set", size, persistent=False)
        self.register_buffer("weight_of_set", mean, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> SampleLosses:
        """The losses of each sample.

        Args:
            logits: float (B, classes, h, w); computed on in float32 whatever their dtype.
            labels: int32 (B, H, W) with H >= h, W >= w; the middle h x w of them counts. A valid
                pixel without any scored label does not count, as if it were not valid.

        Returns:
            Losses and their graph.
        """
        sets = self._label_sets(labels, logits.shape)
        log_probability = F.log_softmax(logits.float(), dim=1)
        member = _bits(sets, self.classes, dim=1)
        log_hit = _log_hit(log_probability, member, counted=sets != 0)
        cross_entropy = -(log_hit * self.weight_of_set[sets]).sum((1, 2))
        # The denominator is a constant, not the sample's count of valid pixels: each valid pixel of the
        # data set weighs the same, and a tile at the edge of a field is not blown up to a whole one.
        cross_entropy = cross_entropy / (sets.shape[1] * sets.shape[2])
        if self.dice_weight == 0:
            return SampleLosses(cross_entropy, cross_entropy, torch.zeros_like(cross_entropy))
        dice = _soft_dice(log_probability.exp(), log_hit.exp(), member, self.size_of_set[sets])
        return SampleLosses(cross_entropy + self.dice_weight * dice, cross_entropy, dice)

    def _label_sets(self, labels: Tensor, shape: torch.Size) -> Tensor:
        """Scored labels of each pixel, int32 below 2**classes; 0 where it does not count."""
        if shape[1] != self.classes or shape[0] != labels.shape[0]:
            raise ValueError(
                f"logits {tuple(shape)} for labels {tuple(labels.shape)}, {self.classes} classes"
            )
        if shape[2] > labels.shape[1] or shape[3] > labels.shape[2]:
            raise ValueError(f"logits {tuple(shape)} are larger than the labels {tuple(labels.shape)}")
        labels = centre(labels, shape[2], shape[3])
        valid = (labels >> _VALID_BIT) & 1
        sets: Tensor = (labels & (2**self.classes - 1)) * valid
        return sets


def _bits(sets: Tensor, classes: int, dim: int) -> Tensor:
    """Bool: is class c in the set? The classes are inserted as dimension `dim`."""
    bit = torch.arange(classes, device=sets.device, dtype=sets.dtype)
    bit = bit.reshape(-1, *[1] * (sets.ndim - dim))
    return ((sets.unsqueeze(dim) >> bit) & 1).bool()


def _log_hit(log_probability: Tensor, member: Tensor, counted: Tensor) -> Tensor:
    """Log of the probability that falls on any true label, (B, h, w); 0 where a pixel does not count.

    Pixels that do not count keep all classes: of an empty set the gradient would not be finite.
    """
    out = ~member & counted.unsqueeze(1)
    return torch.logsumexp(log_probability.masked_fill(out, float("-inf")), dim=1)


def _soft_dice(probability: Tensor, hit: Tensor, member: Tensor, size: Tensor) -> Tensor:
    """1 - Dice over the classes that are present in each sample, (B,).

    Soft Dice after Milletari, Navab and Ahmadi 2016 (V-Net, arXiv:1606.04797), counted as the
    challenge counts: a hit is a true positive of every label of the pixel; a miss is a false negative
    of each, and as many false positives of what was predicted.

    Args:
        probability: float (B, classes, h, w).
        hit: float (B, h, w), probability of any true label.
        member: bool like `probability`: the class is a true label of the pixel.
        size: float (B, h, w), number of true labels; 0 where the pixel does not count.
    """
    pixels = member.sum((2, 3))  # = true positives + false negatives
    true_positive = (member * hit.unsqueeze(1)).sum((2, 3))
    false_positive = (probability * (~member * size.unsqueeze(1))).sum((2, 3))
    dice = (2 * true_positive + _SMOOTH) / (true_positive + pixels + false_positive + _SMOOTH)
    present = pixels > 0
    return ((1 - dice) * present).sum(1) / present.sum(1).clamp(min=1)


def class_weights(
    class_pixels: Sequence[int], kind: Literal["none", "sqrt", "inverse"], maximum: float
) -> Tensor:
    """Weights that let rare classes count more.

    Args:
        class_pixels: pixels of each class in the training data.
        kind: `none` gives ones; weights go with frequency ** -0.5 (`sqrt`) or ** -1 (`inverse`).
        maximum: most that the heaviest class may weigh relative to the lightest, >= 1.

    Returns:
        float32 (classes,), whose mean over all labels of the training data is 1. Classes without a
        pixel get the weight of the heaviest class that has some; without any pixel all weigh 1.
    """
    pixels = torch.tensor(class_pixels, dtype=torch.float64)
    present = pixels > 0
    if kind == "none" or not present.any():
        return torch.ones(len(class_pixels))
    frequency = pixels / pixels.sum()
    weights = frequency ** (-0.5 if kind == "sqrt" else -1.0)
    weights = weights.clamp(max=float(weights[present].min()) * maximum)
    weights[~present] = weights[present].max()
    return (weights / (weights * frequency).sum()).float()
