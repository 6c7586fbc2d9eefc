"""What a sample is made of, for all contestants: decoders, and collations that copy nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from agrivision.data.labels import VALID_BIT, decompress_into
from benchmarks.data import Data

BATCH = 16
WORKERS = 2  # processes or threads, on as many cores
Tensors = Sequence[torch.Tensor]  # planes (16, height, width, bands) and at the end labels or masks


def memory(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A batch's memory: in a worker process shared from the start, as torch's own collation has it."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    size = int(np.prod(shape)) * torch.empty(0, dtype=dtype).element_size()
    storage: Any = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
    strides = torch.empty(shape, device="meta").stride()
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape, strides)


class TunedBatch:
    """A collation that decodes packed samples straight into the batch's memory."""

    def __init__(self, data: Data, rgb: str = "rgb", nir: str = "nir", labels: str = "labels") -> None:
        self.shape, self.names = data.shape, (rgb, nir, labels)

    def __call__(self, samples: Sequence[Mapping[str, bytes]]) -> Tensors:
        """A batch of samples, each its files' contents by name."""
        count = len(samples)
        rgb = memory((count, *self.shape, 3), torch.uint8)
        nir = memory((count, *self.shape, 1), torch.uint8)
        labels = memory((count, *self.shape), torch.int16)
        planes = rgb.numpy(), nir.numpy(), labels.numpy().view(np.uint16)
        for slot, sample in enumerate(samples):
            contents = [sample[name] for name in self.names]
            simplejpeg.decode_jpeg(contents[0], "RGB", buffer=planes[0][slot])
            simplejpeg.decode_jpeg(contents[1], "GRAY", buffer=planes[1][slot])
            decompress_into(contents[2], planes[2][slot])
        return [rgb, nir, labels]


class TunedMasks:
    """The same for the 13 files: masks are joined into label bits before they leave the worker."""

    def __init__(self, data: Data) -> None:
        self.shape, self.masks = data.shape, data.masks
        self.scored = np.uint16((1 << len(data.schema.classes)) - 1)

    def __call__(self, samples: Sequence[Mapping[str, bytes]]) -> Tensors:
        """A batch of samples, each its files' contents by name."""
        count = len(samples)
        rgb = memory((count, *self.shape, 3), torch.uint8)
        nir = memory((count, *self.shape, 1), torch.uint8)
        labels = memory((count, *self.shape), torch.int16)
        bits = labels.numpy().view(np.uint16)
        for slot, sample in enumerate(samples):
            simplejpeg.decode_jpeg(sample["rgb.jpg"], "RGB", buffer=rgb[slot].numpy())
            simplejpeg.decode_jpeg(sample["nir.jpg"], "GRAY", buffer=nir[slot].numpy())
            self.join(sample, bits[slot])
        return [rgb, nir, labels]

    def join(self, sample: Mapping[str, bytes], out: NDArray[np.uint16]) -> None:
        """Label bits of one sample, shape (height, width).

        Masks are 0 or 255: an `and` with a bit of a byte says it all, 32 pixels at a time.
        """
        halves = np.zeros((2, *self.shape), np.uint8)
        for name, bit in self.masks:
            mask = grey(sample[f"{name}.png"])
            halves[bit // 8] |= mask & np.uint8(1 << bit % 8)
        out[...] = halves[1]
        out <<= 8
        out |= halves[0]
        out |= (out & self.scored) == 0
        valid = grey(sample["boundary.png"]) & grey(sample["mask.png"])
        out |= (valid & np.uint8(1)).astype(np.uint16) << np.uint16(VALID_BIT)


def grey(content: bytes) -> NDArray[np.uint8]:
    """One band, by OpenCV."""
    import cv2

    image: NDArray[np.uint8] = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE)
    return image


def colour(content: bytes) -> NDArray[np.uint8]:
    """RGB, by OpenCV."""
    import cv2

    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    result: NDArray[np.uint8] = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return result


def unpacked(content: bytes, shape: tuple[int, int]) -> NDArray[np.int16]:
    """Packed labels, shape (height, width)."""
    labels = np.empty(shape, np.uint16)
    decompress_into(content, labels)
    return labels.view(np.int16)


def interleaved(rgb: Any, nir: Any) -> NDArray[np.uint8]:
    """One four-band image, shape (height, width, 4), as models take it and tutorials make it."""
    return np.dstack([np.asarray(rgb), np.asarray(nir)])


class DocumentedSample:
    """What mosaicml's and litdata's own image types give, as one four-band image and labels."""

    def __init__(self, data: Data) -> None:
        self.shape = data.shape

    def __call__(self, sample: Any) -> Any:
        """Image and labels."""
        rgb, nir = sample["rgb"], sample["nir"]
        labels = unpacked(sample["labels"], self.shape)
        if isinstance(rgb, torch.Tensor):  # litdata: (bands, height, width), and everything is RGB
            return torch.cat([rgb, nir[:1]]), labels
        return interleaved(rgb, nir), labels


def raw_sample(sample: Any) -> Any:
    """An uncompressed tile as it is; only the type of the labels is one that torch computes with."""
    return sample["image"], np.asarray(sample["labels"]).view(np.int16)
