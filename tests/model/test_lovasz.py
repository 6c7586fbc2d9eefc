"""The Lovász part is the challenge's IoU where nothing is in doubt, and its extension elsewhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agrivision.config import LossConfig
from agrivision.evaluation.confusion import confusion_matrix
from agrivision.model import lovasz
from agrivision.model.losses import LabelSetLoss
from tests.model.test_losses import CLASSES, VALID, random_labels

CONFIG = LossConfig(dice_weight=0, lovasz_weight=1)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return LabelSetLoss(torch.ones(CLASSES), CONFIG)(logits, labels).lovasz


def challenge(ids: Tensor, labels: Tensor) -> float:
    """1 - the mean IoU of the classes that a sample has, by the challenge's matrix."""
    scored = (labels & (2**CLASSES - 1)) != 0
    labels = torch.where(scored, labels, 0)  # pixels without a scored label do not count
    matrix = confusion_matrix(ids[None], labels[None], CLASSES).double()
    hits, called = matrix.diagonal(), matrix.sum(1)
    members = ((labels.unsqueeze(-1) >> torch.arange(CLASSES)) & 1) * ((labels >> 15) & 1).unsqueeze(-1)
    true = members.sum((0, 1))
    iou = hits / (true + called - hits)
    return float((1 - iou[true > 0]).mean()) if bool((true > 0).any()) else 0.0


@pytest.mark.parametrize("several", [False, True], ids=["one label", "several labels"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_of_predictions_without_doubt_it_is_the_challenges_iou(several: bool, seed: int) -> None:
    torch.manual_seed(seed)
    labels = random_labels(seed, (1, 7, 9))
    if not several:
        labels = torch.where(torch.rand(1, 7, 9) < 0.9, VALID, 0).int() | (
            1 << torch.randint(CLASSES, (1, 7, 9))
        )
    ids = torch.randint(CLASSES, (1, 7, 9))
    logits = torch.full((1, CLASSES, 7, 9), -200.0).scatter(1, ids.unsqueeze(1), 200.0)
    found = loss_of(logits, labels.int())
    assert float(found) == pytest.approx(challenge(ids[0], labels[0].int()), abs=1e-5)


def slow(logits: Tensor, labels: Tensor) -> float:
    """The extension of the set function by its definition; false positives stand there repeatedly."""
    p = logits.double().softmax(0)
    losses = []
    for c in range(CLASSES):
        elements, pixels = [], 0  # error, whether it is the class's own
        for i in range(labels.shape[0]):
            for j in range(labels.shape[1]):
                members = [k for k in range(CLASSES) if labels[i, j] >> k & 1]
                if not labels[i, j] & VALID or not members:
                    continue
                if c in members:
                    elements.append((1 - float(p[members, i, j].sum()), True))
                    pixels += 1
                else:
                    elements += [(float(p[c, i, j]), False)] * len(members)
        if not pixels:
            continue
        elements.sort(key=lambda one: -one[0])
        loss = before = missed = false = 0.0
        for error, own in elements:
            missed, false = missed + own, false + (not own)
            jaccard = (missed + false) / (pixels + false)
            loss += error * (jaccard - before)
            before = jaccard
        losses.append(loss)
    return sum(losses) / len(losses) if losses else 0.0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_elsewhere_it_is_the_extension_by_its_definition(seed: int) -> None:
    torch.manual_seed(seed)
    logits, labels = 2 * torch.randn(1, CLASSES, 5, 6), random_labels(seed, (1, 5, 6))
    assert float(loss_of(logits, labels)) == pytest.approx(slow(logits[0], labels[0]), abs=1e-5)


def test_all_rows_at_once_are_the_rows_one_by_one() -> None:
    """GPUs sort all classes together, CPUs those that are present: the same bits."""
    torch.manual_seed(0)
    labels = random_labels(0, (3, 12, 12)) & ~2  # one class is absent
    members = ((labels.unsqueeze(1) >> torch.arange(CLASSES).reshape(-1, 1, 1)) & 1).bool()
    members &= (labels & VALID).bool().unsqueeze(1)
    size = members.sum(1).flatten(1).int()
    error = torch.rand(3, CLASSES, 144).round(decimals=1)  # many are equal
    rows = lovasz._slopes_by_row(error, members.flatten(2), size)
    together = lovasz._slopes(error, members.flatten(2), size)
    assert rows.any() and torch.equal(rows, together)
    assert torch.equal(together, lovasz._slopes(error, members.flatten(2), size))
