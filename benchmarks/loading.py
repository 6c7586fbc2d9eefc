"""L1 to L4: how fast batches come, beside the peers and beside nothing but decoding.

Everybody has two cores and two workers, processes or threads, and delivers batches of 16 tiles as uint8
tensors. Each measurement is a process of its own: a warm-up, of which two batches are compared with the
source to the pixel, then an epoch at least, in steady state. Contestants take turns.

    python -m benchmarks.loading [--only NAME,NAME]
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from benchmarks.common import (
    Median,
    Report,
    confine,
    cpu_seconds,
    fresh,
    interleaved,
    missing,
    parser,
    say,
)
from benchmarks.contestants import CONTESTANTS, OURS, OURS_RAW
from benchmarks.contestants.ours import ceiling
from benchmarks.contestants.samples import BATCH, WORKERS, Tensors
from benchmarks.data import RAW_TILES, Data, add_options, bits_of, digest, make

CEILING = "ceiling"
PACKAGES = ("webdataset", "mosaicml-streaming", "litdata", "simplejpeg", "opencv-python-headless")


class Speed(NamedTuple):
    """How fast a contestant was.

    Attributes:
        rate: tiles a second.
        cost: milliseconds of computing, of all its processes, a tile.
    """

    rate: float
    cost: float


def measure(name: str, data: Data, seconds: float, warm_up: int) -> Speed:
    """The speed of one contestant, in steady state, over an epoch at least.

    Args:
        name: of CONTESTANTS, or CEILING.
        data: where it is.
        seconds: to measure at least.
        warm_up: batches before, two of which are compared with the source.

    Raises:
        ValueError: a tile is not one of the source's: fast because wrong.
    """
    confine(WORKERS)
    torch.set_num_threads(1)
    if name == CEILING:
        return Speed(*ceiling(data, seconds))
    batches = CONTESTANTS[name].batches(data)
    truth = data.truth()
    for number in range(warm_up):
        batch = next(batches)
        if number < 2:
            verify(batch, data, truth)
    # The peers' uncompressed tiles are fewer; an epoch of them takes as long as one of any other.
    epoch = min(len(data.reader), RAW_TILES)
    done, computed, begin = 0, cpu_seconds(), time.perf_counter()
    while done < epoch or time.perf_counter() - begin < seconds:
        done += len(next(batches)[0])
    took, computed = time.perf_counter() - begin, cpu_seconds() - computed
    return Speed(done / took, 1000 * computed / done)


def verify(batch: Tensors, data: Data, truth: set[str]) -> None:
    """Compare a batch with the source, to the pixel and the label.

    Raises:
        ValueError: a tile is not one of the source's, or there are not as many as belong.
    """
    *planes, last = batch
    size = data.shape
    apart = [plane if plane.shape[1:3] == size else plane.permute(0, 2, 3, 1) for plane in planes]
    images = torch.cat(apart, dim=-1).numpy()
    labels = bits_of(last.numpy(), data) if last.ndim == 4 else last.numpy().view("uint16")
    found = [digest(image, label) for image, label in zip(images, labels, strict=True)]
    if len(found) != BATCH or not truth.issuperset(found):
        wrong = sum(one not in truth for one in found)
        raise ValueError(f"{wrong} of {len(found)} tiles differ from the source's")


def goals(report: Report, rates: Mapping[str, Median]) -> None:
    """The claims that these rates decide on."""
    claims = [
        ("L1", "a folder of 13 files, OpenCV", OURS, "folder", 6.5),
        ("L1", "webdataset, the same 13 files", OURS, "webdataset-13", 5.0),
        ("L2", "webdataset, packed, tuned", OURS, "webdataset-tuned", 1.35),
        ("L2", "litdata, packed, tuned", OURS, "litdata-tuned", 1.3),
        ("L2", "mosaicml-streaming, packed, tuned", OURS, "mosaicml-tuned", 1.6),
        ("L4", "litdata, uncompressed", OURS_RAW, "litdata-raw", 5.0),
        ("L4", "mosaicml-streaming, uncompressed", OURS_RAW, "mosaicml-raw", 6.0),
    ]
    for claim, what, ours, peer, goal in claims:
        if ours in rates and peer in rates:
            report.goal(claim, f"faster than {what}", rates[ours] / rates[peer], at_least=goal)
    if OURS in rates and CEILING in rates:
        share = 100 * rates[OURS] / rates[CEILING]
        report.goal("L3", "of bare decoding on the same cores", share, at_least=90.0, unit="%")
    report.goals.sort(key=lambda goal: goal.claim)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the tables."""
    options = add_options(parser(__doc__))
    options.add_argument("--only", default="", help="names of contestants, separated by commas")
    options.add_argument("--seconds", type=float, default=3.0, help="of a measurement at least")
    chosen = options.parse_args(argv)
    report = Report("Loading", chosen, PACKAGES)
    names = _names(chosen.only, report)
    formats = {"truth.json"}.union(*(CONTESTANTS[name].formats for name in names if name != CEILING))
    data = make(chosen, tuple(formats))
    seconds, warm_up = (0.05, 3) if chosen.quick else (chosen.seconds, 24)
    costs: dict[str, list[float]] = {name: [] for name in names}

    def turn(name: str) -> float:
        speed = fresh(measure, name, data, seconds, warm_up)
        costs[name].append(speed.cost)
        return speed.rate

    turns = {name: functools.partial(turn, name) for name in names}
    rates = interleaved(1 if chosen.quick else chosen.rounds, turns)
    report.header = ["loader", "tiles/s", "spread", "CPU ms a tile", "agrivision is faster by"]
    for name, rate in rates.items():
        title = "nothing but decoding" if name == CEILING else CONTESTANTS[name].title
        ours = rates.get(OURS_RAW if name.endswith("-raw") else OURS)
        faster = f"{ours / rate:.2f} x" if ours and name not in (OURS, OURS_RAW) else ""
        report.rows.append([title, rate, f"{100 * rate.spread:.0f} %", Median(costs[name]), faster])
    goals(report, rates)
    report.notes += [
        f"{len(data.reader)} training tiles of {data.shape[0]} x {data.shape[1]} pixels, batch {BATCH},"
        f" {WORKERS} workers on {WORKERS} cores, warm cache, {len(next(iter(rates.values())).values)}"
        " rounds, medians.",
        "Two batches of each measurement were compared with the source: pixels and labels are equal.",
        "documented: the peer's own decoders, one four-band image, default collation."
        " tuned: simplejpeg, planes apart, a collation that decodes into the batch's shared memory,"
        " 4 batches ahead, workers that stay.",
    ]
    report.finish()


def _names(only: str, report: Report) -> list[str]:
    """Who takes part: those that are asked for and installed."""
    wanted = only.split(",") if only else [*CONTESTANTS, CEILING]
    if unknown := set(wanted) - {*CONTESTANTS, CEILING}:
        sys.exit(f"no contestant {min(unknown)!r}: there are {', '.join([*CONTESTANTS, CEILING])}")
    names = []
    for name in wanted:
        if name != CEILING and (lacking := missing(*CONTESTANTS[name].needs)):
            say(f"{CONTESTANTS[name].title}: left out, not installed: {', '.join(lacking)}")
            report.left_out(CONTESTANTS[name].title, lacking)
        else:
            names.append(name)
    return names


if __name__ == "__main__":
    main()
