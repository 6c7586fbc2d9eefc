"""Every way to get batches of 16 tiles as uint8 tensors on two cores.

Each delivers the same: RGB, near-infrared and labels of 16 tiles, shuffled, without normalisation or
augmentation. The peers come twice. `documented` follows their documentation: its decoders, one
four-band image a sample, the default collation. `tuned` gives them what we know: simplejpeg, planes
that stay apart, labels in one packed image, and a collation that decodes straight into the batch's
shared memory, so that a worker process copies nothing at all; four batches ahead, workers that stay.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.contestants.samples import Tensors
from benchmarks.data import Data


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to get batches.

    Attributes:
        title: in the table.
        opens: module and function that opens it; imported when it is its turn.
        needs: modules that it takes.
        formats: what it reads besides the source and the data set.
    """

    title: str
    opens: str
    needs: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()

    def batches(self, data: Data) -> Iterator[Tensors]:
        """Shuffled batches, for more epochs than anybody measures."""
        module, _, function = self.opens.partition(":")
        opened = getattr(importlib.import_module(f"{__name__}.{module}"), function)
        result: Iterator[Tensors] = opened(data)
        return result


def _contestant(title: str, opens: str, needs: str = "", formats: str = "") -> Contestant:
    return Contestant(
        title=title, opens=opens, needs=tuple(needs.split()), formats=tuple(formats.split())
    )


OURS, OURS_RAW = "agrivision", "agrivision-raw"
CONTESTANTS = {
    "folder": _contestant("folder of 13 files, OpenCV", "folder:documented", "cv2"),
    "folder-tuned": _contestant("folder of 13 files, tuned", "folder:tuned", "cv2"),
    "webdataset-13": _contestant(
        "webdataset, the same 13 files, OpenCV", "tars:files", "webdataset cv2", "tars"
    ),
    "webdataset-13-tuned": _contestant(
        "webdataset, the same 13 files, tuned", "tars:files_tuned", "webdataset cv2", "tars"
    ),
    "webdataset": _contestant(
        "webdataset, labels packed, documented", "tars:documented", "webdataset cv2"
    ),
    "webdataset-tuned": _contestant("webdataset, labels packed, tuned", "tars:tuned", "webdataset cv2"),
    "mosaicml": _contestant(
        "mosaicml-streaming, labels packed, documented",
        "mosaicml:documented",
        "streaming",
        "mds-documented",
    ),
    "mosaicml-tuned": _contestant(
        "mosaicml-streaming, labels packed, tuned", "mosaicml:tuned", "streaming", "mds-tuned"
    ),
    "litdata": _contestant(
        "litdata, labels packed, documented", "lightning:documented", "litdata", "litdata-documented"
    ),
    "litdata-tuned": _contestant(
        "litdata, labels packed, tuned", "lightning:tuned", "litdata", "litdata-tuned"
    ),
    OURS: _contestant("agrivision", "ours:loader"),
    "mosaicml-raw": _contestant(
        "mosaicml-streaming, uncompressed", "mosaicml:raw", "streaming", "mds-raw"
    ),
    "litdata-raw": _contestant("litdata, uncompressed", "lightning:raw", "litdata", "litdata-raw"),
    OURS_RAW: _contestant("agrivision, uncompressed", "ours:raw", "", "raw"),
}
