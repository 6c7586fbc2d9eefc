from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agrivision.config import LossConfig
from agrivision.errors import ConfigurationError
from agrivision.model.expansion import double
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


def slow(logits: Tensor, labels: Tensor, weights: Tensor, config: LossConfig) -> SampleLosses:
    """Pixel by pixel, as the docstrings say, in float64; without borders and the Lovász part."""
    rows = []
    for sample, truth in zip(logits.double().softmax(1), labels, strict=True):
        entropy = pnc = 0.0
        tp, fp, fn = ([0.0] * CLASSES for _ in range(3))
        here: set[int] = set()
        for i, j in itertools.product(range(truth.shape[0]), range(truth.shape[1])):
            members = {c for c in range(CLASSES) if truth[i, j] >> c & 1}
            if not truth[i, j] & VALID or not members:
                continue
            here |= members
            p = sample[:, i, j].tolist()
            hit = sum(p[c] for c in members)
            mean = sum(float(weights[c]) for c in members) / len(members)
            entropy -= max(1 - hit, 0) ** config.focal_gamma * math.log(hit) * mean
            for c in range(CLASSES):
                if c in members:
                    tp[c] += hit
                    fn[c] += 1 - hit
                else:
                    fp[c] += p[c] * len(members)
                found, wanted = (hit, 1) if c in members else (p[c], 0)
                square = (wanted - found) ** 2
                ratio = (1 - square + 1e-5) / (1 + square + 1e-5)
                share = float(weights[c] / weights.sum())
                pnc += share * (1 + wanted + found) * (square - math.log(ratio))
        alpha, beta = config.tversky_alpha, config.tversky_beta
        index = [(tp[c] + 0.5) / (tp[c] + alpha * fp[c] + beta * fn[c] + 0.5) for c in here]
        scores = [(1 - score) ** (1 / config.tversky_gamma) for score in index]
        dice = sum(scores) / len(scores) if scores and config.dice_weight else 0.0
        entropy, pnc = entropy / truth.numel(), pnc / truth.numel() if config.pnc_weight else 0.0
        total = entropy + config.dice_weight * dice + config.pnc_weight * pnc
        rows.append([total, entropy, dice, 0.0, pnc])
    return SampleLosses(*torch.tensor(rows).T)


def frozen(logits: Tensor, labels: Tensor, weights: Tensor, dice_weight: float) -> tuple[Tensor, ...]:
    """Total, cross-entropy and Dice by the operations of the loss before it had anything more."""
    bit = torch.arange(CLASSES, dtype=torch.int32).reshape(-1, 1, 1)
    sets = (labels & (2**CLASSES - 1)) * ((labels >> 15) & 1)
    of_set = ((torch.arange(2**CLASSES).unsqueeze(1) >> torch.arange(CLASSES)) & 1).float()
    size_of_set = of_set.sum(1)
    weight_of_set = (of_set * weights).sum(1) / size_of_set.clamp(min=1)
    member = ((sets.unsqueeze(1) >> bit) & 1).bool()
    log_probability = torch.nn.functional.log_softmax(logits.float(), dim=1)
    out = ~member & (sets != 0).unsqueeze(1)
    log_hit = torch.logsumexp(log_probability.masked_fill(out, float("-inf")), dim=1)
    entropy = -(log_hit * weight_of_set[sets]).sum((1, 2)) / (sets.shape[1] * sets.shape[2])
    if not dice_weight:
        return entropy, entropy, torch.zeros_like(entropy)
    pixels = member.sum((2, 3))
    hits = (member * log_hit.exp().unsqueeze(1)).sum((2, 3))
    wrong = (log_probability.exp() * (~member * size_of_set[sets].unsqueeze(1))).sum((2, 3))
    score = (2 * hits + 1.0) / (hits + pixels + wrong + 1.0)
    dice = ((1 - score) * (pixels > 0)).sum(1) / (pixels > 0).sum(1).clamp(min=1)
    return entropy + dice_weight * dice, entropy, dice


@pytest.mark.parametrize("dice_weight", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_default_every_bit_is_what_it_always_was(dice_weight: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights, labels = torch.rand(CLASSES) + 0.5, random_labels(0, (3, 37, 50))
    logits = (3 * torch.randn(3, CLASSES, 37, 50)).to(dtype).requires_grad_()
    found = LabelSetLoss(weights, LossConfig(dice_weight=dice_weight))(logits, labels)
    wanted = frozen(logits, labels, weights, dice_weight)
    for one, other in zip(found, wanted, strict=False):
        assert torch.equal(one, other)
    gradients = [torch.autograd.grad(total.sum(), logits) for total in (found.total, wanted[0])]
    assert torch.equal(*(gradient for (gradient,) in gradients))


# Each addition by itself, and all of them.
FURTHER = {
    "focal": LossConfig(focal_gamma=2.0),
    "focal below one": LossConfig(focal_gamma=0.5),
    "tversky": LossConfig(tversky_alpha=0.3, tversky_beta=0.7),
    "focal tversky": LossConfig(tversky_gamma=4 / 3),
    "pnc": LossConfig(pnc_weight=0.5),
    "lovasz": LossConfig(lovasz_weight=0.8),
    "border weight": LossConfig(border_weight=10.0, border_sigma=1.0),
    "border smoothing": LossConfig(border_smoothing=0.3, border_sigma=1.0),
    "all": LossConfig(
        focal_gamma=1.5,
        tversky_alpha=0.3,
        tversky_beta=0.7,
        tversky_gamma=4 / 3,
        pnc_weight=0.5,
        lovasz_weight=0.8,
        border_weight=5.0,
        border_sigma=1.5,
        border_smoothing=0.2,
    ),
}
each = pytest.mark.parametrize("config", FURTHER.values(), ids=FURTHER.keys())
PLAIN = ("focal", "focal below one", "tversky", "focal tversky", "pnc")


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    config=st.sampled_from([LossConfig(), LossConfig(dice_weight=0.5), *map(FURTHER.get, PLAIN)]),
)
def test_losses_are_those_of_the_slow_reference(seed: int, config: LossConfig) -> None:
    torch.manual_seed(seed)
    logits, labels = 3 * torch.randn(2, CLASSES, 4, 5), random_labels(seed, (2, 4, 5))
    weights = torch.rand(CLASSES) + 0.5
    found = LabelSetLoss(weights, config)(logits, labels)
    # Where a wrong class is nearly certain, 1 - e² of the balance term is a difference of float32 close
    # to its 1e-5: half a percent of one logarithm.
    close = 1e-3 if config.pnc_weight else 2e-5
    torch.testing.assert_close(found, slow(logits, labels, weights, config), rtol=2e-5, atol=close)


def test_without_dice_there_is_only_cross_entropy() -> None:
    logits, labels = torch.randn(2, CLASSES, 4, 5), random_labels(0, (2, 4, 5))
    losses = LabelSetLoss(torch.ones(CLASSES), LossConfig(dice_weight=0))(logits, labels)
    assert torch.equal(losses.total, losses.cross_entropy)
    assert losses.dice.tolist() == [0, 0]


def test_labels_of_one_class_give_the_usual_cross_entropy() -> None:
    logits, ids = torch.randn(2, CLASSES, 6, 6), torch.randint(CLASSES, (2, 6, 6))
    labels = (1 << ids).int() | VALID
    found = LabelSetLoss(torch.ones(CLASSES), LossConfig(dice_weight=0))(logits, labels).total.mean()
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits, ids))


@each
@pytest.mark.parametrize("magnitude", [0.0, 1e-4, 1.0, 1e4, 1e30])
def test_gradients_are_finite_however_extreme_the_logits(magnitude: float, config: LossConfig) -> None:
    labels = random_labels(1, (3, 8, 8))
    labels[2] &= VALID - 1  # no valid pixel at all
    logits = (torch.randint(-1, 2, (3, CLASSES, 8, 8)) * magnitude).requires_grad_()
    losses = LabelSetLoss(torch.ones(CLASSES), config)(logits, labels)
    losses.total.sum().backward()
    assert losses.total.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert losses.total[2] == 0
    assert not logits.grad[2].any()


@each
def test_gradients_are_those_of_differences(
    config: LossConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    loss = LabelSetLoss(torch.tensor([0.5, 1.0, 2.0, 1.5]), config)
    labels = random_labels(2, (2, 4, 5))
    torch.manual_seed(0)
    logits = torch.randn(2, CLASSES, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: loss(values, labels).total, logits)


@each
def test_pixels_that_are_not_valid_have_no_gradient(config: LossConfig) -> None:
    labels = random_labels(3, (2, 8, 8))
    logits = torch.randn(2, CLASSES, 8, 8, requires_grad=True)
    LabelSetLoss(torch.ones(CLASSES), config)(logits, labels).total.sum().backward()
    counts = ((labels & VALID) != 0) & ((labels & (2**CLASSES - 1)) != 0)
    assert logits.grad is not None
    assert not logits.grad.movedim(1, 3)[~counts].any()


@each
def test_perfect_predictions_cost_next_to_nothing(config: LossConfig) -> None:
    labels = random_labels(4, (2, 16, 16)) & ~1 | 2 | VALID
    logits = torch.full((2, CLASSES, 16, 16), -30.0)
    logits[:, 1] = 30  # one of several right answers
    losses = LabelSetLoss(torch.ones(CLASSES), config)(logits, labels)
    # A root has no slope next to nothing, where it would be infinite.
    assert losses.total.abs().max() < (1e-4 if config.tversky_gamma > 1 else 1e-5)


@each
def test_every_addition_makes_a_difference(config: LossConfig) -> None:
    logits, labels = torch.randn(2, CLASSES, 8, 8), random_labels(4, (2, 8, 8))
    plain, more = (
        LabelSetLoss(torch.ones(CLASSES), one)(logits, labels) for one in (LossConfig(), config)
    )
    assert (plain.total != more.total).all()


@each
def test_a_loss_takes_nothing_from_other_samples(config: LossConfig) -> None:
    """Bit for bit, where kernels add up in one order: on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        loss = LabelSetLoss(torch.rand(CLASSES) + 0.5, config)
        labels = random_labels(5, (4, 32, 48))
        logits = (2 * torch.randn(4, CLASSES, 32, 48)).requires_grad_()
        coarse = torch.randn(4, CLASSES, 16, 24)
        whole = loss([logits, coarse], labels)
        (gradient,) = torch.autograd.grad(whole.total.sum(), logits)
        for sample in range(4):
            one = slice(sample, sample + 1)
            alone = logits[one].detach().clone().requires_grad_()
            found = loss([alone, coarse[one]], labels[one])
            assert all(torch.equal(a, b[one]) for a, b in zip(found, whole, strict=True))
            assert torch.equal(torch.autograd.grad(found.total.sum(), alone)[0], gradient[one])
    finally:
        torch.set_num_threads(threads)


def test_a_batch_is_its_samples() -> None:
    torch.manual_seed(0)
    model = UNet(4, CLASSES, base_channels=4, depth=2, norm="group")
    loss = LabelSetLoss(torch.rand(CLASSES) + 0.5, LossConfig())
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
    loss = LabelSetLoss(torch.ones(CLASSES), LossConfig())
    torch.testing.assert_close(loss(logits, labels), loss(logits, labels[:, 3:7, 2:8]))


@each
def test_half_precision_logits_are_summed_in_float32(config: LossConfig) -> None:
    logits, labels = torch.randn(2, CLASSES, 8, 8).bfloat16(), random_labels(7, (2, 8, 8))
    loss = LabelSetLoss(torch.ones(CLASSES), config)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(logits, labels)
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found, loss(logits.float(), labels))


@pytest.mark.faults
def test_a_compiled_loss_is_the_same() -> None:
    """Traced, without fusing anything, which would need a C++ compiler."""
    loss = LabelSetLoss(torch.ones(CLASSES), FURTHER["all"])
    compiled = torch.compile(loss, dynamic=False, backend="aot_eager")
    for seed in (0, 1):
        labels = random_labels(seed, (2, 16, 16))
        logits = torch.randn(2, CLASSES, 16, 16, requires_grad=True)
        wanted, found = loss(logits, labels), compiled(logits, labels)
        torch.testing.assert_close(tuple(found), tuple(wanted))
        gradients = [torch.autograd.grad(one.total.sum(), logits)[0] for one in (found, wanted)]
        torch.testing.assert_close(*gradients)


def test_the_total_is_the_parts_by_their_weights() -> None:
    config = LossConfig(dice_weight=0.5, lovasz_weight=0.3, pnc_weight=2.0)
    loss = LabelSetLoss(torch.ones(CLASSES), config)
    found = loss(torch.randn(2, CLASSES, 8, 8), random_labels(8, (2, 8, 8)))
    whole = found.cross_entropy + 0.5 * found.dice + 0.3 * found.lovasz + 2 * found.pnc
    torch.testing.assert_close(found.total, whole)
    assert loss.parts == ("total", "cross_entropy", "dice", "lovasz", "pnc")
    assert torch.equal(loss.reported(found), torch.stack(found))
    assert LabelSetLoss(torch.ones(CLASSES), LossConfig(dice_weight=0)).parts == loss.parts[:3]


def test_near_borders_a_label_of_the_neighbourhood_is_half_right() -> None:
    """Left of the border class 0, right of it class 1; nothing changes beyond three sigmas."""
    ids = (torch.arange(16) >= 8).int().expand(1, 4, 16)
    labels = (1 << ids) | VALID
    logits = torch.randn(1, CLASSES, 4, 16)
    probability = logits.softmax(1)[0]
    hit = probability.gather(0, ids.long()).log()
    tolerant = probability[:2].sum(0).log()
    distance = torch.tensor([*range(7, -1, -1), *range(8)])
    share = 0.4 * torch.exp(-(distance**2) / 2.0) * (distance <= 3)
    config = LossConfig(dice_weight=0, border_smoothing=0.4, border_sigma=1.0)
    found = LabelSetLoss(torch.ones(CLASSES), config)(logits, labels).total
    torch.testing.assert_close(found[0], -((1 - share) * hit + share * tolerant).mean())


def test_near_borders_pixels_weigh_more() -> None:
    labels = (1 << (torch.arange(16) >= 8).int().expand(1, 4, 16)) | VALID
    logits = torch.randn(1, CLASSES, 4, 16)
    hit = logits.log_softmax(1)[0].gather(0, ((labels & 2) >> 1).long())
    distance = torch.tensor([*range(7, -1, -1), *range(8)])
    weight = 1 + 10 * torch.exp(-(distance**2) / 2.0) * (distance <= 3)
    config = LossConfig(dice_weight=0, border_weight=10, border_sigma=1.0)
    found = LabelSetLoss(torch.ones(CLASSES), config)(logits, labels).total
    torch.testing.assert_close(found[0], -(weight * hit).mean())


def test_borders_beyond_smaller_logits_are_seen() -> None:
    """Those of a UNet without padding: the labels go on where the logits end."""
    labels = (1 << (torch.arange(12) >= 3).int().expand(1, 12, 12)) | VALID
    logits = torch.randn(1, CLASSES, 6, 6)
    config = LossConfig(dice_weight=0, border_weight=10, border_sigma=2.0)
    full = torch.zeros(1, CLASSES, 12, 12)
    full[:, :, 3:9, 3:9] = logits
    loss = LabelSetLoss(torch.ones(CLASSES), config)
    small, large = loss(logits, labels).total * 36, loss(full, labels).total * 144
    full[:, :, 3:9, 3:9] = 0
    torch.testing.assert_close(
        small - loss(0 * logits, labels).total * 36,
        large - loss(full, labels).total * 144,
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_coarser_logits_are_doubled_and_weigh_less(decay: float) -> None:
    config = LossConfig(lovasz_weight=1.0, deep_supervision_decay=decay)
    loss = LabelSetLoss(torch.rand(CLASSES) + 0.5, config)
    labels = random_labels(9, (2, 16, 24))
    levels = [torch.randn(2, CLASSES, 16 >> k, 24 >> k, requires_grad=True) for k in range(3)]
    found = loss(tuple(levels), labels)
    alone = [
        loss(
            torch.nn.functional.interpolate(level, scale_factor=2**k, mode="bilinear")
            if k < 2
            else double(double(level)),
            labels,
        )
        for k, level in enumerate(levels)
    ]
    weights = torch.tensor([1.0, decay, decay**2])
    torch.testing.assert_close(
        found.total, sum(w * one.total for w, one in zip(weights / weights.sum(), alone, strict=True))
    )
    assert all(torch.equal(a, b) for a, b in zip(found[1:], alone[0][1:], strict=True))
    found.total.sum().backward()
    assert all(bool(level.grad.any()) == bool(w) for level, w in zip(levels, weights, strict=True))
    one, plain = loss([levels[0]], labels), loss(levels[0], labels)
    assert torch.equal(one.total, plain.total)


def test_coarser_logits_of_more_than_the_first_show_are_cut() -> None:
    """As those of a UNet without padding are: 2 * 10 pixels at the side for 16."""
    loss = LabelSetLoss(torch.ones(CLASSES), LossConfig())
    labels, coarse = random_labels(10, (1, 16, 16)), torch.randn(1, CLASSES, 10, 10)
    found = loss([torch.zeros(1, CLASSES, 16, 16), coarse], labels).total
    alone = [
        loss(one, labels).total
        for one in (torch.zeros(1, CLASSES, 16, 16), double(coarse)[..., 2:18, 2:18])
    ]
    torch.testing.assert_close(found, (alone[0] + 0.5 * alone[1]) / 1.5)
    with pytest.raises(ValueError, match="level 1"):
        loss([torch.zeros(1, CLASSES, 16, 16), coarse[..., :7]], labels)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 4, 8, 8), (2, 4, 9, 8)])
def test_shapes_that_do_not_go_together_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="logits"):
        LabelSetLoss(torch.ones(CLASSES), LossConfig())(torch.zeros(shape), random_labels(0, (2, 8, 8)))


def test_more_classes_than_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 15"):
        LabelSetLoss(torch.ones(16), LossConfig())


@settings(deadline=None)
@given(
    pixels=st.lists(st.integers(0, 10**12), min_size=1, max_size=15),
    kind=st.sampled_from(["none", "sqrt", "inverse", "effective"]),
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


def test_effective_numbers_count_tiles() -> None:
    """A class of few tiles weighs by its frequency; those of very many weigh the same."""
    tile = 1000

    def weights(tiles: list[float], beta: float) -> list[float]:
        pixels = [tile * count for count in tiles]
        return class_weights(pixels, "effective", 1e9, beta=beta, tile_pixels=tile).tolist()

    def effective(count: float) -> float:
        return (1 - 0.99**count) / (1 - 0.99)

    found = weights([5, 80, 3000], 0.99)
    for one, count in zip(found, [5, 80, 3000], strict=True):
        assert one / found[0] == pytest.approx(effective(5) / effective(count))
    many = weights([1e5, 1e7], 0.99)
    assert many[0] == pytest.approx(many[1])
    few = weights([1e-3, 1e-2], 0.99)
    assert few[0] / few[1] == pytest.approx(10, rel=1e-3)
    assert weights([3, 40], 0.0) == [1, 1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("focal_gamma", -1),
        ("tversky_alpha", -0.1),
        ("tversky_beta", float("nan")),
        ("tversky_gamma", 0.5),
        ("lovasz_weight", -1),
        ("pnc_weight", float("inf")),
        ("border_weight", -1),
        ("border_sigma", 0),
        ("border_smoothing", 1.0),
        ("effective_beta", 1.0),
        ("deep_supervision_decay", 1.5),
    ],
)
def test_values_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"loss.{key} is"):
        LossConfig(**{key: value})
