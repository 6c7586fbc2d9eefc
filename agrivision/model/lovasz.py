"""The Lovász-softmax loss on label sets: 1 - IoU itself, made continuous.

M. Berman, A. Rannen Triki, M. Blaschko: The Lovász-Softmax loss, CVPR 2018, arXiv:1705.08790.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INFINITY = 0x7F800000  # the bits of the largest float32


def lovasz_softmax(probability: Tensor, hit: Tensor, member: Tensor, size: Tensor) -> Tensor:
    """Mean over the classes that are present in each sample, (B,), 0 to 1; 0 where none is.

    The error of a true label of a pixel is 1 - the probability of any true label; that of another
    class is its probability. The challenge counts a miss once as false negative of each true label, and
    once for every true label as false positive of what was predicted. So the set function that is
    extended is (false negatives + false positives) / (pixels of the class + false positives), where a
    pixel is as many false positives as it has labels: the plain function, of a set in which such pixels
    stand several times, and submodular like it. Of predictions without doubt (one probability is 1) the
    loss is 1 - IoU as the challenge counts it in the sample, whether pixels have one label or several.

    Args:
        probability: float (B, classes, h, w).
        hit: float (B, h, w), probability of any true label.
        member: bool like `probability`: the class is a true label of the pixel.
        size: float (B, h, w), number of true labels; 0 where the pixel does not count.
    """
    error = torch.where(member, 1 - hit.unsqueeze(1), probability).flatten(2)
    member = member.flatten(2)
    present = member.any(2)
    slopes = _slopes_by_row if error.device.type == "cpu" else _slopes
    loss = (error * slopes(error.detach(), member, size.flatten(1).int())).sum(2)
    return (loss * present).sum(1) / present.sum(1).clamp(min=1)


@torch.no_grad()
def _slopes(error: Tensor, member: Tensor, size: Tensor) -> Tensor:
    """What each error adds to the loss when it grows; the extension is linear between their orders.

    The counts are whole numbers, so that their running sums are exact in any order, on every device; no
    gradient passes through the sorting.

    Args:
        error: float (B, classes, pixels).
        member: bool, of the same shape.
        size: int32 (B, pixels).

    Returns:
        Like `error`; zeros of classes that are not present.
    """
    return _slope(error, member, size.unsqueeze(1).expand(error.shape))


# How many rows there are depends on the labels.
@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def _slopes_by_row(error: Tensor, member: Tensor, size: Tensor) -> Tensor:
    """The same, of present classes only, one after the other: CPUs sort such rows by digits."""
    slopes = torch.zeros_like(error)
    for sample, class_id in member.any(2).nonzero().tolist():
        row = _slope(error[sample, class_id], member[sample, class_id], size[sample])
        slopes[sample, class_id] = row
    return slopes


def _slope(error: Tensor, member: Tensor, size: Tensor) -> Tensor:
    """Along the last dimension."""
    # Numbers that are not negative have the order of their bits, and whole numbers are sorted faster.
    bits = error.to(torch.float32).abs().view(torch.int32)
    order = (_INFINITY - bits).sort(dim=-1, stable=True).indices
    wrong = size.masked_fill(member, 0).gather(-1, order)
    right = member.gather(-1, order)
    pixels = right.sum(-1, keepdim=True)
    # With those of larger error missed, and this one.
    false_positive = wrong.cumsum(-1)
    left = pixels - right.cumsum(-1)  # hits
    union = (pixels + false_positive).clamp(min=1)
    # 1 - left / union minus the same without this pixel, but not as a difference.
    before = (union - wrong).clamp(min=1)
    step = torch.where(right, 1.0 / union, wrong * (left / before) / union)
    return torch.empty_like(error).scatter_(-1, order, step.to(error.dtype))
