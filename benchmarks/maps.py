"""M1 to M3: a scene in a file to its map in another, beside a plain script and the peers.

Everybody has the same UNet with random weights, shows it squares of the same size at the same distance,
and computes in the same precision. Each measurement is a process of its own, which makes the map of a
small scene first; contestants take turns. The scene is made here, the same one every time.

    python -m benchmarks.maps [--side 4096] [--only NAME,NAME]
"""

from __future__ import annotations

import argparse
import functools
import re
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from torch import nn

from agrivision import checkpoint
from agrivision.config import ModelConfig
from agrivision.inference.tiling import Grid, Tiling
from agrivision.inference.trained import Description
from agrivision.model.build import build_model
from agrivision.model.precision import Precision
from benchmarks.common import Median, Report, cpu_seconds, fresh, interleaved, missing, parser, say
from benchmarks.contestants.scenes import (
    ALONE,
    MAPPERS,
    OURS,
    PLAIN,
    RASTERVISION,
    TORCHGEO,
    Setting,
)
from benchmarks.contestants.sliding import starts
from benchmarks.training import CLASSES, NORMALISER

BANDS = ("red", "green", "blue", "nir")
PACKAGES = ("rasterio", "torchgeo", "rastervision-pytorch-learner")
SCENE, SMALL, RUN = "scene.tif", "small.tif", "run"  # in the folder of what is made
_PATCH = 64  # pixels: what is alike in a made scene
_ROWS = 512  # pixels: of it that are made at a time
_GRAIN = 8.0  # deviation of its noise
_LOADERS = 4  # processes that read for a GPU


class Made(NamedTuple):
    """What a turn gave.

    Attributes:
        seconds: from the scene's file to the map's.
        computed: seconds of computing in that time, of all processes and threads.
        peak: MiB that the process had in memory at most.
        path: of the map.
    """

    seconds: float
    computed: float
    peak: float
    path: Path


def measure(name: str, setting: Setting) -> Made:
    """Make a map into an empty folder beside the run, and one of the small scene before.

    Args:
        name: of MAPPERS.
        setting: what all have in common.
    """
    folder = setting.run.parent
    make = MAPPERS[name].ready(setting)
    with TemporaryDirectory(dir=folder) as elsewhere:
        make(folder / SMALL, Path(elsewhere))
    out = folder / f"{name}-{setting.precision}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    computed, begin = cpu_seconds(), time.perf_counter()
    path = make(folder / SCENE, out)
    took = time.perf_counter() - begin
    return Made(took, cpu_seconds() - computed, _peak(), path)


def _peak() -> float:
    """MiB; of this program, and not of the one that started it."""
    match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text("utf-8"))
    assert match is not None
    return int(match[1]) / 1024


def make_scene(path: Path, side: int) -> None:
    """Write a scene that is the same every time: patches that blend, with noise on them."""
    generator = np.random.default_rng(0)
    patches = generator.uniform(20, 235, (len(BANDS), side // _PATCH + 2, side // _PATCH + 2))
    profile = {"driver": "GTiff", "height": side, "width": side, "count": len(BANDS), "dtype": "uint8"}
    place = {"crs": "EPSG:26914", "transform": rasterio.Affine(0.5, 0, 485900, 0, -0.5, 5209247)}
    layout = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate"}
    kinds = {"photometric": "MINISBLACK", "alpha": "NO"}
    with rasterio.open(path, "w", **profile, **place, **layout, **kinds) as target:
        target.descriptions = BANDS
        for top in range(0, side, _ROWS):
            bottom = min(top + _ROWS, side)
            even = _between(_between(patches, 1, top, bottom), 2, 0, side)
            noisy = even + generator.normal(0, _GRAIN, even.shape)
            target.write(noisy.clip(1, 255).astype(np.uint8), window=((top, bottom), (0, side)))


def _between(patches: NDArray[np.float64], axis: int, start: int, stop: int) -> NDArray[np.float64]:
    """Pixels along one axis, interpolated between patches."""
    place = np.arange(start, stop) / _PATCH
    first = place.astype(int)
    share = (place - first).reshape([-1 if number == axis else 1 for number in range(3)])
    one, two = patches.take(first, axis), patches.take(first + 1, axis)
    pixels: NDArray[np.float64] = one + share * (two - one)
    return pixels


def make_run(folder: Path, base: int, tile: int, scene: Path) -> None:
    """Save a UNet with random weights, whose normalisations know what they normalise.

    Without that, its maps would hardly have more than one class, and folding a normalisation into a
    convolution would change nothing.
    """
    torch.manual_seed(0)
    model = ModelConfig(base_channels=base)
    module = build_model(model, len(BANDS), CLASSES)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean of what it has seen
    with rasterio.open(scene) as source, torch.no_grad():
        seen = source.read(window=((0, 2 * tile), (0, 2 * tile)))
        module.train()(NORMALISER(torch.from_numpy(seen)[None]))
        module.head.weight.mul_(4)  # away from ties
    description = Description(
        model=model,
        bands=BANDS,
        classes=tuple(f"class {number}" for number in range(CLASSES)),
        class_values=(),
        dtype="uint8",
        tile=tile,
        mean=NORMALISER.mean,
        std=NORMALISER.std,
        nodata=None,
        data_fingerprint="0" * 64,
    )
    states = {"model": module.state_dict(), "description": description.to_dict()}
    checkpoint.save(folder / "checkpoints", states, step=1, epoch=1)


def equal(one: Path, two: Path) -> float:
    """Per cent of the pixels on which two maps agree.

    Raises:
        ValueError: they are not of the same scene.
    """
    with rasterio.open(one) as first, rasterio.open(two) as second:
        if (first.shape, first.transform) != (second.shape, second.transform):
            raise ValueError(f"{one} and {two} are not maps of the same scene")
        rows = range(0, first.height, _ROWS)
        alike = 0
        for top in rows:
            window = (top, min(top + _ROWS, first.height)), (0, first.width)
            alike += int((first.read(1, window=window) == second.read(1, window=window)).sum())
    return 100 * alike / float(first.height * first.width)


def times(one: Median, other: Median) -> float:
    """How many times as fast one was: the median over the rounds, whose turns share their moods."""
    return statistics.median(a / b for a, b in zip(one.values, other.values, strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the tables."""
    options = parser(__doc__)
    options.add_argument(
        "--base", type=int, default=16, help="channels of the first level (default 16)"
    )
    options.add_argument("--side", type=int, default=3072, help="of the scene in pixels (default 3072)")
    options.add_argument("--tile", type=int, default=512, help="of our windows in pixels (default 512)")
    options.add_argument("--margin", type=int, default=64, help="around each (default 64)")
    options.add_argument("--overlap", type=int, default=64, help="of neighbours (default 64)")
    options.add_argument(
        "--batch",
        type=int,
        default=None,
        help="windows in a forward pass of everybody but the plain script (default: what `agrivision"
        " predict` takes on this device)",
    )
    options.add_argument("--only", default="", help="names of contestants, separated by commas")
    args = options.parse_args(argv)
    if args.quick:
        args.base, args.side, args.batch, args.rounds = 2, 160, 2, 2
        args.tile, args.margin, args.overlap = 64, 16, 16
    report = Report("M1 to M3: maps", args, PACKAGES)
    names = _names(args.only, report)
    tiling = Tiling(tile=args.tile, margin=args.margin, overlap=args.overlap)
    if args.side < args.tile + 2 * args.margin:
        sys.exit(
            f"--side is {args.side}: the plain script needs {args.tile + 2 * args.margin} at least"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = args.batch or tiling.batch(device)
    report.header = ["map", "megapixels/s", "spread, %", "times plain", "CPU s", "MiB", "as ours, %"]
    with TemporaryDirectory(prefix="agrivision-maps-") as temporary:
        folder = Path(temporary)
        make_scene(folder / SCENE, args.side)
        make_scene(folder / SMALL, args.tile + 2 * args.margin)
        make_run(folder / RUN, args.base, args.tile, folder / SCENE)
        for precision in _precisions(device, report):
            setting = Setting(
                run=folder / RUN,
                tiling=tiling,
                batch=batch,
                precision=precision,
                device=device,
                workers=0 if device.type == "cpu" else _LOADERS,
            )
            _compare(names, setting, args, report)
        report.notes += _notes(args, setting)
    report.finish()


def _compare(names: Sequence[str], setting: Setting, args: argparse.Namespace, report: Report) -> None:
    """Let all take their turns in one precision."""
    made: dict[str, list[Made]] = {name: [] for name in names}

    def turn(name: str) -> float:
        made[name].append(fresh(measure, name, setting))
        return float(args.side**2 / 1e6 / made[name][-1].seconds)

    turns = {name: functools.partial(turn, name) for name in names}
    rates = interleaved(args.rounds, turns)
    reference = next((name for name in (ALONE, OURS) if name in names), None)
    for name, rate in rates.items():
        faster = times(rate, rates[PLAIN]) if PLAIN in rates else ""
        alike = equal(made[reference][-1].path, made[name][-1].path) if reference else ""
        title = f"{MAPPERS[name].title}, {setting.precision}"
        computed = Median([one.computed * 1e6 / args.side**2 for one in made[name]])
        peak = Median([one.peak for one in made[name]])
        report.rows.append([title, rate, 100 * rate.spread, faster, computed, peak, alike])
    _judge(rates, setting.precision, report)


def _judge(rates: Mapping[str, Median], precision: Precision, report: Report) -> None:
    """The claims: of the command as users call it, which makes more than the map."""
    for claim, peer in (("M1", PLAIN), ("M2", TORCHGEO), ("M3", RASTERVISION)):
        if OURS in rates and peer in rates:
            what = f"{MAPPERS[OURS].title} against {MAPPERS[peer].title}, {precision}"
            report.goal(claim, what, times(rates[OURS], rates[peer]), at_least=1.5)


def _precisions(device: torch.device, report: Report) -> list[Precision]:
    if device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return ["fp32", "bf16"]
    report.notes.append("bf16 is left out: this processor has no instructions for it")
    return ["fp32"]


def _names(only: str, report: Report) -> list[str]:
    """Who takes part: those that are asked for and installed."""
    wanted = only.split(",") if only else list(MAPPERS)
    if unknown := set(wanted) - set(MAPPERS):
        sys.exit(f"no contestant {min(unknown)!r}: there are {', '.join(MAPPERS)}")
    names = []
    for name in wanted:
        if lacking := missing(*MAPPERS[name].needs):
            say(f"{MAPPERS[name].title}: left out, not installed: {', '.join(lacking)}")
            report.left_out(MAPPERS[name].title, lacking)
        else:
            names.append(name)
    return names


def _notes(args: argparse.Namespace, setting: Setting) -> list[str]:
    """How it was measured."""
    tiling, side = setting.tiling, setting.side
    grid = Grid.of(tiling, args.side, args.side)
    ours = grid.rows.windows * grid.columns.windows
    theirs = len(starts(args.side, side, tiling.stride)) ** 2
    return [
        f"UNet-{args.base}, {args.side} x {args.side} pixels of {len(BANDS)} bands,"
        f" {setting.device.type}, {torch.get_num_threads()} threads, {args.rounds} rounds, medians",
        f"the network sees {side} x {side} pixels every {tiling.stride}, {setting.batch} windows at a"
        f" time: {ours} windows in ours, whose scene is mirrored at its edges, and {theirs} in the"
        " plain script, whose last windows end with the scene",
        "`agrivision predict` also makes a style, a picture, a STAC item and a page; each of ours"
        " writes a COG with overviews, can be resumed, and checks what it wrote",
        "CPU s: seconds of computing a megapixel, of all threads and processes",
        "MiB: of the process at most, with torch in it; without the peers' loader processes, of which"
        f" there are {setting.workers}",
        "as ours: pixels of the same class as in ours, which fades windows into one another; the plain"
        " scripts and raster-vision weight all windows alike, torchgeo's way takes a pixel from one",
    ]


if __name__ == "__main__":
    main()
