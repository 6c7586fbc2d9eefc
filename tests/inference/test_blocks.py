"""Windows, blocks and their sums: every pixel once, and the same numbers whoever adds them up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from agrivision import PredictOptions, predict_array
from agrivision.config import ModelConfig
from agrivision.errors import BadInput, Interrupted
from agrivision.inference import tiling as tilings
from agrivision.inference.assemble import assemble, keep
from agrivision.inference.blend import ONE, add_up, decide
from agrivision.inference.predictor import Predictor, positions
from agrivision.inference.reading import ArrayPixels, read_block
from agrivision.inference.store import BlockFolder, Memory
from agrivision.inference.tiling import Axis, Grid, Tiling
from agrivision.inference.trained import TrainedModel
from agrivision.model.folding import folded
from agrivision.model.unet import UNet
from tests.inference.small import smooth, trained_model

sizes = st.builds(
    lambda length, tile, share, block: (length, tile, int(tile * share / 2), block),
    st.integers(1, 300),
    st.integers(1, 60),
    st.floats(0, 1),
    st.integers(1, 120),
)


@settings(deadline=None, max_examples=300)
@given(size=sizes)
def test_cells_cover_a_side_once_and_weights_add_up_to_one(size: tuple[int, int, int, int]) -> None:
    length, tile, overlap, block = size
    with mock.patch.object(tilings, "_BLOCK", block):
        axis = Axis(tile=tile, stride=tile - overlap, length=length)
        total = np.zeros(length + 2 * tile)
        for window in range(axis.windows):
            start = axis.start(window)
            assert start < length
            total[start : start + tile] += axis.weights(window)
        np.testing.assert_allclose(total[:length], 1, atol=1e-6)
        ends = [0]
        members: list[int] = []
        for number in range(axis.blocks):
            (begin, end), cell = axis.extent(number), axis.cell(number)
            assert cell[0] == begin == ends[-1]
            assert begin < cell[1] <= end <= length
            if number < axis.blocks - 1:
                assert end - cell[1] == overlap  # what the next block has a say in
            ends.append(cell[1])
            members += axis.members(number)
        assert ends[-1] == length
        assert members == list(range(axis.windows))


class Painted:
    """A predictor that says something else of each window: noise that is drawn from its pixels."""

    device = torch.device("cpu")

    def __init__(self, classes: int) -> None:
        self.description = mock.Mock(classes=tuple("abcdefgh"[:classes]))

    def probabilities(self, images: torch.Tensor, margin: int) -> torch.Tensor:
        found = []
        for image in images:
            seed = int(image.to(torch.int64).sum())
            draw = torch.rand(
                (len(self.description.classes), *image.shape[1:]),
                generator=torch.Generator().manual_seed(seed),
            )
            inner = slice(margin, image.shape[-1] - margin)
            found.append((draw / draw.sum(0))[:, inner, inner])
        return torch.stack(found)


def maps(
    pixels: ArrayPixels,
    tiling: Tiling,
    predictor: Any,
    order: Callable[[int], Sequence[int]],
    store: Any,
) -> list[np.ndarray]:
    grid = Grid.of(tiling, pixels.height, pixels.width)
    for number in order(grid.blocks):
        block = grid.block(number)
        cut = read_block(pixels, block, tiling)
        sums = add_up(predictor, cut, grid, block, tiling, batch_size=3, report=lambda _: None)
        keep(store, grid, block, sums, cut.valid, probabilities=True)
    classes = len(predictor.description.classes)
    whole = np.zeros((2 + classes, pixels.height, pixels.width), np.uint8)
    for (left, top, right, bottom), values in assemble(store, grid, classes, probabilities=True):
        assert values.probabilities is not None
        whole[0, top:bottom, left:right] = values.ids
        whole[1, top:bottom, left:right] = values.confidence
        whole[2:, top:bottom, left:right] = values.probabilities
    return list(whole)


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    tile=st.integers(4, 24),
    overlap=st.floats(0, 0.5),
    margin=st.integers(0, 5),
    block=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
)
def test_blocks_give_what_one_block_gives(
    height: int, width: int, tile: int, overlap: float, margin: int, block: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    image = generator.integers(1, 200, (2, height, width), dtype=np.uint8)
    pixels = ArrayPixels(image, generator.random((height, width)) < 0.7)
    tiling = Tiling(tile=tile, margin=margin, overlap=int(tile * overlap))
    predictor = Painted(3)
    with mock.patch.object(tilings, "_BLOCK", 10**6):
        whole = maps(pixels, tiling, predictor, range, Memory())
    with mock.patch.object(tilings, "_BLOCK", block):
        backwards = maps(pixels, tiling, predictor, lambda count: range(count)[::-1], Memory())
    np.testing.assert_array_equal(np.stack(whole), np.stack(backwards))
    ids, confidence, *probabilities = whole
    assert ((ids == 255) == ~pixels.valid).all()
    assert ((confidence == 0) == ~pixels.valid).all()
    total = np.stack(probabilities).astype(int).sum(0)[pixels.valid]
    assert (np.abs(total - 255) <= 3).all()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_number_of_threads_decides_nothing(tmp_path: Path, batch_size: int) -> None:
    """Of a network so wide that torch rounds otherwise where threads share an operation."""
    wide = trained_model(tmp_path, model=ModelConfig(base_channels=32, depth=2, norm="none"))
    image = smooth(np.random.default_rng(6), 200, 220)
    options = PredictOptions(tile=160, overlap=16, batch_size=batch_size)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(predict_array(wide, image, options).probabilities)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_work_that_is_stopped_leaves_no_threads(trained: TrainedModel) -> None:
    image = smooth(np.random.default_rng(6), 150, 170)
    tiling, predictor = Tiling(tile=32, margin=8, overlap=8), Predictor.of([trained])
    grid, asked = Grid.of(tiling, 150, 170), iter(range(9))
    cut = read_block(ArrayPixels(image, image[0] > 0), grid.block(0), tiling)
    with pytest.raises(Interrupted):
        add_up(
            predictor, cut, grid, grid.block(0), tiling, batch_size=2, report=lambda _: None,
            stop=lambda: next(asked) == 5,
        )  # fmt: skip
    assert not [each for each in threading.enumerate() if each.name.startswith("compute")]


def test_files_hold_what_memory_holds(tmp_path: Any) -> None:
    generator = np.random.default_rng(2)
    pixels = ArrayPixels(smooth(generator, 70, 90), np.ones((70, 90), np.bool_))
    tiling = Tiling(tile=16, margin=4, overlap=6)
    with mock.patch.object(tilings, "_BLOCK", 30):
        memory = maps(pixels, tiling, Painted(4), range, Memory())
        files = maps(pixels, tiling, Painted(4), range, BlockFolder(tmp_path))
    np.testing.assert_array_equal(np.stack(memory), np.stack(files))


def test_a_blend_is_smooth_where_windows_disagree() -> None:
    """One window is certain of one class, the next of another: in between no step is large."""

    class Sides(Painted):
        def probabilities(self, images: torch.Tensor, margin: int) -> torch.Tensor:
            left = (images[:, :1, :1, :1] < 50).float().expand(-1, 1, *images.shape[2:])
            return torch.cat([left, 1 - left], 1)

    image = np.repeat(np.arange(28, dtype=np.uint8)[None], 16, 0)[None]
    image[:, :, :8], image[:, :, 8:] = 0, 99
    pixels = ArrayPixels(image, np.ones((16, 28), np.bool_))
    tiling = Tiling(tile=20, margin=0, overlap=10)
    first = maps(pixels, tiling, Sides(2), range, Memory())[2][0].astype(int)
    assert first[0] == 255
    assert first[-1] == 0
    assert (np.diff(first) <= 0).all()
    assert np.abs(np.diff(first)).max() <= 255 * np.pi / 2 / 10 + 1  # the steepest slope of sin²


def test_of_equal_sums_the_lowest_class() -> None:
    sums = np.full((3, 1, 2), ONE // 3, np.uint16)
    values = decide(sums, np.array([[True, False]]), probabilities=True)
    assert values.ids.tolist() == [[0, 255]]
    assert values.confidence.tolist() == [[85, 0]]
    assert values.probabilities is not None
    assert values.probabilities[:, 0].tolist() == [[85, 0]] * 3


def test_eight_positions_and_several_networks_are_averaged(trained: TrainedModel) -> None:
    generator = np.random.default_rng(3)
    images = torch.from_numpy(np.stack([smooth(generator, 24, 24) for _ in range(2)]))
    found = Predictor.of([trained], symmetries=True).probabilities(images)
    wanted = []
    for flip in (False, True):
        for turns in range(4):
            turned = torch.rot90(images.flip(-1) if flip else images, turns, (-2, -1))
            back = torch.rot90(trained.probabilities(turned), -turns, (-2, -1))
            wanted.append(back.flip(-1) if flip else back)
    torch.testing.assert_close(found, torch.stack(wanted).mean(0))
    assert len(list(positions(True))) == len(set(positions(True))) == 8
    turned = images.transpose(-1, -2)
    again = Predictor.of([trained], symmetries=True).probabilities(turned).transpose(-1, -2)
    torch.testing.assert_close(found, again)  # it no longer matters from where one looks
    other = replace(trained, module=torch.nn.Module())
    other.module.input_size = lambda output: output  # type: ignore[assignment]
    other.module.forward = (
        lambda images: torch.zeros(  # type: ignore[method-assign]
            len(images), 9, *images.shape[2:]
        )
    )
    both = Predictor.of([trained, other]).probabilities(images)
    torch.testing.assert_close(both, (trained.probabilities(images) + 1 / 9) / 2)


def test_folded_normalisation_is_the_same_but_for_rounding(trained: TrainedModel) -> None:
    torch.manual_seed(0)
    network = UNet(4, 9, base_channels=4, depth=2)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):  # as after a training
            nn.init.uniform_(layer.running_mean, -1, 1)
            nn.init.uniform_(layer.running_var, 0.3, 3)
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.uniform_(layer.bias, -1, 1)
    network.eval()
    kept = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.rand(2, 4, 32, 48)
    with torch.inference_mode():
        torch.testing.assert_close(folded(network)(images), network(images), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded(network).modules())
    assert all((value == kept[name]).all() for name, value in network.state_dict().items())


@pytest.mark.parametrize("symmetries", [False, True])
def test_margins_are_cut_off(trained: TrainedModel, symmetries: bool) -> None:
    images = torch.from_numpy(smooth(np.random.default_rng(4), 48, 48)[None])
    predictor = Predictor.of([trained], symmetries=symmetries)
    whole = predictor.probabilities(images)
    torch.testing.assert_close(predictor.probabilities(images, margin=8), whole[..., 8:-8, 8:-8])


def test_networks_that_do_not_belong_together(trained: TrainedModel) -> None:
    about = replace(trained.description, bands=("nir", "red", "green", "blue"))
    with pytest.raises(BadInput, match="their bands differ"):
        Predictor.of([trained, replace(trained, description=about)])


@pytest.mark.parametrize("overlap", [-1, 9])
def test_an_overlap_of_more_than_half_a_tile(overlap: int) -> None:
    with pytest.raises(BadInput, match="0 to 8"):
        Tiling(tile=16, margin=0, overlap=overlap)
