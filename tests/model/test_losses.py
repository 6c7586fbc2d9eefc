from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agrivision.model.losses import LabelSetLoss, SampleLosses, class_weights
from agrivision.model.unet import UNet

VALID = 1 << 15
CLASSES = 4


def random_labels(seed: int, shape: tuple[int, ...], classes: int = CLASSES) -> Tensor:
    """Overlaps, unscored bits, empty sets and pixels that are not valid."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.rand(*shape, 16, generator=generator) < 0.3
    bits[..., 15] = torch.rand(*shape, generator=generator) < 0.8
    return (bits.int() << torch.arange(16, dtype=torch.int32)).sum(-1).int()


def slow(logits: Tensor, labels: Tensor, weights: Tensor, dice_weight: float) -> SampleLosses:
    """Pixel by pixel, as the docstrings say, in float64."""
    rows = []
    for sample, truth in zip(logits.double().softmax(1), labels, strict=True):
        entropy = 0.0
        tp, fp, fn = ([0.0] * CLASSES for _ in range(3))
        here: set[int] = set()
        for i, j in itertools.product(range(truth.shape[0]), range(truth.shape[1])):
            members = {c for c in range(CLASSES) if truth[i, j] >> c & 1}
            if not truth[i, j] & VALID or not members:
                continue
            here |= members
            p = sample[:, i, j].tolist()
            hit = sum(p[c] for c in members)
            entropy -= math.log(hit) * sum(float(weights[c]) for c in members) / len(members)
            for c in range(CLASSES):
                if c in members:
                    tp[c] += hit
                    fn[c] += 1 - hit
                else:
                    fp[c] += p[c] * len(members)
        parts = [1 - (2 * tp[c] + 1) / (2 * tp[c] + fp[c] + fn[c] + 1) for c in here]
        dice = sum(parts) / len(parts) if parts else 0.0
        entropy /= truth.numel()
        rows.append([entropy + dice_weight * dice, entropy, dice])
    return SampleLosses(*torch.tensor(rows).T)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), dice_weight=st.sampled_from([0.5, 1.0]))
def test_losses_are_those_of_the_slow_reference(seed: int, dice_weight: float) -> None:
    torch.manual_seed(seed)
    logits, labels = 3 * torch.randn(2, CLASSES, 4, 5), random_labels(seed, (2, 4, 5))
    weights = torch.rand(CLASSES) + 0.5
    found = LabelSetLoss(weights, dice_weight)(logits, labels)
    torch.testing.assert_close(found, slow(logits, labels, weights, dice_weight))


def test_without_dice_there_is_only_cross_entropy() -> None:
    logits, labels = torch.randn(2, CLASSES, 4, 5), random_labels(0, (2, 4, 5))
    losses = LabelSetLoss(torch.ones(CLASSES), 0)(logits, labels)
    assert torch.equal(losses.total, losses.cross_entropy)
    assert losses.dice.tolist() == [0, 0]


def test_labels_of_one_class_give_the_usual_cross_entropy() -> None:
    logits, ids = torch.randn(2, CLASSES, 6, 6), torch.randint(CLASSES, (2, 6, 6))
    labels = (1 << ids).int() | VALID
    found = LabelSetLoss(torch.ones(CLASSES), 0)(logits, labels).total.mean()
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits, ids))


@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e4, 1e30])
def test_gradients_are_finite_however_extreme_the_logits(magnitude: float) -> None:
    labels = random_labels(1, (3, 8, 8))
    labels[2] &= VALID - 1  # no valid pixel at all
    logits = (torch.randint(-1, 2, (3, CLASSES, 8, 8)) * magnitude).requires_grad_()
    losses = LabelSetLoss(torch.ones(CLASSES), 1.0)(logits, labels)
    losses.total.sum().backward()
    assert losses.total.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert losses.total[2] == 0
    assert not logits.grad[2].any()


def test_gradients_are_those_of_differences() -> None:
    loss = LabelSetLoss(torch.tensor([0.5, 1.0, 2.0, 1.5]), 1.0)
    labels = random_labels(2, (1, 3, 3))
    logits = torch.randn(1, CLASSES, 3, 3, requires_grad=True)
    loss(logits, labels).total.sum().backward()
    assert logits.grad is not None
    step = 1e-2 * torch.randn_like(logits)
    up, down = (loss(logits.detach() + sign * step, labels).total.sum() for sign in (1, -1))
    torch.testing.assert_close((up - down) / 2, (logits.grad * step).sum(), rtol=1e-2, atol=1e-5)


def test_pixels_that_are_not_valid_have_no_gradient() -> None:
    labels = random_labels(3, (2, 8, 8))
    logits = torch.randn(2, CLASSES, 8, 8, requires_grad=True)
    LabelSetLoss(torch.ones(CLASSES), 1.0)(logits, labels).total.sum().backward()
    counts = ((labels & VALID) != 0) & ((labels & (2**CLASSES - 1)) != 0)
    assert logits.grad is not None
    assert not logits.grad.movedim(1, 3)[~counts].any()


def test_perfect_predictions_cost_next_to_nothing() -> None:
    labels = random_labels(4, (2, 16, 16)) & ~1 | 2 | VALID
    logits = torch.full((2, CLASSES, 16, 16), -30.0)
    logits[:, 1] = 30  # one of several right answers
    losses = LabelSetLoss(torch.ones(CLASSES), 1.0)(logits, labels)
    assert losses.total.abs().max() < 1e-5


def test_a_batch_is_its_samples() -> None:
    torch.manual_seed(0)
    model = UNet(4, CLASSES, base_channels=4, depth=2, norm="group")
    loss = LabelSetLoss(torch.rand(CLASSES) + 0.5, 1.0)
    images, labels = torch.randn(4, 4, 16, 16), random_labels(5, (4, 16, 16))

    def run(cuts: list[slice]) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        totals = [loss(model(images[cut]), labels[cut]).total for cut in cuts]
        (torch.cat(totals).sum() / len(images)).backward()
        return torch.cat(totals).detach(), [
            p.grad.clone() for p in model.parameters() if p.grad is not None
        ]

    whole = run([slice(0, 4)])
    torch.testing.assert_close(run([slice(i, i + 1) for i in range(4)]), whole)
    torch.testing.assert_close(run([slice(0, 1), slice(1, 4)]), whole)


def test_smaller_logits_take_the_middle_of_the_labels() -> None:
    logits, labels = torch.randn(2, CLASSES, 4, 6), random_labels(6, (2, 10, 10))
    loss = LabelSetLoss(torch.ones(CLASSES), 1.0)
    torch.testing.assert_close(loss(logits, labels), loss(logits, labels[:, 3:7, 2:8]))


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits, labels = torch.randn(2, CLASSES, 8, 8).bfloat16(), random_labels(7, (2, 8, 8))
    loss = LabelSetLoss(torch.ones(CLASSES), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(logits, labels)
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found, loss(logits.float(), labels))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 4, 8, 8), (2, 4, 9, 8)])
def test_shapes_that_do_not_go_together_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="logits"):
        LabelSetLoss(torch.ones(CLASSES), 1.0)(torch.zeros(shape), random_labels(0, (2, 8, 8)))


def test_more_classes_than_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 15"):
        LabelSetLoss(torch.ones(16), 1.0)


@settings(deadline=None)
@given(
    pixels=st.lists(st.integers(0, 10**12), min_size=1, max_size=15),
    kind=st.sampled_from(["none", "sqrt", "inverse"]),
    maximum=st.sampled_from([1.0, 3.0, 20.0]),
)
def test_class_weights(pixels: list[int], kind: str, maximum: float) -> None:
    weights = class_weights(pixels, kind, maximum)  # type: ignore[arg-type]
    assert weights.shape == (len(pixels),)
    assert weights.dtype == torch.float32
    assert weights.max() / weights.min() <= maximum * (1 + 1e-5)
    if sum(pixels) == 0 or kind == "none":
        assert (weights == 1).all()
        return
    mean = sum(w * n for w, n in zip(weights.tolist(), pixels, strict=True)) / sum(pixels)
    assert mean == pytest.approx(1, rel=1e-5)
    present = [w for w, n in zip(weights.tolist(), pixels, strict=True) if n]
    assert all(w == max(present) for w, n in zip(weights.tolist(), pixels, strict=True) if not n)


def test_class_weights_go_with_the_frequency() -> None:
    sqrt = class_weights([900, 100, 0], "sqrt", 20)
    assert sqrt[1] / sqrt[0] == pytest.approx(3)
    assert sqrt[2] == sqrt[1]
    inverse = class_weights([900, 100], "inverse", 20)
    assert inverse[1] / inverse[0] == pytest.approx(9)
    limited = class_weights([900, 100], "inverse", 5)
    assert limited[1] / limited[0] == pytest.approx(5)
