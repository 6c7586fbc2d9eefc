import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from agrivision.monitor.pictures import (
    INVALID,
    PALETTE,
    composite,
    confidence_picture,
    confusion_picture,
    encode,
    encode_png,
    paint,
    panel,
    save_png,
    truth_picture,
    wrong_picture,
)

BANDS = ("red", "green", "blue", "nir")
VALID = 1 << 15


def bands_of(count: int, size: int = 8) -> NDArray[np.uint8]:
    """Band b is b * 10 everywhere."""
    return (
        np.full((count, size, size), 0, np.uint8) + np.arange(count, dtype=np.uint8)[:, None, None] * 10
    )


@pytest.mark.parametrize(
    ("bands", "kind", "pixel"),
    [
        (BANDS, "rgb", (0, 10, 20)),
        (BANDS, "nir", (30, 0, 10)),
        (("NIR", "Blue", "Green", "Red"), "rgb", (30, 20, 10)),
        (("red", "green", "blue"), "nir", (0, 10, 20)),
        (("vv", "vh", "dem", "slope"), "rgb", (0, 10, 20)),
        (("dem", "slope"), "rgb", (0, 0, 0)),
        (("dem",), "nir", (0, 0, 0)),
    ],
)
def test_composite_takes_bands_by_name(
    bands: tuple[str, ...], kind: str, pixel: tuple[int, ...]
) -> None:
    picture = composite(bands_of(len(bands)), bands, kind)  # type: ignore[arg-type]
    assert picture.shape == (8, 8, 3)
    assert picture.dtype == np.uint8
    assert tuple(picture[0, 0]) == pixel


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32, np.float64])
def test_other_types_are_stretched_and_outliers_clipped(dtype: type) -> None:
    image = np.tile(np.linspace(0, 1000, 10_000).reshape(100, 100), (3, 1, 1)).astype(dtype)
    image[:, 0, 0] = 30_000
    picture = composite(image, ("red", "green", "blue"))
    assert picture[0, 0, 0] == 255
    assert picture[0, 1, 0] == 0
    assert abs(int(picture[50, 0, 0]) - 128) <= 2
    assert np.mean((picture > 0) & (picture < 255)) > 0.94


def test_what_is_not_finite_does_not_spoil_the_stretch() -> None:
    image = np.random.default_rng(0).random((3, 32, 32), np.float32)
    broken = image.copy()
    broken[:, 0, :3] = np.nan, np.inf, -np.inf
    picture, clean = (composite(one, ("red", "green", "blue")) for one in (broken, image))
    assert (picture[0, :3] == 0).all()
    assert np.abs(picture[1:].astype(int) - clean[1:]).max() <= 2
    assert (composite(np.full((3, 4, 4), np.nan), ("a", "b", "c")) == 0).all()
    assert (composite(np.full((3, 4, 4), 7.0), ("a", "b", "c")) == 128).all()


def test_paint_gives_each_class_its_colour_and_leaves_out_the_invalid() -> None:
    ids = np.arange(16).reshape(4, 4)
    valid = np.ones((4, 4), bool)
    valid[3, 3] = False
    picture = paint(ids, 16, valid)
    assert [tuple(pixel) for pixel in picture.reshape(-1, 3)] == [*PALETTE[:15], INVALID]


@pytest.mark.parametrize(("ids", "classes"), [([[9]], 9), ([[-1]], 9), ([[0]], 17), ([[0]], 0)])
def test_paint_refuses_what_is_no_class(ids: list[list[int]], classes: int) -> None:
    with pytest.raises(ValueError, match="classes"):
        paint(np.array(ids), classes)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_truth_picture(dtype: type) -> None:
    labels = np.array(
        [[VALID | 1, VALID | 0b10], [VALID | 0b110, 0b10], [VALID | 0b1000, VALID | 0b1010]]
    ).astype(dtype)
    picture = truth_picture(labels, 3)
    assert [tuple(pixel) for pixel in picture.reshape(-1, 3)] == [
        PALETTE[0],
        PALETTE[1],
        PALETTE[2],
        INVALID,
        PALETTE[0],  # bit 3 is kept but not scored
        PALETTE[1],
    ]


@given(classes=st.integers(1, 15), ids=st.lists(st.integers(0, 14), min_size=1, max_size=30))
def test_truth_and_prediction_agree_where_there_is_one_label(classes: int, ids: list[int]) -> None:
    predicted = np.array([ids]) % classes
    labels = (1 << predicted) | VALID
    assert np.array_equal(truth_picture(labels, classes), paint(predicted, classes))


# --- the palette, as people with each of the common colour deficiencies see it (Machado et al., 2009)
SIGHT = {
    "normal": np.eye(3),
    "protanopic": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopic": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    ),
}


def cie_lab(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / (0.9505, 1, 1.089)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_can_be_told_apart(sight: str) -> None:
    srgb = np.array(PALETTE) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = cie_lab((linear @ SIGHT[sight].T).clip(0, 1))
    distances = np.linalg.norm(seen[:, None] - seen[None], axis=2)
    assert distances[~np.eye(16, dtype=bool)].min() > 15  # a just noticeable difference is about 2.3


def example(size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint16], NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (4, size, size), dtype=np.uint8)
    predicted = rng.integers(0, 9, (size, size))
    return image, ((1 << predicted) | VALID).astype(np.uint16), predicted


def test_panel_shows_the_four_pictures_side_by_side() -> None:
    image, labels, predicted = example(256)
    sheet = panel(image, BANDS, labels, predicted, [f"class {c}" for c in range(9)])
    assert sheet.shape[1] == 4 * 256 + 3 * 4
    panes = [sheet[18 : 18 + 256, left : left + 256] for left in range(0, 4 * 260, 260)]
    assert np.array_equal(panes[0], composite(image, BANDS, "rgb"))
    assert np.array_equal(panes[1], composite(image, BANDS, "nir"))
    assert np.array_equal(panes[2], truth_picture(labels, 9))
    assert np.array_equal(panes[3], panes[2])


def test_panel_without_truth_and_with_a_mask() -> None:
    image, _, predicted = example(200)
    valid = np.zeros((200, 200), bool)
    sheet = panel(image, BANDS, None, predicted, ["a"] * 9, valid=valid)
    assert len(np.unique(sheet[18:218, 408:608].reshape(-1, 3), axis=0)) == 1
    assert (sheet[18:218, 612:] == INVALID).all()


def test_small_tiles_are_enlarged_and_long_legends_wrapped() -> None:
    image, labels, predicted = example(64)
    names = [f"a class with a long name {c}" for c in range(9)]
    sheet = panel(image, BANDS, labels, predicted, names)
    assert sheet.shape[1] == 4 * 192 + 3 * 4
    assert sheet.shape[0] >= 18 + 192 + 2 * 18


def test_png_files_hold_the_same_pixels(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    save_png(tmp_path / "a.png", picture)
    content = (tmp_path / "a.png").read_bytes()
    assert content == encode_png(picture)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), picture)


def test_where_it_is_wrong() -> None:
    labels = np.array([[VALID | 0b10, VALID | 0b110, VALID | 0b1], [0b10, VALID, VALID | 0b1000]])
    predicted = np.array([[1, 2, 2], [0, 1, 0]])
    picture = wrong_picture(labels, predicted, 3)
    pixels = [tuple(pixel) for pixel in picture.reshape(-1, 3)]
    right = pixels[0]
    assert right not in {*PALETTE, INVALID}
    # Either of two labels is right; a pixel that only has a label that is not scored cannot be wrong.
    assert pixels == [right, right, PALETTE[2], INVALID, right, right]


def test_confidence_is_brighter_where_it_is_higher() -> None:
    values = np.linspace(0, 1, 101)[None]
    brightness = confidence_picture(values).astype(float) @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(brightness[0]) > 0).all()
    hidden = confidence_picture(values, np.zeros((1, 101), bool))
    assert (hidden == INVALID).all()


def test_six_panes_in_two_rows() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (4, 200, 200), np.uint8)
    labels = (1 << rng.integers(0, 3, (200, 200))) | VALID
    predicted, names = rng.integers(0, 3, (200, 200)), ["a", "b", "c"]
    confidence = rng.random((200, 200))
    sheet = panel(image, BANDS, labels, predicted, names, confidence=confidence, title="a tile")
    assert sheet.shape[1] == 3 * 200 + 2 * 4
    panes = [
        composite(image, BANDS),
        composite(image, BANDS, "nir"),
        truth_picture(labels, 3),
        paint(predicted, 3),
        wrong_picture(labels, predicted, 3),
        confidence_picture(confidence),
    ]
    for number, pane in enumerate(panes):
        row, column = divmod(number, 3)
        top, left = 36 + row * 218, column * 204
        assert np.array_equal(sheet[top : top + 200, left : left + 200], pane)


def test_large_tiles_are_thinned() -> None:
    image = np.zeros((4, 1100, 1100), np.uint8)
    sheet = panel(image, BANDS, None, np.zeros((1100, 1100), int), ["a"])
    assert sheet.shape[1] == 4 * 367 + 3 * 4


def test_a_confusion_matrix_is_shared_out_by_truth() -> None:
    """Rows predicted, columns true: what is drawn has a row for each true class."""
    picture = confusion_picture([[90, 0, 0], [10, 0, 0], [0, 0, 0]], ["right", "never", "nowhere"])
    shades = [tuple(confidence_picture(np.array([[share]]))[0, 0]) for share in (0.9, 0.1, 0.0)]
    corners = [np.argwhere((picture == shade).all(-1))[0] for shade in shades]
    assert len({int(row) for row, _ in corners}) == 1  # 90, 10 and 0 percent stand in one row
    assert list(np.diff([column for _, column in corners])) == [54, 54]
    empty = np.argwhere((picture == shades[2]).all(-1))[:, 0]
    assert empty.max() - empty.min() < 54  # classes that are nowhere in the truth have an empty row


def test_jpeg_keeps_the_colours_of_classes() -> None:
    picture = paint(np.arange(16).reshape(4, 4).repeat(16, 0).repeat(16, 1), 16)
    with Image.open(io.BytesIO(encode(picture))) as image:
        assert image.format == "JPEG"
        seen = np.asarray(image).astype(int)
    assert np.abs(seen[8::16, 8::16] - picture[8::16, 8::16]).max() <= 4
