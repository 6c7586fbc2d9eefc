"""The invariant mode: one order of summation, hence the same bits on any number of ranks."""

from __future__ import annotations

import hashlib
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from agrivision.config import OptimizerConfig
from agrivision.data.order import share
from agrivision.distributed import Ranks, connected
from agrivision.errors import ConfigurationError, PeerLost
from agrivision.model.unet import UNet
from agrivision.training.invariant import CanonicalGradients, Tree, subtrees
from agrivision.training.optimizer import Optimizer
from agrivision.world import World
from tests.ranks import run

SAMPLES, CLASSES, STEPS = 15, 3, 6  # 8 micro-batches of 2, the last has one


def recursive(values: list[np.float32]) -> np.float32:
    """The tree from above: the left half is the largest power of two of leaves that leaves a rest."""
    if len(values) == 1:
        return values[0]
    half = 1 << (len(values) - 1).bit_length() - 1
    return recursive(values[:half]) + recursive(values[half:])


@pytest.mark.parametrize("ranks", range(1, 6))
@pytest.mark.parametrize("leaves", range(1, 18))
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_ranks_subtrees_complete_to_the_same_bits(leaves: int, ranks: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    values = (random.normal(size=(leaves, 3)) * 10.0 ** random.integers(-4, 5, (leaves, 3))).astype(
        "f4"
    )
    whole = Tree(leaves)
    for rank in range(ranks):
        mine = range(leaves)[share(leaves, rank, ranks)]
        part = Tree(leaves)
        for leaf in mine:
            part.push((0, leaf), [torch.tensor(values[leaf])])
            assert len(part.open) <= 2 * leaves.bit_length()
        assert [node for node, _ in part.open] == subtrees(mine, leaves)
        for node, sums in part.open:
            whole.push(node, sums)
    ((_, (total,)),) = whole.open
    assert total.numpy().tobytes() == recursive(list(values)).tobytes()


def test_order_shows_in_the_bits() -> None:
    """What the test above compares is not the same in any order."""
    values = np.float32([1e8, 1, -1e8, 1, 3])
    assert recursive(list(values)) != values[0] + values[1] + values[2] + values[3] + values[4]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_powers_of_two_have_one_subtree_each(ranks: int) -> None:
    assert all(len(subtrees(range(16)[share(16, rank, ranks)], 16)) == 1 for rank in range(ranks))


class Network(nn.Module):
    """A UNet, and all that a model may have besides: what is frozen, seldom or never used, constant."""

    def __init__(self, norm: str = "batch") -> None:
        super().__init__()
        self.unet = UNet(4, CLASSES, base_channels=4, depth=2, norm=norm, dropout=0.3)
        self.unet.head.bias.requires_grad_(False)
        self.seldom = nn.Parameter(torch.ones(3))
        self.never = nn.Parameter(torch.ones(2))
        self.register_buffer("constant", torch.full((2,), 0.1))

    def forward(self, images: Tensor, micro_batch: int) -> Tensor:
        logits = self.unet(images)
        if micro_batch % 2:
            logits = logits * self.seldom[:, None, None]
        return logits + self.constant.sum()


def make_network(norm: str = "batch") -> Network:
    torch.manual_seed(0)
    return Network(norm).to(memory_format=torch.channels_last)


def make_batch(step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(step)
    images = torch.randn(SAMPLES, 4, 16, 16, generator=random)
    return images, torch.randint(CLASSES, (SAMPLES, 16, 16), generator=random)


def micro_batch_losses(model: Network, batch: tuple[Tensor, Tensor], index: int, size: int) -> Tensor:
    """The loss of each sample of a micro-batch; its dropout is seeded by its number."""
    part = slice(index * size, min((index + 1) * size, SAMPLES))
    torch.manual_seed(index)
    logits = model(batch[0][part], index)
    return F.cross_entropy(logits, batch[1][part], reduction="none").mean((1, 2))


def accumulate(
    gradients: CanonicalGradients, model: Network, batch: tuple[Tensor, Tensor], size: int
) -> Tensor:
    for index in gradients.mine:
        gradients.begin()
        losses = micro_batch_losses(model, batch, index, size)
        (losses.sum() / SAMPLES).backward()
        gradients.add(index, torch.stack([losses.sum(), losses.square().sum()]).detach())
    return gradients.finish()


def train_by_hand(folder: Path, rank: int) -> None:
    """Six steps with micro-batches of each size; writes a digest of all that they left."""
    world = World.from_environment()
    with connected(world, torch.device("cpu")) as ranks:
        for size in (2, 3):
            model = make_network()
            optimizer = Optimizer(model, OptimizerConfig(lr=0.01, clip_norm=1.0))
            count = -(-SAMPLES // size)
            gradients = CanonicalGradients(model, ranks, micro_batches=count, losses=2)
            digest = hashlib.sha256()
            for step in range(STEPS):
                losses = accumulate(gradients, model, make_batch(step), size)
                digest.update(losses.numpy().tobytes() + optimizer.clip().numpy().tobytes())
                optimizer.step(0.01)
            for name, value in (model.state_dict() | optimizer.state_dict()).items():
                digest.update(name.encode() + value.numpy().tobytes())
            path = folder / f"{world.size}-{rank}-{size}"
            path.write_text(digest.hexdigest())


def test_weights_are_the_same_bits_on_any_number_of_ranks(tmp_path: Path) -> None:
    for ranks in (1, 2, 3, 4):
        found = run(["--version"], ranks, hook=partial(train_by_hand, tmp_path))
        assert found == [0] * ranks
    digests = {}
    for path in tmp_path.iterdir():
        digests.setdefault(path.name[-1], set()).add(path.read_text())
    assert {size: len(found) for size, found in digests.items()} == {"2": 1, "3": 1}
    # Another way to cut the batch gives other bits: the digests tell what they should.
    assert len(set.union(*digests.values())) == 2


def alone(model: Network, size: int) -> CanonicalGradients:
    return CanonicalGradients(model, Ranks(World()), micro_batches=-(-SAMPLES // size), losses=2)


@pytest.mark.parametrize("size", [1, 2, 4, SAMPLES])
def test_gradient_and_losses_are_those_of_the_whole_batch(size: int) -> None:
    model, (images, labels) = make_network("group").double(), make_batch(0)
    batch = (images.double(), labels)
    sums = accumulate(alone(model, size), model, batch, size)
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    parts = [micro_batch_losses(model, batch, n, size) for n in range(-(-SAMPLES // size))]
    losses = torch.cat(parts)
    losses.mean().backward()
    torch.testing.assert_close(sums, torch.stack([losses.sum(), losses.square().sum()]).detach())
    assert found.pop("unet.head.bias") is None
    assert torch.equal(found.pop("never"), torch.zeros(2, dtype=torch.float64))
    if size == SAMPLES:  # one micro-batch, whose number is even
        assert torch.equal(found.pop("seldom"), torch.zeros(3, dtype=torch.float64))
    for name, gradient in found.items():
        wanted = model.get_parameter(name).grad
        assert wanted.abs().max() > 0
        assert gradient.stride() == wanted.stride()
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-14)


def test_running_statistics_are_means_of_what_each_micro_batch_made() -> None:
    model, size = make_network(), 2
    gradients = alone(model, size)
    accumulate(gradients, model, make_batch(0), size)  # the second step begins with other values
    start = {name: buffer.clone() for name, buffer in model.named_buffers()}
    made = []
    for index in range(8):
        model.load_state_dict(start, strict=False)
        micro_batch_losses(model, make_batch(1), index, size)
        made.append({name: buffer.clone() for name, buffer in model.named_buffers()})
    model.load_state_dict(start, strict=False)
    accumulate(gradients, model, make_batch(1), size)
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer == 2
        elif name == "constant":
            assert torch.equal(buffer, torch.full((2,), 0.1))
        else:
            mean = torch.stack([values[name] for values in made]).mean(0)
            assert not torch.equal(buffer, start[name])
            torch.testing.assert_close(buffer, mean, rtol=1e-5, atol=1e-7)


def test_gradients_keep_their_memory_from_step_to_step() -> None:
    model = make_network()
    gradients = alone(model, 2)
    places = set()
    for step in range(3):
        accumulate(gradients, model, make_batch(step), 2)
        places.add(tuple(p.grad.data_ptr() for p in model.parameters() if p.requires_grad))
    assert len(places) == 1


def test_losses_of_a_step_outlive_the_next() -> None:
    model = make_network()
    gradients = alone(model, 2)
    first = accumulate(gradients, model, make_batch(0), 2)
    kept = first.clone()
    accumulate(gradients, model, make_batch(1), 2)
    assert torch.equal(first, kept)


def test_a_step_that_is_not_finite_leaves_no_trace() -> None:
    """Once the caller has put the buffers back, the next step is what it would have been without."""
    model, images = make_network(), make_batch(0)[0]
    gradients, start = alone(model, 2), {name: b.clone() for name, b in model.named_buffers()}
    images[5] = float("inf")
    assert not accumulate(gradients, model, (images, make_batch(0)[1]), 2).isfinite().any()
    assert not model.unet.head.weight.grad.isfinite().any()
    model.load_state_dict(start, strict=False)
    fresh = make_network()
    wanted = accumulate(alone(fresh, 2), fresh, make_batch(1), 2)
    assert torch.equal(accumulate(gradients, model, make_batch(1), 2), wanted)
    assert torch.equal(model.unet.head.weight.grad, fresh.unet.head.weight.grad)
    for buffer, value in zip(model.buffers(), fresh.buffers(), strict=True):
        assert torch.equal(buffer, value)


def test_micro_batches_come_once_and_in_order() -> None:
    model = make_network()
    gradients = alone(model, 2)
    gradients.begin()
    with pytest.raises(ValueError, match="micro-batch 1 is added in the place of 0"):
        gradients.add(1, torch.zeros(2))
    for index in range(7):
        gradients.add(index, torch.zeros(2))
    with pytest.raises(ValueError, match="micro-batch 7 is missing"):
        gradients.finish()
    gradients.add(7, torch.zeros(2))
    gradients.finish()
    with pytest.raises(ValueError, match="micro-batch 8 is added in the place of 0"):
        gradients.add(8, torch.zeros(2))


def test_each_rank_needs_a_micro_batch() -> None:
    with pytest.raises(ConfigurationError, match=r"2 micro-batches .* 3 ranks: lower"):
        CanonicalGradients(make_network(), Ranks(World(size=3)), micro_batches=2)


def lose_a_rank(rank: int) -> None:
    """Rank 1 leaves before the ranks exchange anything; rank 0 says so by its exit code."""
    with connected(World.from_environment(), torch.device("cpu")) as ranks:
        model = make_network()
        gradients = CanonicalGradients(model, ranks, micro_batches=8, losses=2)
        if rank == 1:
            os._exit(0)
        try:
            accumulate(gradients, model, make_batch(0), 2)
        except PeerLost as error:
            sys.exit(7 if "\n" not in str(error) else 8)


def test_a_lost_rank_is_one_line() -> None:
    assert run(["--version"], 2, hook=lose_a_rank) == [7, 0]
