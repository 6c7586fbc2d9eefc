"""Pictures of images, labels and predictions, for people to look at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from agrivision.storage import write_atomically

Picture = NDArray[np.uint8]  # (height, width, 3), RGB
Color = tuple[int, int, int]

# One colour for each class id. 1 to 7 are Okabe and Ito's, in an order that makes Agriculture-Vision's
# water (6) and waterway (7) blue. The others were chosen one by one, each the farthest (CIE Lab) from
# all before it as seen by the nearest of normal, protanopic and deuteranopic sight. The background (0)
# is dark, so that what is wrong with the crop stands out.
PALETTE: tuple[Color, ...] = (
    (48, 48, 48),
    (230, 159, 0),
    (204, 121, 167),
    (0, 158, 115),
    (240, 228, 66),
    (213, 94, 0),
    (0, 114, 178),
    (86, 180, 233),
    (255, 255, 255),
    (40, 40, 232),
    (232, 232, 160),
    (40, 40, 88),
    (40, 40, 160),
    (160, 64, 40),
    (64, 112, 232),
    (88, 184, 88),
)
INVALID: Color = (0, 0, 0)  # outside the field, or not photographed

_VALID_BIT = 15  # of the label bits
_COMPOSITES = {"rgb": ("red", "green", "blue"), "nir": ("nir", "red", "green")}
_GAP = 4  # pixels between two panes
_SMALLEST_PANE = 192  # pixels; smaller tiles are enlarged, or the legend would not fit
_LARGEST_PANE = 512  # pixels
_CELL = 54  # pixels, side of a confusion matrix's cell
_LARGE = 15  # pixels, its letters: TensorBoard shrinks it
# From dark blue to bright yellow, as in Nuñez, Anderton and Renslow's cividis (2018).
_RAMP: tuple[Color, ...] = (
    (0, 34, 78),
    (66, 78, 108),
    (124, 123, 120),
    (187, 174, 107),
    (254, 232, 56),
)
_RIGHT: Color = (120, 120, 120)  # no class has this colour
_PAPER: Color = (24, 24, 24)
_INK: Color = (224, 224, 224)
_ROW = 18  # pixels, height of a line of text
_SWATCH = 10  # pixels, side of a legend's coloured square


def composite(
    image: NDArray[Any], bands: Sequence[str], kind: Literal["rgb", "nir"] = "rgb"
) -> Picture:
    """Three bands of an image as a picture.

    Args:
        image: (bands, height, width), uint8 or anything else; uint8 is shown as it is, other types
            are stretched band by band between their 2nd and 98th percentile.
        bands: names in the order of the image.
        kind: natural colours, or near-infrared, red and green as red, green and blue, in which
            healthy plants are red. Where a band is missing, the first three are taken, and of an
            image with fewer bands the first one in grey.

    Returns:
        uint8 of shape (height, width, 3).
    """
    chosen = image[_chosen_bands(bands, kind)]
    if chosen.dtype != np.uint8:
        chosen = np.stack([_stretch(band) for band in chosen])
    return np.ascontiguousarray(chosen.transpose(1, 2, 0))


def _chosen_bands(bands: Sequence[str], kind: Literal["rgb", "nir"]) -> list[int]:
    names = [band.lower() for band in bands]
    if set(_COMPOSITES[kind]) <= set(names):
        return [names.index(band) for band in _COMPOSITES[kind]]
    return [0, 1, 2] if len(names) >= 3 else [0, 0, 0]


def _stretch(band: NDArray[Any]) -> NDArray[np.uint8]:
    """One band of any number type as uint8; what is not finite becomes 0, a constant band grey."""
    values = band.astype(np.float32)
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(band.shape, np.uint8)
    low, high = np.percentile(values[finite], (2, 98))
    if not high > low:
        return np.where(finite, np.uint8(128), np.uint8(0))
    share = np.where(finite, (values - low) / (high - low), 0)
    return (share.clip(0, 1) * 255).round().astype(np.uint8)


def paint(ids: NDArray[Any], classes: int, valid: NDArray[np.bool_] | None = None) -> Picture:
    """A map of class ids in the colours of `PALETTE`.

    Args:
        ids: (height, width), integers from 0 to `classes` - 1.
        classes: number of classes.
        valid: (height, width), False where a pixel does not count; those are black.

    Returns:
        uint8 of shape (height, width, 3).

    Raises:
        ValueError: an id is no class, or there are more classes than colours.
    """
    if not 1 <= classes <= len(PALETTE):
        raise ValueError(f"{classes} classes, but there are {len(PALETTE)} colours")
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < classes:
        raise ValueError(f"class ids from {ids.min()} to {ids.max()}, but there are {classes} classes")
    picture: Picture = np.array(PALETTE, np.uint8)[ids]
    if valid is not None:
        picture[~valid] = INVALID
    return picture


def truth_picture(labels: NDArray[Any], classes: int) -> Picture:
    """Label sets as a picture; of several labels the one with the greatest id is seen.

    Args:
        labels: (height, width), integers whose bit c stands for class c and bit 15 for a valid pixel.
        classes: number of classes; bits from there up are not drawn.

    Returns:
        uint8 of shape (height, width, 3); pixels that do not count are black.
    """
    bits = labels.astype(np.int32)
    ids = np.zeros(bits.shape, np.uint8)
    for class_id in range(1, min(classes, _VALID_BIT)):
        ids[(bits >> class_id) & 1 == 1] = class_id
    return paint(ids, classes, _valid(bits))


def _valid(labels: NDArray[Any]) -> NDArray[np.bool_]:
    bits: NDArray[np.int32] = labels.astype(np.int32)
    valid: NDArray[np.bool_] = (bits >> _VALID_BIT) & 1 == 1
    return valid


def panel(
    image: NDArray[Any],
    bands: Sequence[str],
    labels: NDArray[Any] | None,
    predicted: NDArray[Any],
    classes: Sequence[str],
    *,
    valid: NDArray[np.bool_] | None = None,
    confidence: NDArray[Any] | None = None,
    title: str = "",
) -> Picture:
    """A tile in natural colours, in false colours, its truth and its prediction.

    With the network's confidence also where it is wrong and how sure it is, in a second row.

    Args:
        image: (bands, height, width), any number type.
        bands: names in the order of the image.
        labels: (height, width) of label bits; None where nobody knows the truth: that pane is empty.
        predicted: (height, width) of class ids.
        classes: names in the order of the ids.
        valid: (height, width), where the prediction counts; None takes the labels' valid bit.
        confidence: (height, width), probability of the predicted class, 0 to 1.
        title: a line above everything.

    Returns:
        uint8 of shape (height', width'', 3), with captions above and a legend beneath: four panes side
        by side, or three beside three. Tiles smaller than 192 pixels are enlarged by a whole factor,
        and of those larger than 512 only every second (third, …) pixel is drawn.
    """
    if valid is None and labels is not None:
        valid = _valid(labels)
    panes = {"RGB": composite(image, bands, "rgb"), "NIR-R-G": composite(image, bands, "nir")}
    truth = "no truth" if labels is None else "truth"
    nothing = np.full((*predicted.shape, 3), _PAPER, np.uint8)
    panes[truth] = nothing if labels is None else truth_picture(labels, len(classes))
    panes["prediction"] = paint(predicted, len(classes), valid)
    columns = len(panes)
    if confidence is not None:
        columns = 3
        wrong = nothing if labels is None else wrong_picture(labels, predicted, len(classes), valid)
        panes["where wrong: the class predicted"] = wrong
        panes["confidence: dark 0, bright 1"] = confidence_picture(confidence, valid)
    pictures = [enlarge(thin(pane)) for pane in panes.values()]
    return sheet(pictures, list(panes), classes, columns=columns, title=title)


def wrong_picture(
    labels: NDArray[Any],
    predicted: NDArray[Any],
    classes: int,
    valid: NDArray[np.bool_] | None = None,
) -> Picture:
    """What was predicted where that is none of the labels; the rest is grey, or black if not valid.

    Args:
        labels: (height, width) of label bits; a pixel without any scored label cannot be wrong.
        predicted: (height, width) of class ids.
        classes: how many.
        valid: (height, width), where the prediction counts; None takes the labels' valid bit.
    """
    bits = labels.astype(np.int32)
    scored = bits & ((1 << min(classes, _VALID_BIT)) - 1)
    wrong = (scored != 0) & ((bits >> predicted.astype(np.int32)) & 1 == 0)
    picture = paint(predicted, classes)
    picture[~wrong] = _RIGHT
    picture[~(_valid(bits) if valid is None else valid)] = INVALID
    return picture


def confidence_picture(confidence: NDArray[Any], valid: NDArray[np.bool_] | None = None) -> Picture:
    """Values from 0 to 1 in colours from dark blue to bright yellow, that all kinds of sight can order.

    Args:
        confidence: (height, width).
        valid: (height, width), False where a pixel does not count; those are black.
    """
    places = np.linspace(0, 1, len(_RAMP))
    values = np.nan_to_num(confidence.astype(np.float32)).clip(0, 1)
    bands = [np.interp(values, places, channel) for channel in np.array(_RAMP).T]
    picture: Picture = np.stack(bands, axis=-1).round().astype(np.uint8)
    if valid is not None:
        picture[~valid] = INVALID
    return picture


def confusion_picture(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Picture:
    """A confusion matrix as shares of the true class, in percent, with the classes' names.

    Args:
        matrix: rows predicted, columns true, in pixels.
        classes: names in the order of the ids.

    Returns:
        uint8 of shape (height, width, 3): a row for each true class, which adds up to 100, and a column
        for each prediction. A class that is nowhere in the truth has an empty row.
    """
    true = np.array(matrix, np.float64).T
    shares = true / np.maximum(true.sum(1, keepdims=True), 1)
    font = _font(_LARGE)
    margin = _GAP * 3 + max(round(font.getlength(name)) for name in classes)
    top, side = _ROW + margin, _CELL * len(classes)
    sheet = Image.new("RGB", (margin + side + _GAP, top + side + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 0), "rows: truth, columns: prediction, percent", fill=_INK, font=font)
    for row, name in enumerate(classes):
        y = top + row * _CELL
        draw.text((_GAP, y + _CELL // 2 - 9), name, fill=_INK, font=font)
        sheet.paste(_upright(name, margin - _GAP), (margin + row * _CELL + _CELL // 2 - 9, _ROW))
        for column, share in enumerate(shares[row] if true[row].any() else ()):
            x = margin + column * _CELL
            shade = confidence_picture(np.array([[share]]))[0, 0]
            draw.rectangle((x, y, x + _CELL - 2, y + _CELL - 2), fill=tuple(map(int, shade)))
            ink = (0, 0, 0) if share > 0.5 else (255, 255, 255)
            words = f"{100 * share:.1f}"
            left = x + (_CELL - round(font.getlength(words))) // 2
            draw.text((left, y + _CELL // 2 - 9), words, fill=ink, font=font)
    return np.asarray(sheet)


def _upright(words: str, height: int) -> Image.Image:
    """A line that is read from below, and ends above what follows."""
    line = Image.new("RGB", (height, _ROW), _PAPER)
    ImageDraw.Draw(line).text((0, 0), words, fill=_INK, font=_font(_LARGE))
    return line.transpose(Image.Transpose.ROTATE_90)


def thin(picture: Picture) -> Picture:
    """Every so many pixels of a large picture."""
    step = -(-max(picture.shape[:2]) // _LARGEST_PANE)
    return picture[::step, ::step]


def enlarge(picture: Picture) -> Picture:
    """Repeat the pixels of a small picture until it is worth looking at; a narrow one gets a margin."""
    factor = -(-_SMALLEST_PANE // max(picture.shape[:2]))
    larger = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    margin = max(0, _SMALLEST_PANE - larger.shape[1])
    return np.pad(larger, ((0, 0), (0, margin), (0, 0))) if margin else larger


def sheet(
    panes: Sequence[Picture],
    captions: Sequence[str],
    classes: Sequence[str],
    *,
    columns: int | None = None,
    title: str = "",
) -> Picture:
    """Pictures of the same size with captions above, and a legend of classes beneath.

    Args:
        panes: from left to right and from top to bottom.
        captions: of each.
        classes: names in the order of the ids.
        columns: panes in a row; None puts all side by side.
        title: a line above everything; empty for none.
    """
    columns = columns or len(panes)
    height, width = panes[0].shape[:2]
    full = width * columns + _GAP * (columns - 1)
    entries, rows = _legend(classes, full)
    top = _ROW if title else 0
    bottom = top + -(-len(panes) // columns) * (_ROW + height)
    sheet = Image.new("RGB", (full, bottom + rows * _ROW + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 2), title, fill=_INK, font=_font())
    for number, (caption, pane) in enumerate(zip(captions, panes, strict=True)):
        row, column = divmod(number, columns)
        left, above = column * (width + _GAP), top + row * (_ROW + height)
        draw.text((left + _GAP, above + 2), caption, fill=_INK, font=_font())
        sheet.paste(Image.fromarray(pane), (left, above + _ROW))
    for entry in entries:
        _draw_entry(draw, entry, bottom + _GAP)
    return np.asarray(sheet)


@dataclass(frozen=True)
class _Entry:
    """A class in the legend: its place in pixels from the legend's corner."""

    name: str
    color: Color
    x: int
    y: int


def _legend(classes: Sequence[str], width: int) -> tuple[list[_Entry], int]:
    """Lay the class names out in as few rows as fit the width; also returns the number of rows."""
    entries: list[_Entry] = []
    x, row = _GAP, 0
    for name, color in [*zip(classes, PALETTE, strict=False), ("not counted", INVALID)]:
        needed = _SWATCH + 5 + round(_font().getlength(name)) + 14
        if x > _GAP and x + needed > width:
            x, row = _GAP, row + 1
        entries.append(_Entry(name, color, x, row * _ROW))
        x += needed
    return entries, row + 1


def _draw_entry(draw: ImageDraw.ImageDraw, entry: _Entry, top: int) -> None:
    y = top + entry.y
    square = (entry.x, y + 2, entry.x + _SWATCH, y + 2 + _SWATCH)
    draw.rectangle(square, fill=entry.color, outline=_INK)
    draw.text((entry.x + _SWATCH + 5, y), entry.name, fill=_INK, font=_font())


def _font(size: float | None = None) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def encode(picture: Picture) -> bytes:
    """The content of an image file: JPEG, which takes a tenth of PNG's time and room.

    At the full resolution of colours, so that classes keep theirs.
    """
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "JPEG", quality=92, subsampling=0)
    return content.getvalue()


def encode_png(picture: Picture) -> bytes:
    """The content of a PNG file of an RGB picture, uint8 of shape (height, width, 3)."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return content.getvalue()


def save_png(path: Path, picture: Picture) -> None:
    """Write an RGB picture, uint8 of shape (height, width, 3), as a PNG file.

    Raises:
        StorageError, NotWritable: the disk refused; an older file is then as it was.
    """
    write_atomically(path, encode_png(picture))
