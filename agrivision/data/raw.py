"""Any source, with its pixels uncompressed: for fast local disks, where decoding is what costs time.

A record is `KEY.image.raw`, all bands of a pixel beside one another as the device wants them, and, of a
tile that was cut from a scene, `KEY.place.json` with its coordinates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agrivision.data.parts import PLACE, RAW_IMAGE, TIFF, encode_place, encode_raw, kind_of
from agrivision.data.schema import Part
from agrivision.data.sources.source import Read, Reference, Source, TileReader
from agrivision.data.tile import Tile


@dataclass(frozen=True, kw_only=True)
class RawReader:
    """Another reader's tiles with other files.

    Attributes:
        reader: the other.
        places: whether its tiles have coordinates to keep.
    """

    reader: TileReader
    places: bool

    def files(self, reference: Reference) -> Sequence[Path]:
        """See TileReader."""
        return self.reader.files(reference)

    @contextmanager
    def reading(self) -> Iterator[Read]:
        """See TileReader."""
        with self.reader.reading() as read:

            def read_raw(reference: Reference) -> Tile | None:
                tile = read(reference)
                return None if tile is None else self._raw(tile)

            yield read_raw

    def _raw(self, tile: Tile) -> Tile:
        files = {RAW_IMAGE: encode_raw(tile.image)}
        if self.places:
            files[PLACE] = encode_place(tile.coordinates)
        return dataclasses.replace(tile, files=files)


def uncompressed(source: Source) -> Source:
    """The same source with raw files."""
    places = any(kind_of(part) == TIFF for part in source.parts)
    image = Part(extension=RAW_IMAGE, bands=len(source.bands))
    parts = (image, Part(extension=PLACE, bands=0)) if places else (image,)
    return dataclasses.replace(
        source, parts=parts, reader=RawReader(reader=source.reader, places=places)
    )
