"""Looking through scenes and label rasters before they are cut: do they fit, and what do they hold?"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agrivision.data.labels import MAX_CLASSES
from agrivision.data.schema import DTYPES
from agrivision.data.sources.ground import pixel_size
from agrivision.data.sources.pairs import Pair, find_pairs
from agrivision.data.sources.rasters import (
    RasterReader,
    attempt,
    nodata_of,
    opened,
    part_of,
    read_labels,
    windows,
)
from agrivision.data.sources.source import Flaw, Problem, Reference, Source
from agrivision.data.tile import window_key
from agrivision.errors import SourceError

_USUAL_BANDS = {3: ("red", "green", "blue"), 4: ("red", "green", "blue", "nir")}
_MOST_VALUE = 2**53  # of a label raster: whole numbers that a float holds exactly
_SHIFT = 0.01  # pixels that the corners of a label raster may be off: rounded coordinates


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What looking at a pair tells.

    Attributes:
        pair: the files.
        height: in pixels.
        width: in pixels.
        count: bands, alpha included.
        dtype: numpy name.
        descriptions: of the bands; empty where one has none.
        alpha: index of a band that is a mask, or None.
        nodata: finite value of pixels without data, the same in all bands; None if there is none.
        size: metres on the ground, width and height of a pixel; None where not known.
        values: pixels by value in the label raster, where it counts.
    """

    pair: Pair
    height: int
    width: int
    count: int
    dtype: str
    descriptions: tuple[str, ...]
    alpha: int | None
    nodata: float | None
    size: tuple[float, float] | None
    values: Counter[float]


def parse_classes(text: str) -> tuple[tuple[int, str], ...]:
    """Read `0:vegetation,1:water`: the value in the label rasters and the name, in order of the ids.

    Raises:
        SourceError: it is written in another way, or a value or name stands twice.
    """
    try:
        pairs = [entry.split(":", 1) for entry in text.split(",")]
        classes = tuple((int(value), name.strip()) for value, name in pairs)
    except ValueError:
        raise SourceError(f"classes {text!r}: write them as 0:vegetation,1:water") from None
    names = {name for _, name in classes} - {"", "valid"}
    if len(names) < len(classes) or len(dict(classes)) < len(classes) or not text.isprintable():
        raise SourceError(f"classes {text!r}: each needs a value and a plain name of its own")
    return classes


def open_rasters(
    path: Path,
    *,
    tile: int,
    stride: int,
    classes: Sequence[tuple[int, str]] | None,
    bands: Sequence[str] | None,
    ignore: int | None,
    allow_vrt: bool = False,
) -> Source | None:
    """Look through scenes and labels.

    Args:
        path: see `find_pairs`.
        tile: side of the tiles in pixels.
        stride: from one tile to the next.
        classes: value and name by class id; None finds the values in the label rasters.
        bands: names of the bands; None takes the descriptions in the files, or the usual ones.
        ignore: value in the label rasters that does not count.
        allow_vrt: take VRTs whose sources are plain files.

    Returns:
        What is there, or None if this is another kind of source.

    Raises:
        SourceError: the scenes do not go together, or the classes cannot be told.
    """
    found = find_pairs(path, allow_vrt=allow_vrt)
    if found is None:
        return None
    pairs, problems = found
    scenes = []
    for pair in pairs:
        try:
            scenes.append(_look(pair, ignore, named=bands is not None))
        except Flaw as flaw:
            problems.append(flaw.problem)
    if not scenes:
        first = f": {problems[0]}" if problems else ""
        raise SourceError(f"no scene with labels in {path}{first}")
    alpha = _check_alike(scenes, bands)
    chosen = list(classes) if classes is not None else _classes(scenes)
    problems += _unknown_values(scenes, {value for value, _ in chosen}, ignore)
    reader = RasterReader(
        pairs=tuple(scene.pair for scene in scenes),
        tile=tile,
        bands=tuple(index for index in range(1, scenes[0].count + 1) if index != alpha),
        alpha=alpha,
        values=tuple(value for value, _ in chosen),
        ignore=ignore,
    )
    names = _names(scenes, bands, alpha)
    stems = {scene.pair.scene.stem: scene.pair.name for scene in scenes}
    nodatas = {scene.nodata for scene in scenes}
    sizes = [math.sqrt(scene.size[0] * scene.size[1]) for scene in scenes if scene.size is not None]
    return Source(
        kind="rasters",
        bands=names,
        dtype=scenes[0].dtype,
        tile=tile,
        parts=part_of(names),
        classes=tuple(name for _, name in chosen),
        class_values=reader.values,
        splits=_references(scenes, tile, stride),
        nodata=nodatas.pop() if len(nodatas) == 1 else None,
        resolution=statistics.median(sizes) if sizes else None,
        aliases=stems | {scene.pair.scene.name: scene.pair.name for scene in scenes},
        reader=reader,
        problems=problems,
    )


def _references(scenes: list[Scene], tile: int, stride: int) -> dict[str, list[Reference]]:
    splits: dict[str, list[Reference]] = {}
    for group, scene in enumerate(scenes):
        name = scene.pair.name
        splits.setdefault(scene.pair.split, []).extend(
            Reference(window_key(name, window), name, group, window)
            for window in windows(scene.height, scene.width, tile, stride)
        )
    return splits


def _look(pair: Pair, ignore: int | None, *, named: bool) -> Scene:
    with opened(pair.scene) as scene, opened(pair.label) as label:
        if len(set(scene.dtypes)) > 1 or scene.dtypes[0] not in DTYPES:
            types = ", ".join(dict.fromkeys(scene.dtypes))
            raise SourceError(f"{pair.scene} holds {types}: one of {', '.join(DTYPES)} is needed")
        _check_grids(pair, scene, label)
        return Scene(
            pair=pair,
            height=scene.height,
            width=scene.width,
            count=scene.count,
            dtype=scene.dtypes[0],
            descriptions=tuple(scene.descriptions) if all(scene.descriptions) else (),
            alpha=None if named else attempt(pair.scene, lambda: _alpha(scene)),
            nodata=_nodata(scene),
            size=pixel_size(scene),
            values=attempt(pair.label, lambda: _values(pair.label, label, ignore)),
        )


def _check_grids(pair: Pair, scene: Any, label: Any) -> None:
    """Refuse labels that lie elsewhere; labels without any coordinates are taken as they are."""
    if label.count != 1:
        raise Flaw(pair.label, "labels", f"has {label.count} bands where one belongs")
    if (scene.width, scene.height) != (label.width, label.height):
        what = (
            f"{label.width} x {label.height} pixels, but its scene has {scene.width} x {scene.height}"
        )
        raise Flaw(pair.label, "wrong size", f"{what}")
    if any(dataset.crs is None and dataset.transform.is_identity for dataset in (scene, label)):
        return
    if scene.crs != label.crs and scene.crs and label.crs:
        raise Flaw(pair.label, "coordinates", "in another coordinate system than its scene")
    width, height = scene.width, scene.height
    for corner in ((0, 0), (width, 0), (0, height)):
        x, y = _apply(~scene.transform, *_apply(label.transform, *corner))
        if not max(abs(x - corner[0]), abs(y - corner[1])) <= _SHIFT:  # nor where they are no numbers
            raise Flaw(pair.label, "coordinates", "not on the grid of its scene")


def _apply(transform: Any, x: float, y: float) -> tuple[float, float]:
    """An affine map of a point; affine writes it `*` or `@`, depending on its version."""
    a, b, c, d, e, f = tuple(transform)[:6]
    return a * x + b * y + c, d * x + e * y + f


def _alpha(scene: Any) -> int | None:
    """Index of the band that is a mask.

    GDAL calls the fourth band of 8-bit images alpha when nobody says otherwise, so near-infrared
    often bears that name. A band is taken as a mask only if it knows no shades.
    """
    tagged = [i for i, colour in enumerate(scene.colorinterp, 1) if colour.name == "alpha"]
    if len(tagged) != 1 or scene.count == 1:
        return None
    dtype = np.dtype(scene.dtypes[0])
    full = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    for _, window in scene.block_windows(tagged[0]):
        values = scene.read(tagged[0], window=window)
        if not np.isin(values, (0, 1, full)).all():
            return None
    return int(tagged[0])


def _nodata(scene: Any) -> float | None:
    """The scene's nodata value; pixels that are not finite hold no data whatever it is."""
    value = nodata_of(scene)
    alike = len({str(other) for other in scene.nodatavals}) == 1
    return value if alike and value is not None and math.isfinite(value) else None


def _values(path: Path, label: Any, ignore: int | None) -> Counter[float]:
    """Pixels by value, block by block."""
    counts: Counter[float] = Counter()
    for _, window in label.block_windows(1):
        values, valid = read_labels(label, window.toranges(), ignore)
        found, pixels = np.unique(values[valid], return_counts=True)
        counts.update(dict(zip(found.tolist(), pixels.tolist(), strict=True)))
        if len(counts) > 1 << 16:
            raise Flaw(path, "labels", "holds more than 65,536 different values")
    if any(not float(value).is_integer() or abs(value) > _MOST_VALUE for value in counts):
        raise Flaw(path, "labels", "holds values that are not whole numbers")
    return counts


def _check_alike(scenes: list[Scene], bands: Sequence[str] | None) -> int | None:
    """Check that all scenes have the same bands; returns the index of the alpha band, if any."""
    first = scenes[0]
    for scene in scenes:
        if (scene.count, scene.dtype) != (first.count, first.dtype):
            raise SourceError(
                f"{scene.pair.scene} has {scene.count} bands of {scene.dtype}, but {first.pair.scene}"
                f" {first.count} of {first.dtype}: prepare them apart"
            )
    if bands is not None and (len(bands) != first.count or len(set(bands)) != len(bands)):
        raise SourceError(f"{first.count} different band names are needed, not {', '.join(bands)}")
    alphas = {scene.alpha for scene in scenes}
    return first.alpha if len(alphas) == 1 else None


def _names(scenes: list[Scene], bands: Sequence[str] | None, alpha: int | None) -> tuple[str, ...]:
    if bands is not None:
        return tuple(bands)
    described = {scene.descriptions for scene in scenes}
    names = next(iter(described)) if len(described) == 1 else ()
    if names and len(set(names)) == len(names) and all(map(str.isprintable, names)):
        return tuple(name for index, name in enumerate(names, 1) if index != alpha)
    count = scenes[0].count - (alpha is not None)
    return _USUAL_BANDS.get(count, tuple(f"band_{index}" for index in range(1, count + 1)))


def _classes(scenes: list[Scene]) -> list[tuple[int, str]]:
    values = sorted({int(value) for scene in scenes for value in scene.values})
    if not 1 <= len(values) <= MAX_CLASSES:
        shown = ", ".join(map(str, values[:MAX_CLASSES]))
        raise SourceError(
            f"the label rasters hold {len(values)} different values ({shown or 'nothing that counts'}"
            f"{', …' if len(values) > MAX_CLASSES else ''}), but 1 to {MAX_CLASSES} classes are"
            " possible: name those you want with --classes 0:vegetation,1:water"
        )
    return [(value, f"class_{value}") for value in values]


def _unknown_values(scenes: list[Scene], known: set[int], ignore: int | None) -> list[Problem]:
    """A problem for each value that is no class, as many as there can be classes; one for the rest."""
    unknown = sorted({int(value) for scene in scenes for value in scene.values} - known)
    problems = []
    for value in unknown[:MAX_CLASSES]:
        holders = [scene for scene in scenes if scene.values[value]]
        pixels = sum(scene.values[value] for scene in holders)
        share = "all" if len(holders) == len(scenes) else f"{len(holders)} of"
        otherwise = f", or --ignore {value}" if ignore is None else ""
        what = (
            f"{value} is in {share} {len(scenes)} label rasters, and no class ({pixels} pixels, not"
            f" valid): add {value}:NAME to --classes{otherwise}"
        )
        problems.append(Problem(str(holders[0].pair.label), "unknown value", what))
    if len(unknown) > MAX_CLASSES:
        what = f"{len(unknown) - MAX_CLASSES} further values in the label rasters are no classes either"
        problems.append(Problem(str(scenes[0].pair.label), "unknown value", what))
    return problems
