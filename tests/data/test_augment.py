"""Augmentation: pixels and labels move together, by choices that depend on the sample alone."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from agrivision.config import AugmentConfig
from agrivision.data.augment import Augment, Draw, _cubic, _offset, draw
from agrivision.data.labels import VALID_BIT
from agrivision.data.loader import evaluation_batches
from agrivision.data.normalise import Normaliser
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.world import World

VALID = 1 << VALID_BIT
AS_THEY_ARE = Normaliser(mean=(0.0, 0.0), std=(1.0, 1.0))


def augment(
    config: AugmentConfig, crop: int | None, seed: int = 5, normaliser: Normaliser = AS_THEY_ARE
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Augmentation of images (batch, bands, side, side), given to it as one plane of pixels."""
    change = Augment(config=config, normaliser=normaliser, crop=crop, seed=seed)
    return lambda images, *args: change([images.permute(0, 2, 3, 1).contiguous()], *args)


def positions(samples: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that hold each pixel's column and row, and labels that hold both, all valid."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    image = torch.stack([columns, rows]).to(torch.float32)
    labels = (rows * side + columns).to(torch.int32) | VALID
    return image.repeat(samples, 1, 1, 1), labels.repeat(samples, 1, 1)


def position_of(labels: torch.Tensor, side: int) -> torch.Tensor:
    """What `positions` wrote: column and row, (samples, 2, height, width)."""
    numbers = labels & (VALID - 1)
    return torch.stack([numbers % side, numbers // side], dim=1).to(torch.float32)


def begin(share: float, side: int, crop: int) -> int:
    """Where a crop begins: drawn from half a crop beyond both ends, and moved in."""
    beyond = min(side - crop, crop) // 2
    place = math.floor(share * (side - crop + 2 * beyond + 1)) - beyond
    return int(np.clip(place, 0, side - crop))


def reference(image: NDArray[np.float32], one: Draw, crop: int) -> NDArray[np.float32]:
    top, left = (begin(share, image.shape[-1], crop) for share in (one.row, one.column))
    cut = image[..., top : top + crop, left : left + crop]
    if one.mirror:
        cut = cut[..., ::-1]
    for _ in range(one.turns):  # a quarter counter-clockwise: the right edge comes to the top
        cut = np.swapaxes(cut, -2, -1)[..., ::-1, :]
    return cut


CONFIGS = [
    AugmentConfig(),
    AugmentConfig(flip=False),
    AugmentConfig(rotate90=False),
    AugmentConfig(flip=False, rotate90=False),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("crop", [None, 1, 7, 12, 99])
def test_crops_and_symmetries_are_those_of_numpy(config: AugmentConfig, crop: int | None) -> None:
    random = torch.Generator().manual_seed(0)
    images = torch.randn(40, 2, 12, 12, generator=random)
    labels = torch.randint(0, 1 << 16, (40, 12, 12), generator=random, dtype=torch.int32)
    tiles = list(range(100, 140))
    changed, bits = augment(config, crop)(images, labels, 3, tiles)
    side = 12 if crop is None else min(crop, 12)
    assert changed.shape == (40, 2, side, side)
    assert (changed.dtype, bits.dtype) == (torch.float32, torch.int32)
    for slot, tile in enumerate(tiles):
        one = draw(config, 2, 5, 3, tile)
        assert np.array_equal(changed[slot].numpy(), reference(images[slot].numpy(), one, side))
        assert np.array_equal(bits[slot].numpy(), reference(labels[slot].numpy(), one, side))


@settings(max_examples=40)
@given(
    side=st.integers(1, 12), crop=st.integers(1, 14), epoch=st.integers(0, 9), tile=st.integers(0, 999)
)
def test_labels_move_with_the_pixels(side: int, crop: int, epoch: int, tile: int) -> None:
    changed, bits = augment(AugmentConfig(), crop)(*positions(1, side), epoch, [tile])
    assert torch.equal(position_of(bits, side), changed)
    assert (bits & VALID).all()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("side", "crop"), [(16, None), (16, 16), (16, 9), (15, 8), (12, 1)])
def test_a_warp_by_nothing_is_the_exact_path(
    config: AugmentConfig, side: int, crop: int | None
) -> None:
    random = torch.Generator().manual_seed(1)
    images = torch.randn(64, 2, side, side, generator=random)
    labels = torch.randint(0, 1 << 16, (64, side, side), generator=random, dtype=torch.int32)
    tiles = list(range(64))
    exact, exact_bits = augment(config, crop)(images, labels, 0, tiles)
    nothing = dataclasses.replace(config, rotate=1e-9)
    warped, warped_bits = augment(nothing, crop)(images, labels, 0, tiles)
    torch.testing.assert_close(warped, exact, atol=1e-3, rtol=0)
    assert torch.equal(warped_bits, exact_bits)


def where_from(one: Draw, side: int, crop: int) -> NDArray[np.float64]:
    """Column and row (of pixel centres) that each pixel of the result was taken from, by geometry."""
    left, top = (begin(share, side, crop) for share in (one.column, one.row))
    rows, columns = np.mgrid[:crop, :crop]
    centre = (crop - 1) / 2
    right, up = (columns - centre) / one.scale, (centre - rows) / one.scale
    angle = math.radians(90 * one.turns + one.angle)
    # What turned counter-clockwise by the angle came from where the angle turns it back to.
    right, up = (
        math.cos(angle) * right + math.sin(angle) * up,
        math.cos(angle) * up - math.sin(angle) * right,
    )
    if one.mirror:
        right = -right
    return np.stack([left + centre + right, top + centre - up])


@pytest.mark.parametrize(("side", "crop"), [(24, None), (25, 13)])
def test_a_warp_takes_pixels_and_labels_from_where_geometry_says(side: int, crop: int | None) -> None:
    config = AugmentConfig(scale=0.8, rotate=180)
    images, labels = positions(40, side)
    warped, bits = augment(config, crop)(images, labels, 2, list(range(40)))
    outsiders = 0
    for slot in range(40):
        one = draw(config, 2, 5, 2, slot)
        wanted = where_from(one, side, crop or side)
        inside = ((wanted > 0.01) & (wanted < side - 1.01)).all(axis=0)
        # Ramps are what a bilinear filter keeps exactly.
        np.testing.assert_allclose(warped[slot].numpy()[:, inside], wanted[:, inside], atol=1e-3)
        found = position_of(bits[slot : slot + 1], side)[0].numpy()
        assert np.abs(found - wanted)[:, inside].max() <= 0.501
        valid = (bits[slot].numpy() & VALID) != 0
        assert valid[inside].all()
        outside = ((wanted < -0.501) | (wanted > side - 0.499)).any(axis=0)
        assert not bits[slot].numpy()[outside].any()
        outsiders += int(outside.sum())
    assert outsiders > 100


def keys(distance: float) -> float:
    """Kernel of cubic convolution, a = -1/2."""
    x = abs(distance)
    if x >= 2:
        return 0.0
    return 1.5 * x**3 - 2.5 * x**2 + 1 if x <= 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2


def bent(one: Draw, crop: int) -> NDArray[np.float64]:
    """How far each pixel of a crop is taken from elsewhere, column before row, pixel by pixel."""
    assert one.bend is not None
    padded = np.pad(one.bend, ((0, 0), (2, 2), (2, 2)), mode="edge")  # points -2 … 4 of a side
    moved = np.zeros((2, crop, crop))
    for row, column in np.ndindex(crop, crop):
        down, right = ((place + 0.5) / crop * 2 for place in (row, column))
        for i, j in np.ndindex(7, 7):
            moved[:, row, column] += padded[::-1, i, j] * keys(down - i + 2) * keys(right - j + 2)
    return moved


@pytest.mark.parametrize(("side", "crop"), [(24, None), (25, 13)])
def test_a_bend_takes_pixels_and_labels_from_where_its_points_say(side: int, crop: int | None) -> None:
    config = AugmentConfig(elastic=1.5, scale=0.2)
    images, labels = positions(12, side)
    warped, bits = augment(config, crop)(images, labels, 2, list(range(12)))
    moves = []
    for slot in range(12):
        one = draw(config, 2, 5, 2, slot)
        move = bent(one, crop or side)
        wanted = where_from(one, side, crop or side) + move
        inside = ((wanted > 0.01) & (wanted < side - 1.01)).all(axis=0)
        np.testing.assert_allclose(warped[slot].numpy()[:, inside], wanted[:, inside], atol=1e-3)
        found = position_of(bits[slot : slot + 1], side)[0].numpy()
        assert np.abs(found - wanted)[:, inside].max() <= 0.501
        moves.append(move)
    assert 0.7 < np.std(moves) < 2  # of points that were drawn with a deviation of 1.5 pixels


@pytest.mark.parametrize("side", [1, 2, 3, 16, 97])
def test_a_bend_by_one_vector_is_a_shift(side: int) -> None:
    np.testing.assert_allclose(_cubic(3, side).sum(axis=1), 1, atol=1e-12)


def test_what_a_warp_moves_in_is_the_mean() -> None:
    normaliser = Normaliser(mean=(50.0, 80.0), std=(2.0, 3.0))
    change = augment(AugmentConfig(scale=0.9), None, seed=0, normaliser=normaliser)
    images = torch.full((30, 2, 16, 16), 60.0)
    changed, bits = change(images, torch.full((30, 16, 16), VALID), 0, list(range(30)))
    outside = (bits == 0).unsqueeze(1).expand_as(changed)
    deep = F.max_pool2d((~outside).float(), 3, 1, 1) == 0
    assert deep.any()
    assert (changed[deep] == 0).all()


def test_symmetries_come_equally_often_and_offsets_more_often_at_the_edges() -> None:
    samples, side, crop = 5_120, 6, 3
    changed, _ = augment(AugmentConfig(), crop)(*positions(samples, side), 0, list(range(samples)))
    crops = changed.contiguous().numpy()
    # A crop of 3 in 6 pixels begins at 0 … 3, drawn from -1 … 4 and moved in.
    share = {0: 2 / 6, 1: 1 / 6, 2: 1 / 6, 3: 2 / 6}
    counts = Counter((*one.min(axis=(1, 2)).astype(int).tolist(), one.tobytes()) for one in crops)
    assert len(counts) == 8 * len(share) ** 2
    chi_squared = 0.0
    for (left, top, _), count in counts.items():
        expected = samples / 8 * share[left] * share[top]
        chi_squared += (count - expected) ** 2 / expected
    assert chi_squared < 195  # 127 degrees of freedom: p = 1e-4


@pytest.mark.parametrize(("side", "crop"), [(256, 128), (512, 384), (64, 32), (100, 99)])
def test_a_crop_reaches_the_edges_of_its_tile_often(side: int, crop: int) -> None:
    offsets = np.array([_offset(share, side, crop) for share in np.linspace(0, 1, 4001)[:-1]])
    assert offsets.min() == 0 and offsets.max() == side - crop
    cover = np.zeros(side)
    for offset in offsets:
        cover[offset : offset + crop] += 1 / len(offsets)
    assert cover[0] > 0.2 and cover[-1] > 0.2  # drawn evenly, it would be 1 / (side - crop + 1)
    assert np.abs(cover - cover[::-1]).max() < 0.02


EVERYTHING = AugmentConfig(
    scale=0.3, rotate=20, elastic=1.5, brightness=0.2, contrast=0.3, band_gain=0.1, band_shift=0.1
)


@pytest.mark.parametrize("config", [AugmentConfig(), EVERYTHING], ids=["exact", "warped"])
@settings(max_examples=25)
@given(tiles=st.lists(st.integers(0, 31), min_size=1, max_size=9), epoch=st.integers(0, 5))
def test_a_sample_is_changed_alike_in_any_company(
    config: AugmentConfig, tiles: list[int], epoch: int
) -> None:
    random = torch.Generator().manual_seed(2)
    images = torch.randn(32, 2, 17, 17, generator=random)
    labels = torch.randint(0, 1 << 16, (32, 17, 17), generator=random, dtype=torch.int32)
    change = augment(config, 11)
    together, bits = change(images[tiles], labels[tiles], epoch, tiles)
    for slot, tile in enumerate(tiles):
        alone, alone_bits = change(images[tile : tile + 1], labels[tile : tile + 1], epoch, [tile])
        assert torch.equal(together[slot], alone[0])
        assert torch.equal(bits[slot], alone_bits[0])


def test_epochs_seeds_and_tiles_differ() -> None:
    draws = [
        draw(EVERYTHING, 4, seed, epoch, tile)
        for seed in range(4)
        for epoch in range(4)
        for tile in range(4)
    ]
    assert len({one.angle for one in draws}) == len(draws)
    assert len({one.gain for one in draws}) == len(draws)


def test_the_batch_that_was_given_is_not_changed() -> None:
    images, labels = positions(4, 8)
    for config in (AugmentConfig(), EVERYTHING):
        augment(config, 5)(images, labels, 0, range(4))
        expected, expected_labels = positions(4, 8)
        assert torch.equal(images, expected)
        assert torch.equal(labels, expected_labels)


@pytest.mark.parametrize("geometry", [{}, {"scale": 0.2, "rotate": 10}], ids=["exact", "warped"])
@pytest.mark.parametrize(
    "strength",
    [
        {"brightness": 0.3},
        {"contrast": 0.4},
        {"band_gain": 0.2},
        {"band_shift": 0.1},
        {"brightness": 0.3, "contrast": 0.4, "band_gain": 0.2, "band_shift": 0.1},
    ],
    ids=str,
)
def test_radiometry_is_what_was_drawn(geometry: dict[str, float], strength: dict[str, float]) -> None:
    images = torch.randn(50, 2, 9, 9, generator=torch.Generator().manual_seed(3))
    labels = torch.full((50, 9, 9), VALID, dtype=torch.int32)
    plain, bits = augment(AugmentConfig(**geometry), 6)(images, labels, 1, range(50))
    config = AugmentConfig(**geometry, **strength)
    changed, changed_bits = augment(config, 6)(images, labels, 1, range(50))
    assert torch.equal(bits, changed_bits)
    draws = [draw(config, 2, 5, 1, tile) for tile in range(50)]
    for slot, one in enumerate(draws):
        shift = torch.tensor(one.shift).view(2, 1, 1)
        expected = plain[slot] * torch.tensor(one.gain).view(2, 1, 1) + shift
        # Next to what a warp moved in, or may have beyond the edge, a pixel is part of both.
        inside = F.pad(F.max_pool2d((bits[slot] == 0).float()[None], 3, 1)[0] == 0, (1, 1, 1, 1))
        inside |= not geometry
        torch.testing.assert_close(changed[slot][:, inside], expected[:, inside], atol=1e-6, rtol=1e-6)
    shifts = np.array([one.shift for one in draws])
    gains = np.array([one.gain for one in draws])
    assert np.abs(shifts).max() <= strength.get("brightness", 0) + strength.get("band_shift", 0)
    widest = (1 + strength.get("contrast", 0)) * (1 + strength.get("band_gain", 0))
    assert gains.max() <= widest
    if "brightness" in strength:
        assert shifts.min() < -0.2 < 0.2 < shifts.max()
    if "band_gain" in strength:
        assert (gains[:, 0] != gains[:, 1]).all()
    else:
        assert (gains[:, 0] == gains[:, 1]).all()
    by_band = shifts[:, 0] != shifts[:, 1]
    assert by_band.all() if "band_shift" in strength else not by_band.any()


@settings(max_examples=40)
@given(
    scale=st.floats(0, 4),
    rotate=st.floats(0, 180),
    tile=st.integers(0, 10**9),
    epoch=st.integers(0, 99),
)
def test_draws_stay_within_their_bounds(scale: float, rotate: float, tile: int, epoch: int) -> None:
    one = draw(AugmentConfig(scale=scale, rotate=rotate), 4, 0, epoch, tile)
    assert 1 / (1 + scale) * 0.999 <= one.scale <= (1 + scale) * 1.001
    assert -rotate <= one.angle <= rotate
    assert one.turns in range(4)
    assert 0 <= one.row < 1
    assert 0 <= one.column < 1
    assert one.shift == (0.0,) * 4
    assert one.gain == (1.0,) * 4


@pytest.mark.parametrize("config", [AugmentConfig(), EVERYTHING], ids=["exact", "warped"])
def test_the_result_lies_in_channels_last_memory(config: AugmentConfig) -> None:
    changed, _ = augment(config, 6)(*positions(3, 8), 0, range(3))
    assert changed.is_contiguous(memory_format=torch.channels_last)


DTYPES = [torch.uint8, torch.uint16, torch.int16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bands", [(3, 1), (1,), (2, 2, 1), (2,), (3,)], ids=str)
def test_planes_of_any_type_are_one_image(bands: tuple[int, ...], dtype: torch.dtype) -> None:
    random = np.random.default_rng(0)
    planes = [torch.from_numpy(random.integers(0, 256, (24, 9, 9, count))).to(dtype) for count in bands]
    labels = torch.from_numpy(random.integers(-(2**15), 2**15, (24, 9, 9), dtype=np.int16))
    normaliser = Normaliser(mean=(100.0,) * sum(bands), std=(8.0,) * sum(bands))
    config = AugmentConfig(contrast=0.2)
    change = Augment(config=config, normaliser=normaliser, crop=6, seed=1)
    images, bits = change(planes, labels, 2, range(24))
    joined = torch.cat([plane.to(torch.float32) for plane in planes], dim=-1).permute(0, 3, 1, 2)
    for slot in range(24):
        one = draw(config, sum(bands), 1, 2, slot)
        cut = torch.from_numpy(reference(joined[slot].numpy(), one, 6).copy())
        expected = (cut - 100) / 8 * torch.tensor(one.gain).view(-1, 1, 1)
        torch.testing.assert_close(images[slot], expected, atol=1e-5, rtol=1e-5)
        wanted = reference(labels[slot].numpy().view(np.uint16), one, 6)
        assert np.array_equal(bits[slot].numpy(), wanted)


# The normaliser


def test_the_training_split_gets_mean_zero_and_variance_one(dataset: Path) -> None:
    schema = Schema.read(dataset)
    normaliser = Normaliser.of(schema, "bands")
    values = []
    for batch in evaluation_batches(
        SplitReader(dataset, schema, "train"), World(), batch_size=8, threads=0
    ):
        normal = normaliser(batch.pixels.images()).permute(0, 2, 3, 1)
        values.append(normal[(batch.pixels.label_bits() & VALID) != 0])
    joined = torch.cat(values).to(torch.float64)
    assert len(joined) == schema.statistics.pixels
    assert joined.mean(dim=0).abs().max() < 1e-5
    assert (joined.var(dim=0, correction=0) - 1).abs().max() < 1e-5


def test_the_range_keeps_the_ratios_of_the_bands(dataset: Path) -> None:
    schema = Schema.read(dataset)
    normaliser = Normaliser.of(schema, "range")
    largest = max(schema.statistics.maximum)
    for batch in evaluation_batches(
        SplitReader(dataset, schema, "train"), World(), batch_size=8, threads=0
    ):
        images = batch.pixels.images()
        torch.testing.assert_close(normaliser(images), images / largest, rtol=1e-6, atol=0)
        assert normaliser(images).abs().max() <= 1


def test_what_is_no_number_becomes_the_mean() -> None:
    normaliser = Normaliser(mean=(1.0, 2.0), std=(0.5, 4.0))
    images = torch.full((1, 2, 2, 3), 3.0)
    images[0, 0, 0] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    normal = normaliser(images)
    assert normal[0, 0].tolist() == [[0, 0, 0], [4, 4, 4]]
    assert (normal[0, 1] == 0.25).all()


@pytest.mark.parametrize("nodata", [0.0, -9999.0, -3.4028234663852886e38, 65535.0])
def test_a_pixel_is_empty_where_all_bands_say_so(nodata: float) -> None:
    normaliser = Normaliser(mean=(10.0, 20.0), std=(2.0, 5.0), nodata=nodata)
    images = torch.tensor([[[[nodata, nodata, 12.0]], [[nodata, 25.0, nodata]]]])
    normal = normaliser(images)
    assert normal[0, :, 0, 0].tolist() == [0, 0]
    assert normal[0, 1, 0, 1].item() == pytest.approx(1)
    assert normal[0, 0, 0, 2].item() == pytest.approx(1)
    assert normal[0, 0, 0, 1].item() == pytest.approx((nodata - 10) / 2)  # a value like any other
    without = dataclasses.replace(normaliser, nodata=None)(images)
    assert (without[0, :, 0, 0] != 0).all()


def test_a_band_that_never_varies_is_only_centred() -> None:
    normal = Normaliser(mean=(7.0,), std=(0.0,))(torch.tensor([[[[7.0, 9.0]]]]))
    assert normal.tolist() == [[[[0.0, 2.0]]]]
