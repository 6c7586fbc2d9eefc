"""Label files: one zstd frame of exactly a tile's labels, or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zstandard

from agrivision.data.labels import compress, decompress_into
from tests.fuzz.harness import REFUSED, Target, answer

_SIDE = 24
_BYTES = 2 * _SIDE * _SIDE


def _good() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    stripes = np.repeat(np.arange(_SIDE, dtype=np.uint16) // 5, _SIDE).reshape(_SIDE, _SIDE) | 0x8000
    noise = rng.integers(0, 1 << 16, (_SIDE, _SIDE), dtype=np.uint16)
    return [stripes, noise, np.zeros((_SIDE, _SIDE), np.uint16)]


def labels(folder: Path) -> Target:
    """Of another size, several frames, bombs, cut, and what follows a frame."""
    del folder  # nothing is written
    raw = [np.ascontiguousarray(labels, "<u2").tobytes() for labels in _good()]
    plain = zstandard.ZstdCompressor(write_content_size=False)
    checked = zstandard.ZstdCompressor(level=19, write_checksum=True)
    seeds = [
        *map(compress, _good()),
        plain.compress(raw[0]),
        checked.compress(raw[0]),
        checked.compress(raw[0] + raw[0]),
        compress(_good()[0]) + compress(_good()[1]),
        b"\x50\x2a\x4d\x18\x04\0\0\0skip" + compress(_good()[0]),
        checked.compress(bytes(1 << 24)),
        zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
        ).compress(raw[1]),
    ]

    def run(data: bytes) -> None:
        out = np.full((_SIDE, _SIDE), 0xABCD, np.uint16)
        result = answer(lambda: decompress_into(data, out))
        expected = _slowly(data)
        assert (result is REFUSED) == (expected is None), "refused what is right, or took what is not"
        assert expected is None or out.astype("<u2").tobytes() == expected
        again = np.zeros((_SIDE, _SIDE), np.uint16)
        decompress_into(seeds[0], again)  # what damage leaves in a decompressor harms nobody
        assert np.array_equal(again, _good_first)

    _good_first = _good()[0]
    return Target(seeds=tuple(seeds), run=run)


def _slowly(data: bytes) -> bytes | None:
    """The only frame's content by zstd's other interface; None where it is not as it should be."""
    try:
        if zstandard.get_frame_parameters(data).content_size != _BYTES:
            return None
        frame = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
        content = frame.decompress(data)
    except zstandard.ZstdError:
        return None
    whole = frame.eof and not frame.unused_data and len(content) == _BYTES
    return content if whole else None
