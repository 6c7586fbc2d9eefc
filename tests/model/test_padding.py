from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from agrivision.model.padding import dense_logits, mirrored
from agrivision.model.unet import UNet


def unet(convolution: str, depth: int = 2) -> UNet:
    torch.manual_seed(0)
    return UNet(4, 3, base_channels=2, depth=depth, convolution=convolution).eval()  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("convolution", ["same", "valid"])
def test_sizes_that_fit_are_a_direct_run(convolution: str) -> None:
    model = unet(convolution)
    images = torch.randn(2, 4, 64, 48)
    if convolution == "same":
        expected = model(images)
    else:  # 40 pixels of margin; 64 and 48 are sizes of an output
        expected = model(F.pad(images, (20, 20, 20, 20), mode="reflect"))
        assert model.input_size(64) == 104
        assert model.input_size(48) == 88
    assert torch.equal(dense_logits(model, images), expected)


@torch.no_grad()
@pytest.mark.parametrize("convolution", ["same", "valid"])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3), (5, 17), (33, 64), (47, 31)])
def test_any_size_gets_logits_of_its_own_size(convolution: str, size: tuple[int, int]) -> None:
    logits = dense_logits(unet(convolution), torch.randn(1, 4, *size))
    assert logits.shape == (1, 3, *size)
    assert logits.isfinite().all()


@torch.no_grad()
@settings(max_examples=10, deadline=None)
@given(height=st.integers(41, 60), width=st.integers(41, 60))
def test_valid_logits_are_those_of_the_pixels_beneath(height: int, width: int) -> None:
    """Far enough from the border, a network without padding sees nothing of the mirror."""
    model = unet("valid")
    images = torch.randn(1, 4, height, width)
    logits = dense_logits(model, images)
    padded = F.pad(images, (40, 40, 40, 40), mode="reflect")
    top, left = (model.input_size(height) - height) // 2, (model.input_size(width) - width) // 2
    rows, columns = model.input_size(height), model.input_size(width)
    window = padded[..., 40 - top : 40 - top + rows, 40 - left : 40 - left + columns]
    expected = model(window)[..., top - 20 : top - 20 + height, left - 20 : left - 20 + width]
    torch.testing.assert_close(logits, expected)


def test_a_marked_pixel_stays_in_its_place() -> None:
    class Identity(torch.nn.Module):
        def input_size(self, output: int) -> int:
            return -(-output // 8) * 8 + 10

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[..., 5:-5, 5:-5]

    images = torch.arange(13 * 9.0).reshape(1, 1, 13, 9)
    assert torch.equal(dense_logits(Identity(), images), images)


def test_a_network_that_does_not_keep_its_promise_is_refused() -> None:
    class Shrinking(torch.nn.Module):
        def input_size(self, output: int) -> int:
            return output

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[..., 1:-1, 1:-1]

    with pytest.raises(ValueError, match="do not cover"):
        dense_logits(Shrinking(), torch.zeros(1, 1, 8, 8))


@settings(deadline=None)
@given(have=st.integers(2, 12), before=st.integers(0, 11), after=st.integers(0, 11))
def test_mirrored_is_reflection(have: int, before: int, after: int) -> None:
    row = torch.arange(float(have)).reshape(1, 1, have)
    places = mirrored(have, before, before + have + after)
    assert int(places[before]) == 0
    # Mirroring goes on and on: from each place the next is one step away, never out of range.
    assert places.min() >= 0
    assert places.max() < have
    assert (places.diff().abs() == 1).all()
    if max(before, after) < have:
        expected = F.pad(row, (before, after), mode="reflect").flatten()
        assert torch.equal(places.float(), expected)


def test_mirrored_as_documented() -> None:
    assert mirrored(4, 2, 8).tolist() == [2, 1, 0, 1, 2, 3, 2, 1]
    assert mirrored(1, 2, 4).tolist() == [0, 0, 0, 0]
