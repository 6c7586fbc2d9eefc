"""L6: how fast a source becomes shards, beside the peers' writers.

All make the same samples of the same files: the JPEG bytes as they are, eleven mask PNGs joined into
one image of label bits and compressed with zstd. `prepare` also decodes the JPEGs to find damaged ones
and to add up statistics, takes checksums, and calls fsync; the peers do none of that.

    python -m benchmarks.prepare
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from agrivision.data.labels import compress
from agrivision.data.schema import Schema
from benchmarks.common import Report, confine, fresh, interleaved, missing, parser
from benchmarks.contestants.samples import WORKERS, TunedMasks
from benchmarks.data import SPLIT, Data, add_options, bits_of, make

Sample = Callable[[str], dict[str, bytes]]


class PillowSample:
    """A tile's files as bytes, masks read by Pillow, as the peers' documentation reads images."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __call__(self, key: str) -> dict[str, bytes]:
        """By the key."""
        rgb, nir, *masks = self.data.files(key).values()
        planes = np.stack([np.asarray(Image.open(mask)) for mask in masks])
        labels = compress(bits_of(planes, self.data))
        return {"rgb": rgb.read_bytes(), "nir": nir.read_bytes(), "labels": labels}


class TunedSample:
    """The same with OpenCV, and the bits joined byte by byte."""

    def __init__(self, data: Data) -> None:
        self.data, self.masks = data, TunedMasks(data)

    def __call__(self, key: str) -> dict[str, bytes]:
        """By the key."""
        files = {name: path.read_bytes() for name, path in self.data.files(key).items()}
        labels = np.empty(self.data.shape, np.uint16)
        self.masks.join(files, labels)
        return {"rgb": files["rgb.jpg"], "nir": files["nir.jpg"], "labels": compress(labels)}


def ours(data: Data, keys: Sequence[str], folder: Path, workers: int) -> float:
    """Tiles a second of the command `prepare` over the training split, start and end included.

    Workers of a call from here would import this script first, and torch with it.
    """
    confine(workers)
    source, out = folder / "source", folder / "dataset"
    source.mkdir()
    (source / SPLIT).symlink_to(data.source / SPLIT)
    command = [sys.executable, "-m", "agrivision", "prepare", str(source), str(out)]
    begin = time.perf_counter()
    subprocess.run([*command, "--workers", str(workers)], check=True, stdout=subprocess.DEVNULL)
    took = time.perf_counter() - begin
    assert Schema.read(out).split(SPLIT).tiles == len(keys)
    return len(keys) / took


def mosaicml(data: Data, keys: Sequence[str], folder: Path, sample: type[Any]) -> float:
    """Tiles a second of an MDSWriter in this process."""
    from streaming import MDSWriter

    confine(1)
    read: Sample = sample(data)
    columns = dict.fromkeys(("rgb", "nir", "labels"), "bytes")
    begin = time.perf_counter()
    with MDSWriter(out=str(folder / "mds"), columns=columns) as writer:
        for key in keys:
            writer.write(read(key))
    return len(keys) / (time.perf_counter() - begin)


def litdata(data: Data, keys: Sequence[str], folder: Path, sample: type[Any]) -> float:
    """Tiles a second of litdata's `optimize` with one worker."""
    from litdata import optimize

    confine(1)
    how = {"chunk_bytes": "64MB", "num_workers": 1, "verbose": False}
    begin = time.perf_counter()
    optimize(sample(data), list(keys), str(folder / "chunks"), **how)
    return len(keys) / (time.perf_counter() - begin)


def check(data: Data, keys: Sequence[str]) -> None:
    """Both ways to make a sample give what the data set holds.

    Raises:
        ValueError: they do not.
    """
    reader = data.reader
    samples: list[Sample] = [PillowSample(data)]
    if not missing("cv2"):
        samples.append(TunedSample(data))
    for sample in samples:
        for tile in range(0, len(keys), max(1, len(keys) // 8)):
            if list(sample(keys[tile]).values()) != [bytes(file) for file in reader.read(tile)]:
                raise ValueError(f"{type(sample).__name__} makes something else of {keys[tile]}")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the tables."""
    chosen = add_options(parser(__doc__)).parse_args(argv)
    report = Report("Preparing", chosen, ("mosaicml-streaming", "litdata", "opencv-python-headless"))
    data = make(chosen, ())
    keys = data.tile_keys()
    fresh(check, data, keys)
    turns: dict[str, Callable[[Path], float]] = {}
    two, one = f"agrivision prepare, {WORKERS} processes", "agrivision prepare, one process"
    for title, workers in ((two, WORKERS), (one, 1)):
        turns[title] = functools.partial(_turn, ours, data, keys, workers)
    mds = "mosaicml-streaming's MDSWriter, one process, "
    chunks = "litdata's optimize, one worker, "
    for peer, function, module in ((mds, mosaicml, "streaming"), (chunks, litdata, "litdata")):
        for how, sample, needs in (("Pillow", PillowSample, ()), ("OpenCV", TunedSample, ("cv2",))):
            if lacking := missing(module, *needs):
                report.left_out(peer + how, lacking)
            else:
                turns[peer + how] = functools.partial(_turn, function, data, keys, sample)
    rates = interleaved(
        1 if chosen.quick else chosen.rounds,
        {title: functools.partial(turn, data.root) for title, turn in turns.items()},
    )
    report.header = ["writer", "tiles/s", "spread", "agrivision in one process is faster by"]
    for title, rate in rates.items():
        faster = f"{rates[one] / rate:.2f} x" if title not in (one, two) else ""
        report.rows.append([title, rate, f"{100 * rate.spread:.0f} %", faster])
    report.goal(
        "L6", f"prepare, {WORKERS} processes, end to end", rates[two], at_least=450.0, unit="tiles/s"
    )
    if (best := f"{mds}OpenCV") in rates:
        report.goal("L6", "faster than MDSWriter, a process", rates[one] / rates[best], at_least=2.5)
    report.notes.append(
        "agrivision also decodes every JPEG, adds up statistics, takes checksums and calls fsync; the"
        " peers do not. The samples of all are equal, byte for byte."
    )
    report.finish()


def _turn(
    function: Callable[..., float], data: Data, keys: Sequence[str], how: object, parent: Path
) -> float:
    """One measurement in a process and a folder of its own, on the disk that holds the data."""
    folder = Path(tempfile.mkdtemp(prefix="prepare-", dir=parent))
    try:
        return fresh(function, data, keys, folder, how)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
