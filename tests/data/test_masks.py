"""Masks that are read the fast way are those that Pillow reads, and damage is never overlooked."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from agrivision.data.sources import masks as module
from agrivision.data.sources.masks import MaskReader
from agrivision.data.sources.source import Flaw
from tests.fuzz.pngs import chunk, header

SIZE = (7, 5)


def png(pixels: np.ndarray, mode: str) -> bytes:
    if mode == "P":
        image = Image.fromarray(pixels.astype(np.uint8), "P")
        image.putpalette([9, 9, 9] * 256)  # what counts are the indexes, not the colours
    elif mode == "1":
        image = Image.fromarray(pixels > 0)
    else:
        image = Image.fromarray(pixels.astype({"L": np.uint8, "I;16": np.uint16}[mode]))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def whole(mask: np.ndarray | bool) -> np.ndarray:
    return np.broadcast_to(mask, SIZE)


pixels = st.one_of(
    hnp.arrays(np.uint8, SIZE, elements=st.sampled_from([0, 1, 255])),
    st.sampled_from([0, 1, 255]).map(lambda value: np.full(SIZE, value, np.uint8)),
)


@given(st.lists(st.tuples(pixels, st.sampled_from(["L", "1", "P", "I;16"])), max_size=40))
def test_a_mask_is_on_where_its_pixels_are_above_0(tmp_path_factory, images):
    path = tmp_path_factory.mktemp("masks") / "mask.png"
    reader = MaskReader(size=SIZE)
    for values, mode in images * 2:  # the second time they are known
        path.write_bytes(png(values, mode))
        mask = reader.read(path)
        np.testing.assert_array_equal(whole(mask), values > 0)
        assert isinstance(mask, bool) == (len(np.unique(values > 0)) == 1)


def test_what_is_remembered_is_bounded(tmp_path):
    path = tmp_path / "mask.png"
    reader = MaskReader(size=SIZE)
    for value in range(256):
        path.write_bytes(png(np.full(SIZE, value), "L"))
        assert reader.read(path) is (value > 0)
    assert len(reader._uniform) == module._KNOWN


@pytest.mark.parametrize("value", [0, 255])
def test_a_known_mask_that_is_damaged_is_found(tmp_path, value):
    path = tmp_path / "mask.png"
    good = png(np.full(SIZE, value), "L")
    path.write_bytes(good)
    reader = MaskReader(size=SIZE)
    assert reader.read(path) is (value > 0)
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1
        path.write_bytes(bad)
        with pytest.raises(Flaw, match=r"mask\.png: not a whole PNG") as flaw:
            reader.read(path)
        assert flaw.value.problem.kind == "unreadable"
    for end in range(len(good)):
        path.write_bytes(good[:end])
        with pytest.raises(Flaw, match="not a whole PNG"):
            reader.read(path)
    path.unlink()
    with pytest.raises(Flaw, match="cannot be read"):
        reader.read(path)


def test_a_uniform_mask_of_another_size_is_none(tmp_path):
    path = tmp_path / "mask.png"
    path.write_bytes(png(np.zeros(SIZE[::-1]), "L"))
    for _ in range(2):
        with pytest.raises(Flaw, match="7 x 5 pixels with 1 band where 5 x 7 pixels with 1 band"):
            MaskReader(size=SIZE).read(path)


def test_libpng_and_pillow_read_the_same(monkeypatch, tmp_path):
    path = tmp_path / "mask.png"
    random = np.random.default_rng(0)
    for _ in range(40):
        values = random.choice([0, 0, 1, 255], SIZE).astype(np.uint8)
        path.write_bytes(png(values, "L"))
        fast = MaskReader(size=SIZE).read(path)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_is_plain", lambda *_: False)
            np.testing.assert_array_equal(whole(MaskReader(size=SIZE).read(path)), whole(fast))


def test_pixels_whose_own_checksum_differs_are_refused(tmp_path):
    """The chunk is whole, but what is compressed in it is not."""
    content = bytearray(png(np.arange(35).reshape(SIZE) % 3, "L"))
    start = content.index(b"IDAT")
    size = int.from_bytes(content[start - 4 : start], "big")
    content[start + 4 + size - 1] ^= 1
    checksum = zlib.crc32(content[start : start + 4 + size])
    content[start + 4 + size : start + 8 + size] = checksum.to_bytes(4, "big")
    path = tmp_path / "mask.png"
    path.write_bytes(content)
    with pytest.raises(Flaw, match="not a whole PNG"):
        MaskReader(size=SIZE).read(path)


def built(width, height, depth, colour, data, *, interlace=0, pieces=1, between=b""):
    """A PNG of these bytes of pixels, with its checksums."""
    packed = zlib.compress(data)
    step = -(-len(packed) // pieces)
    parts = [chunk(b"IDAT", packed[start : start + step]) for start in range(0, len(packed), step)]
    begin = b"\x89PNG\r\n\x1a\n" + header(width, height, depth, colour, interlace)
    palette = chunk(b"PLTE", bytes(768)) if colour == 3 else b""
    return begin + palette + between.join(parts) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("depth", "colour"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 3)])
@pytest.mark.parametrize("interlace", [0, 1])
@pytest.mark.parametrize("pieces", [1, 3])
def test_pixels_that_are_missing_are_not_filled_up(tmp_path, depth, colour, interlace, pieces):
    """The compressed bytes are whole, but there are fewer of them than the header says."""
    height, width = SIZE
    sides = [(height, width)]
    if interlace:  # Adam7 for 7 x 5 pixels, counted by hand
        sides = [(1, 1), (1, 1), (1, 2), (2, 1), (2, 3), (4, 2), (3, 5)]
    full = b"".join((b"\0" + b"\xff" * ((columns * depth + 7) // 8)) * rows for rows, columns in sides)
    path = tmp_path / "mask.png"

    def read(data: bytes) -> np.ndarray | bool:
        path.write_bytes(built(width, height, depth, colour, data, interlace=interlace, pieces=pieces))
        return MaskReader(size=SIZE).read(path)

    assert np.all(read(full))
    for size in (len(full) - 1, len(full) // 2, 0):
        with pytest.raises(Flaw, match="not a whole PNG"):
            read(full[:size])


@pytest.mark.parametrize("mode", ["L", "1", "P", "I;16"])
def test_pixels_can_be_written(mode):
    """Else torch warns those who score them."""
    assert module.png_pixels(png(np.zeros(SIZE), mode), SIZE).flags.writeable


def test_pixels_in_two_places_are_refused(tmp_path):
    """Pillow would take those of the first place, and zeros."""
    height, width = SIZE
    text = chunk(b"tEXt", b"a\0")
    data = np.random.default_rng(0).integers(0, 256, height * (2 * width + 1), np.uint8)
    data[:: 2 * width + 1] = 0
    path = tmp_path / "mask.png"
    path.write_bytes(built(width, height, 16, 0, data.tobytes(), pieces=2, between=text))
    with pytest.raises(Flaw, match="not in one piece"):
        MaskReader(size=SIZE).read(path)


def test_a_wrong_size_is_known_from_the_header(monkeypatch, tmp_path):
    path = tmp_path / "mask.png"
    path.write_bytes(png(np.zeros((9, 5)), "L"))
    monkeypatch.setattr(module.imagecodecs, "png_decode", None)
    with pytest.raises(Flaw, match="5 x 9 pixels with 1 band where 5 x 7"):
        MaskReader(size=SIZE).read(path)
