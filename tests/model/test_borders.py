"""Distances and neighbourhoods are those that one finds by looking at every pixel."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agrivision.model.borders import nearness, neighbourhood, reach, squared_distance


def random_sets(seed: int, density: float = 0.15) -> Tensor:
    """Areas of three label sets with single pixels of others, and pixels that do not count."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 4, (2, 4, 5), generator=generator)
    sets = coarse.repeat_interleave(5, 1).repeat_interleave(4, 2)
    odd = torch.rand(sets.shape, generator=generator) < density
    return torch.where(odd, torch.randint(0, 8, sets.shape, generator=generator), sets).int()


def borders(sets: Tensor) -> list[tuple[int, int]]:
    """Of one sample, pixel by pixel."""
    height, width = sets.shape
    found = []
    for i, j in itertools.product(range(height), range(width)):
        for k, m in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
            inside = 0 <= k < height and 0 <= m < width
            if inside and sets[i, j] and sets[k, m] and sets[i, j] != sets[k, m]:
                found.append((i, j))
                break
    return found


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), sigma=st.sampled_from([0.4, 1.0, 2.5, 50.0]))
def test_nearness_is_that_of_the_nearest_border(seed: int, sigma: float) -> None:
    sets = random_sets(seed, density=0.02)
    found = nearness(sets, sigma)
    assert found.dtype == torch.float32
    for sample, of_sample in zip(sets, found, strict=True):
        marked = borders(sample)
        for i, j in itertools.product(*map(range, sample.shape)):
            square = min(((i - k) ** 2 + (j - m) ** 2 for k, m in marked), default=math.inf)
            near = math.exp(-square / (2 * sigma**2)) if square <= reach(sigma) ** 2 else 0
            assert float(of_sample[i, j]) == pytest.approx(near, rel=1e-5, abs=1e-30)


def test_pixels_that_do_not_count_have_no_border() -> None:
    sets = torch.ones(1, 6, 6, dtype=torch.int32)
    sets[:, :, 3:] = 0
    assert not nearness(sets, 5).any()
    sets[:, :, 4:] = 2  # a column that does not count lies between
    assert not nearness(sets, 5).any()
    sets[:, :, 3] = 2
    assert (nearness(sets, 5)[:, :, 2:4] == 1).all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), most=st.integers(0, 30))
def test_distances_are_exact_up_to_the_most(seed: int, most: int) -> None:
    marked = torch.rand(2, 13, 17, generator=torch.Generator().manual_seed(seed)) < 0.02
    found = squared_distance(marked, most)
    for sample in range(2):
        places = marked[sample].nonzero().tolist()
        for i, j in itertools.product(range(13), range(17)):
            wanted = min(((i - k) ** 2 + (j - m) ** 2 for k, m in places), default=math.inf)
            if wanted <= most**2:
                assert int(found[sample, i, j]) == wanted
            else:
                assert int(found[sample, i, j]) > most**2


@pytest.mark.parametrize("most", [0, 1, 2, 4, 7, 11, 30])
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_neighbourhood_has_the_labels_of_its_square(seed: int, most: int) -> None:
    sets = random_sets(seed)
    before = sets.clone()
    found = neighbourhood(sets, most)
    assert torch.equal(sets, before)
    for sample, i, j in itertools.product(*map(range, sets.shape)):
        square = sets[sample, max(0, i - most) : i + most + 1, max(0, j - most) : j + most + 1]
        union = 0
        for value in square.unique().tolist():
            union |= value
        assert int(found[sample, i, j]) == union
