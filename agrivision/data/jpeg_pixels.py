"""Tiles whose JPEG files are decoded on the device that they go to: on a GPU by nvJPEG.

For nodes with few cores for each GPU: threads then only read, compare checksums and unpack labels.
torchvision does the decoding, on the CPU too, with the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np
import simplejpeg
import torch

from agrivision.data.decode import Pixels
from agrivision.data.parts import JPEG, describe, jpeg_shape, kind_of
from agrivision.data.schema import Part, Schema
from agrivision.errors import ConfigurationError, DatasetError


@dataclass(frozen=True, kw_only=True)
class JpegPixels(Pixels):
    """Some tiles; their images have no planes before `to`.

    Attributes:
        parts: the image files of a record.
        files: by tile, the content of its files, uint8 tensors in host memory.
    """

    parts: tuple[Part, ...]
    files: list[Sequence[torch.Tensor]]

    @classmethod
    def of(cls, labels: Pixels, schema: Schema) -> JpegPixels:
        """For as many tiles as there is memory of labels for."""
        return cls(
            planes=(),
            labels=labels.labels,
            lease=labels.lease,
            parts=schema.parts,
            files=[()] * len(labels.labels),
        )

    def put(self, contents: Sequence[memoryview], slot: int) -> None:
        """Take a tile's image files, which stay where they are.

        Raises:
            DatasetError: one is no JPEG, or of another size, as its header says.
        """
        side = self.labels.shape[-1]
        for content, part in zip(contents, self.parts, strict=True):
            try:
                shape = jpeg_shape(content)
            except DatasetError as error:
                raise DatasetError(f"{part.extension}: {error}") from None
            if shape != (side, side, part.bands):
                belongs = describe((side, side, part.bands))
                raise DatasetError(f"{part.extension}: {describe(shape)} where {belongs} belong")
        self.files[slot] = [torch.frombuffer(content, dtype=torch.uint8) for content in contents]

    def stand_in(self, slot: int, other: int | None) -> None:
        """See Pixels."""
        super().stand_in(slot, other)
        self.files[slot] = () if other is None else self.files[other]

    def undecodable(self, device: torch.device) -> dict[int, DatasetError]:
        """Which tiles a device's decoder refuses, and why: it tells only that there is one."""
        found: dict[int, DatasetError] = {}
        for slot, files in enumerate(self.files):
            try:
                for file, part in zip(files, self.parts, strict=False):
                    _decode([file], part, device)
            except DatasetError as error:
                found[slot] = error
        return found

    def part(self, slots: slice) -> JpegPixels:
        """See Pixels."""
        return JpegPixels(
            planes=(),
            labels=self.labels[slots],
            lease=self.lease,
            parts=self.parts,
            files=self.files[slots],
        )

    def to(self, device: torch.device) -> Pixels:
        """Decode on a device; the labels as of Pixels.

        Raises:
            DatasetError: a file cannot be decoded.
        """
        rest = super().to(device)
        planes = tuple(self._plane(place, part, device) for place, part in enumerate(self.parts))
        return Pixels(planes=planes, labels=rest.labels, lease=rest.lease)

    def _plane(self, place: int, part: Part, device: torch.device) -> torch.Tensor:
        there = [slot for slot, files in enumerate(self.files) if files]
        if len(there) == len(self.files):
            return _decode([files[place] for files in self.files], part, device)
        side = self.labels.shape[-1]
        plane = torch.zeros(len(self.files), side, side, part.bands, dtype=torch.uint8, device=device)
        if there:
            plane[there] = _decode([self.files[slot][place] for slot in there], part, device)
        return plane

    def images(self) -> torch.Tensor:
        """See Pixels; decoded on the CPU."""
        return self.to(torch.device("cpu")).images()


def _decode(files: list[torch.Tensor], part: Part, device: torch.device) -> torch.Tensor:
    """Shape (files, height, width, bands), uint8."""
    vision = _torchvision()
    mode = vision.io.ImageReadMode.GRAY if part.bands == 1 else vision.io.ImageReadMode.RGB
    try:
        images = vision.io.decode_jpeg(files, mode=mode, device=device)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise DatasetError(
            f"{part.extension}: a JPEG cannot be decoded on {device} ({reason})"
        ) from None
    return torch.stack(images).permute(0, 2, 3, 1).contiguous()


def check_decoder(schema: Schema, device: torch.device) -> None:
    """See whether a data set's images can be decoded on a GPU.

    Raises:
        ConfigurationError: they are no JPEG files, there is no GPU, or torchvision cannot use it.
    """
    others = [part.extension for part in schema.parts if kind_of(part) != JPEG]
    if others:
        raise ConfigurationError(
            f"data.decoder is gpu, but the data set holds {', '.join(others)}: only JPEG can be decoded"
            " there; take cpu"
        )
    if device.type != "cuda":
        raise ConfigurationError(
            f"data.decoder is gpu, but the run is on {device.type}: take cpu, or a node with a GPU"
        )
    grey = simplejpeg.encode_jpeg(np.zeros((8, 8, 1), np.uint8), colorspace="GRAY")
    try:
        _decode(
            [torch.frombuffer(bytearray(grey), dtype=torch.uint8)],
            Part(extension="grey.jpg", bands=1),
            device,
        )
    except DatasetError as error:
        raise ConfigurationError(
            f"data.decoder is gpu, but torchvision has no nvJPEG here ({error}): take cpu"
        ) from None


@cache
def _torchvision() -> ModuleType:
    """Torchvision, imported when first needed: no other run needs it."""
    import torchvision.io  # noqa: PLC0415

    return torchvision  # type: ignore[no-any-return]
