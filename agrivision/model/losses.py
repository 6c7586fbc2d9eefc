"""What is minimised: cross-entropy on label sets, and soft versions of the challenge's score.

A pixel may have several true labels. The score takes a prediction as a hit if it is any of them; so
does the loss, which never asks a network to choose between two labels that are both right.

All losses are per sample and take nothing from other samples, not even a count of valid pixels. The
loss of a global batch is their sum over its size, however it is cut into ranks and micro-batches, and
the gradients of N ranks are the gradients of one without a word between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agrivision.config import LossConfig
from agrivision.model.blocks import centre
from agrivision.model.borders import nearness, neighbourhood, reach
from agrivision.model.expansion import double
from agrivision.model.lovasz import lovasz_softmax

_VALID_BIT = 15  # of the label images; the classes have the bits below
_SMOOTH = 1.0  # pixels: keeps the Dice of a class with hardly any pixel from jumping between 0 and 1
_LEAST = 1e-6  # below which a power of a miss or of a score has no slope: of roots it would be infinite
_PNC_EPSILON = 1e-5  # as in MSCG-Net


class SampleLosses(NamedTuple):
    """Losses by sample, each float32 (B,); 0 where one is not computed.

    Attributes:
        total: cross_entropy and the others by their weights, to be minimised; with deep supervision
            the mean over the levels. The parts are those of the finest level.
        cross_entropy: weighted, in nats a pixel; focal, where it is.
        dice: 1 - soft Dice, or Tversky, mean over the classes in the sample, 0 to 1.
        lovasz: 1 - IoU, made continuous, likewise.
        pnc: positive and negative classes balanced, after MSCG-Net.
    """

    total: Tensor
    cross_entropy: Tensor
    dice: Tensor
    lovasz: Tensor
    pnc: Tensor


class _Truth(NamedTuple):
    """What the labels of a batch say, as far as the loss asks.

    Attributes:
        counted: bool (B, h, w), pixels that count.
        member: bool (B, classes, h, w), true labels.
        size: float (B, h, w), how many; 0 where a pixel does not count.
        weight: float (B, h, w), of the cross-entropy; likewise.
        nearby: bool (B, classes, h, w), labels of the neighbourhood; None without smoothing.
        share: float (B, h, w), of the target that goes to them; likewise.
    """

    counted: Tensor
    member: Tensor
    size: Tensor
    weight: Tensor
    nearby: Tensor | None
    share: Tensor | None


class LabelSetLoss(nn.Module):
    """Cross-entropy plus what the configuration adds, for pixels that may have several true labels.

    Args:
        class_weights: float (classes,), as from `class_weights`.
        config: of the loss; its class weights are those given.

    Attributes:
        parts: names of the losses that are reported: the total, cross-entropy and Dice always, further
            ones where they have a weight.

    Raises:
        ValueError: more classes than bits.
    """

    weight_of_class: Tensor
    weight_of_set: Tensor
    size_of_set: Tensor

    def __init__(self, class_weights: Tensor, config: LossConfig) -> None:
        super().__init__()
        if class_weights.ndim != 1 or not 1 <= len(class_weights) <= _VALID_BIT:
            raise ValueError(
                f"weights of shape {tuple(class_weights.shape)}: at most {_VALID_BIT} classes"
            )
        self.classes = len(class_weights)
        self.parts = parts(config)
        self._config = config
        # A label set is a number below 2**classes: what depends on the set alone is looked up.
        member = _bits(torch.arange(2**self.classes), self.classes, dim=1).float()
        size = member.sum(1)
        mean = (member * class_weights.float()).sum(1) / size.clamp(min=1)
        self.register_buffer("size_of_set", size, persistent=False)
        self.register_buffer("weight_of_set", mean, persistent=False)
        self.register_buffer("weight_of_class", class_weights.float(), persistent=False)

    def forward(self, logits: Tensor | Sequence[Tensor], labels: Tensor) -> SampleLosses:
        """The losses of each sample.

        Args:
            logits: float (B, classes, h, w); computed on in float32 whatever their dtype. Or several,
                each half as large as the one before: coarser ones are doubled to the size of the first,
                and where there is more of them, their middle counts.
            labels: int32 (B, H, W) with H >= h, W >= w; the middle h x w of them counts. A valid
                pixel without any scored label does not count, as if it were not valid.

        Returns:
            Losses and their graph.

        Raises:
            ValueError: shapes do not go together.
        """
        levels = [logits] if isinstance(logits, Tensor) else logits
        shape = levels[0].shape
        truth = self._truth(labels, shape)
        finest = self._losses(levels[0].float(), truth)
        if len(levels) == 1:
            return finest
        weights = [self._config.deep_supervision_decay**level for level in range(len(levels))]
        total = weights[0] * finest.total
        for level, (weight, coarse) in enumerate(zip(weights, levels, strict=True)):
            if level > 0:
                fine = _doubled(coarse.float(), level, shape)
                total = total + weight * self._losses(fine, truth).total
        return finest._replace(total=total / sum(weights))

    def reported(self, losses: SampleLosses) -> Tensor:
        """The losses of `parts`, (parts, B)."""
        return torch.stack([getattr(losses, name) for name in self.parts])

    def _losses(self, logits: Tensor, truth: _Truth) -> SampleLosses:
        """The losses of one level, float32 (B, classes, h, w)."""
        config = self._config
        log_probability = F.log_softmax(logits, dim=1)
        log_hit = _log_hit(log_probability, truth.member, truth.counted)
        cross_entropy = self._cross_entropy(log_probability, log_hit, truth)
        none = torch.zeros_like(cross_entropy)
        total, dice, lovasz, pnc = cross_entropy, none, none, none
        if not (config.dice_weight or config.lovasz_weight or config.pnc_weight):
            return SampleLosses(total, cross_entropy, dice, lovasz, pnc)
        probability, hit = log_probability.exp(), log_hit.exp()
        if config.dice_weight:
            dice = self._tversky(probability, hit, truth)
            total = total + config.dice_weight * dice
        if config.lovasz_weight:
            lovasz = lovasz_softmax(probability, hit, truth.member, truth.size)
            total = total + config.lovasz_weight * lovasz
        if config.pnc_weight:
            pnc = self._pnc(probability, hit, truth)
            total = total + config.pnc_weight * pnc
        return SampleLosses(total, cross_entropy, dice, lovasz, pnc)

    def _truth(self, labels: Tensor, shape: torch.Size) -> _Truth:
        config, (height, width) = self._config, shape[2:]
        everywhere = self._label_sets(labels, shape)  # also where there are no logits
        sets = centre(everywhere, height, width)
        weight, nearby, share = self.weight_of_set[sets], None, None
        if config.border_weight or config.border_smoothing:
            near = centre(nearness(everywhere, config.border_sigma), height, width)
            if config.border_weight:
                weight = weight * (1 + config.border_weight * near)
            if config.border_smoothing:
                # The other side of a border is a pixel further than its own.
                around = neighbourhood(everywhere, reach(config.border_sigma) + 1)
                nearby = _bits(centre(around, height, width), self.classes, dim=1)
                share = config.border_smoothing * near
        member = _bits(sets, self.classes, dim=1)
        return _Truth(sets != 0, member, self.size_of_set[sets], weight, nearby, share)

    def _label_sets(self, labels: Tensor, shape: torch.Size) -> Tensor:
        """Scored labels of each pixel, int32 below 2**classes; 0 where it does not count."""
        if shape[1] != self.classes or shape[0] != labels.shape[0]:
            raise ValueError(
                f"logits {tuple(shape)} for labels {tuple(labels.shape)}, {self.classes} classes"
            )
        if shape[2] > labels.shape[1] or shape[3] > labels.shape[2]:
            raise ValueError(f"logits {tuple(shape)} are larger than the labels {tuple(labels.shape)}")
        valid = (labels >> _VALID_BIT) & 1
        sets: Tensor = (labels & (2**self.classes - 1)) * valid
        return sets

    def _cross_entropy(self, log_probability: Tensor, log_hit: Tensor, truth: _Truth) -> Tensor:
        """In nats a pixel, (B,).

        Near borders, where nobody could draw the line to the pixel, a share of the target goes to all
        labels of the neighbourhood together: in that share a hit is any of them. Spread evenly over all
        classes, it would ask for some of what is nowhere near; given to the neighbours' labels one by
        one, it would ask the network to be unsure, where the score asks for one answer.
        """
        gain = _focal(log_hit, self._config.focal_gamma)
        if truth.nearby is not None and truth.share is not None:
            tolerant = _log_hit(log_probability, truth.nearby, truth.counted)
            gain = gain + truth.share * (_focal(tolerant, self._config.focal_gamma) - gain)
        # The denominator is a constant, not the sample's count of valid pixels: each valid pixel of the
        # data set weighs the same, and a tile at the edge of a field is not blown up to a whole one.
        return -(gain * truth.weight).sum((1, 2)) / (gain.shape[1] * gain.shape[2])

    def _tversky(self, probability: Tensor, hit: Tensor, truth: _Truth) -> Tensor:
        """1 - Tversky's index over the classes that are present in each sample, (B,).

        With 0.5 for both sides it is soft Dice after Milletari, Navab and Ahmadi 2016 (V-Net,
        arXiv:1606.04797), counted as the challenge counts: a hit is a true positive of every label of
        the pixel; a miss is a false negative of each, and as many false positives of what was
        predicted. Other weights are after Salehi et al. 2017 (arXiv:1706.05721), the power after
        Abraham and Khan 2019 (arXiv:1810.07842).

        Args:
            probability: float (B, classes, h, w).
            hit: float (B, h, w), probability of any true label.
            truth: of the pixels.
        """
        config = self._config
        pixels = truth.member.sum((2, 3))  # = true positives + false negatives
        hits = (truth.member * hit.unsqueeze(1)).sum((2, 3))
        false_positive = (probability * (~truth.member * truth.size.unsqueeze(1))).sum((2, 3))
        beyond_dice = (2 * config.tversky_beta - 1) * (pixels - hits)
        counted = hits + pixels + beyond_dice + 2 * config.tversky_alpha * false_positive
        loss = 1 - (2 * hits + _SMOOTH) / (counted + _SMOOTH)
        if config.tversky_gamma != 1:
            loss = _power(loss, 1 / config.tversky_gamma)
        present = pixels > 0
        return (loss * present).sum(1) / present.sum(1).clamp(min=1)

    def _pnc(self, probability: Tensor, hit: Tensor, truth: _Truth) -> Tensor:
        """Positive and negative classes balanced, mean over the pixels, (B,).

        Liu et al. 2020 (MSCG-Net, arXiv:2004.10327): of the truth y of a class at a pixel, 0 or 1, its
        probability p and the error e = y - p, the sum over the classes of w * (1 + y + p) * (e² -
        log((1 - e²) / (1 + e²))), where the weights w of the classes add up to one. Of a true label, p
        is the probability of any true label.

        Args:
            probability: float (B, classes, h, w).
            hit: float (B, h, w), probability of any true label.
            truth: of the pixels.
        """
        found = torch.where(truth.member, hit.unsqueeze(1), probability)
        square = (truth.member.float() - found).square()
        ratio = (1 - square + _PNC_EPSILON) / (1 + square + _PNC_EPSILON)
        weight = (self.weight_of_class / self.weight_of_class.sum()).reshape(-1, 1, 1)
        loss = (weight * (1 + truth.member + found) * (square - ratio.log())).sum(1)
        return (loss * truth.counted).sum((1, 2)) / (hit.shape[1] * hit.shape[2])


def parts(config: LossConfig) -> tuple[str, ...]:
    """Names of the losses that are reported."""
    further = {"lovasz": config.lovasz_weight, "pnc": config.pnc_weight}
    return ("total", "cross_entropy", "dice", *(name for name, weight in further.items() if weight))


def _doubled(logits: Tensor, times: int, shape: torch.Size) -> Tensor:
    """Logits enlarged by 2**times; of what is larger than `shape` the middle."""
    fine = logits
    for _ in range(times):
        fine = double(fine)
    if fine.shape[:2] != shape[:2] or fine.shape[2] < shape[2] or fine.shape[3] < shape[3]:
        raise ValueError(f"logits {tuple(logits.shape)} of level {times} do not fit {tuple(shape)}")
    return centre(fine, shape[2], shape[3])


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


def _focal(log_hit: Tensor, gamma: float) -> Tensor:
    """(1 - hit) ** gamma * log hit: Lin et al. 2017, Focal Loss, arXiv:1708.02002."""
    if gamma == 0:
        return log_hit
    return _power(-torch.expm1(log_hit), gamma) * log_hit


def _power(values: Tensor, exponent: float) -> Tensor:
    """Of values that are not negative; those next to nothing are raised to what has a finite slope.

    On CPUs `torch.pow` gives other last bits at the end of a tensor, which is elsewhere in another
    batch.
    """
    return torch.exp(exponent * torch.log(values.clamp(min=_LEAST)))


def class_weights(
    class_pixels: Sequence[float],
    kind: Literal["none", "sqrt", "inverse", "effective"],
    maximum: float,
    *,
    beta: float = 0.999,
    tile_pixels: int = 512 * 512,
) -> Tensor:
    """Weights that let rare classes count more.

    Args:
        class_pixels: pixels of each class in the training data, as often as they are seen.
        kind: `none` gives ones; weights go with frequency ** -0.5 (`sqrt`) or ** -1 (`inverse`), or
            with the effective number of samples ** -1 (`effective`): Cui et al. 2019, arXiv:1901.05555.
        maximum: most that the heaviest class may weigh relative to the lightest, >= 1.
        beta: of `effective`, below 1: n samples count as (1 - beta ** n) / (1 - beta). Pixels are no
            samples, as neighbours are alike: a sample is as many as a tile has.
        tile_pixels: pixels of a tile.

    Returns:
        float32 (classes,), whose mean over all labels of the training data is 1. Classes without a
        pixel get the weight of the heaviest class that has some; without any pixel all weigh 1.
    """
    pixels = torch.tensor(class_pixels, dtype=torch.float64)
    present = pixels > 0
    if kind == "none" or not present.any():
        return torch.ones(len(class_pixels))
    frequency = pixels / pixels.sum()
    if kind == "effective":
        tiles = pixels / tile_pixels
        weights = 1 / -torch.expm1(tiles * math.log(beta)) if beta > 0 else torch.ones_like(pixels)
    else:
        weights = frequency ** (-0.5 if kind == "sqrt" else -1.0)
    weights = weights.clamp(max=float(weights[present].min()) * maximum)
    weights[~present] = weights[present].max()
    return (weights / (weights * frequency).sum()).float()
