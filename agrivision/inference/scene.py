"""What a raster is to a network: which bands, in which units, on which grid."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agrivision.data.indices import places, ratio
from agrivision.data.sources.ground import pixel_size
from agrivision.data.sources.rasters import attempt, has_data, opened
from agrivision.data.sources.source import Flaw
from agrivision.errors import BadInput, SourceError
from agrivision.inference.trained import ChannelStatistics, Description

logger = logging.getLogger(__name__)

RANGE, STATISTICS = "range", "statistics"
_PROBE = 256  # pixels: side to which a band is reduced to see whether it is a mask
_SAMPLE = 1024  # pixels: side to which a scene is thinned out for its statistics
_ALIKE = 1.25  # a ground resolution is the training's where they differ by a smaller factor
_FINEST = 64  # times finer than they are, scenes may be resampled: more is a slip of the units
_COARSEST = 512  # times coarser
_WHOLE = (1, 255, 32_767, 65_535)  # what an alpha band holds where it hides nothing, besides the most
_MOSTLY = 0.9  # of the pixels that an alpha band shows it shows wholly; the rest may be a soft edge


@dataclass(frozen=True, kw_only=True)
class Taking:
    """How scenes are taken that are not like the tiles of the training.

    Attributes:
        bands: for each band of the network where it is in the file: an index from 1, the name of a
            band, or `-` for one that is missing; empty: found by names, by colours, else by place.
        scale: None takes pixels of the training's type only; a factor; `range`: the whole range of one
            type of integers becomes that of the other; `statistics`: each band gets the mean and
            deviation that it has in the data set.
        fill_missing: whether a band that is not there is taken as even, at the data set's mean.
        resolution: metres a pixel that scenes are resampled to; None takes them as they are.
    """

    bands: tuple[str, ...] = ()
    scale: str | None = None
    fill_missing: bool = False
    resolution: float | None = None

    def __post_init__(self) -> None:
        if self.scale not in (None, RANGE, STATISTICS):
            try:
                factor = float(str(self.scale))
            except ValueError:
                factor = 0.0
            if not (math.isfinite(factor) and factor > 0):
                raise BadInput(
                    f"scale is {self.scale!r}: it must be a factor, {RANGE!r} or {STATISTICS!r}"
                )
        if self.resolution is not None and not (math.isfinite(self.resolution) and self.resolution > 0):
            raise BadInput(f"resolution is {self.resolution}: it must be metres a pixel")


@dataclass(frozen=True, kw_only=True)
class Resampled:
    """The grid that a scene is resampled to.

    Attributes:
        transform: from pixel to ground, as in `Coordinates`.
        height: in pixels.
        width: in pixels.
    """

    transform: tuple[float, float, float, float, float, float]
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A raster that fits a network.

    Attributes:
        path: of the file.
        height: in pixels, of the grid on which it is predicted.
        width: in pixels.
        bands: their indexes in the file, from 1, in the order of the network; None: missing.
        alpha: index of the band that says where the scene is valid, or None.
        nodata: value of each band that is there that holds no data; None where there is no such value.
        empty: value that the network knows as no data; None where there is none.
        gain: factor of each band of the network; None where pixels are taken as they are.
        offset: added to each band after that.
        resampled: the grid, where it is not the file's.
        resolution: metres a pixel, width and height; None where not known.
        statistics: means and deviations of the channels over the scene, for a network that sees pixels
            relative to their field; measured on about a million pixels that lie evenly over the scene.
    """

    path: Path
    height: int
    width: int
    bands: tuple[int | None, ...]
    alpha: int | None
    nodata: tuple[float | None, ...]
    empty: float | None
    gain: tuple[float, ...] | None = None
    offset: tuple[float, ...] | None = None
    resampled: Resampled | None = None
    resolution: tuple[float, float] | None = None
    statistics: ChannelStatistics | None = None

    def scaled(self, found: NDArray[Any]) -> NDArray[Any]:
        """Bands of the network from those that are there, in the units of the training.

        Args:
            found: (bands that are there, height, width).

        Returns:
            (bands, height, width): `found` itself, or float32 where a band is missing or scaled.
        """
        if self.gain is None or self.offset is None:
            return found
        whole = np.empty((len(self.bands), *found.shape[1:]), np.float32)
        bands = iter(found)
        for number, band in enumerate(self.bands):
            if band is None:
                whole[number] = self.offset[number]
            else:
                np.multiply(next(bands), self.gain[number], out=whole[number], casting="unsafe")
                whole[number] += self.offset[number]
        return whole


def look(path: Path, description: Description, taking: Taking = Taking()) -> Scene:
    """Open a raster and check that it fits a network.

    Raises:
        SourceError: it cannot be read, or has other bands or another type of pixels and nobody said
            how to take them.
    """
    try:
        with opened(path) as dataset:
            alpha = attempt(path, lambda: _alpha(dataset))
            bands = _bands(path, dataset, alpha, description, taking)
            there = [band for band in bands if band is not None]
            nodata = tuple(dataset.nodatavals[index - 1] for index in there)
            if all(value is None for value in nodata) and taking.scale is None:
                nodata = (description.nodata,) * len(there)
            size = pixel_size(dataset)
            grid = _grid(path, dataset, size, taking.resolution)
            asked = taking.resolution
            resolution = size if grid is None or asked is None else (asked, asked)
            _compare(path, resolution, description)
            scene = Scene(
                path=path,
                height=dataset.height if grid is None else grid.height,
                width=dataset.width if grid is None else grid.width,
                bands=bands,
                alpha=alpha,
                nodata=nodata,
                empty=description.nodata,
                resampled=grid,
                resolution=resolution,
            )
            scaled = _with_scale(scene, dataset, description, taking)
            return _with_statistics(scaled, dataset, description)
    except Flaw as flaw:
        raise unreadable(flaw) from None


def unreadable(flaw: Flaw) -> SourceError:
    """The same as an error: here no tile is left out, the prediction ends."""
    return SourceError(str(flaw))


def _alpha(dataset: Any) -> int | None:
    """Index of a band that is a mask.

    GDAL calls the fourth band of 8-bit images alpha when nobody says otherwise, so a band is taken as
    a mask only if it knows no shades, but for those of a soft edge.
    """
    tagged = [i for i, colour in enumerate(dataset.colorinterp, 1) if colour.name == "alpha"]
    masks = [index for index in tagged if dataset.count > 1 and _is_mask(dataset, index)]
    return masks[0] if len(masks) == 1 else None


def _is_mask(dataset: Any, index: int) -> bool:
    shape = (min(dataset.height, _PROBE), min(dataset.width, _PROBE))
    values = dataset.read(index, out_shape=shape)
    shown = values[values != 0]
    if not len(shown):
        return True
    most = np.iinfo(values.dtype).max if np.issubdtype(values.dtype, np.integer) else 1
    whole = shown.max()
    return bool(whole in (*_WHOLE, most) and np.mean(shown == whole) >= _MOSTLY)


# Which bands


def _bands(
    path: Path, dataset: Any, alpha: int | None, description: Description, taking: Taking
) -> tuple[int | None, ...]:
    """Where each band of the network is in the file; None for one that is missing."""
    indexes = [index for index in dataset.indexes if index != alpha]
    names = {index: (dataset.descriptions[index - 1] or "").strip().lower() for index in indexes}
    if taking.bands:
        found = _as_told(path, taking.bands, names, description)
    else:
        found = _by_name(path, dataset, names, description)
        found = found or _by_place(path, dataset, names, description)
        _refuse_palette(path, dataset, found)
    missing = [name for name, index in zip(description.bands, found, strict=True) if index is None]
    if missing and (not taking.fill_missing or len(missing) == len(found)):
        raise SourceError(
            f"{path} has {_count(dataset, indexes)}; the run was trained on {_wanted(description)};"
            f" missing: {', '.join(missing)}. --bands says where each band is, and --fill_missing takes"
            " one that is not there as even, at the training's mean, which costs accuracy"
        )
    if missing:
        logger.warning("%s: missing and taken as even: %s", path, ", ".join(missing))
    types = {dataset.dtypes[index - 1] for index in found if index is not None}
    if any("complex" in dtype for dtype in types):
        raise SourceError(f"{path} has complex pixels: make bands of their amplitudes first")
    if len(types) > 1:
        raise SourceError(
            f"{path} has bands of several types ({', '.join(sorted(types))}): give them one first, with"
            " gdal_translate -ot"
        )
    if types != {description.dtype} and taking.scale is None:
        raise SourceError(
            f"{path} has {_count(dataset, indexes)}; the run was trained on {_wanted(description)}:"
            f" --scale says how to take its pixels (a factor, {RANGE} or {STATISTICS})"
        )
    return tuple(found)


def _count(dataset: Any, indexes: Sequence[int]) -> str:
    types = ", ".join(dict.fromkeys(dataset.dtypes[index - 1] for index in indexes))
    return f"{len(indexes)} band{'s' if len(indexes) > 1 else ''} of {types}"


def _wanted(description: Description) -> str:
    bands = description.bands
    return f"{len(bands)} of {description.dtype} ({', '.join(bands)})"


def _as_told(
    path: Path, told: Sequence[str], names: Mapping[int, str], description: Description
) -> list[int | None]:
    if len(told) != len(description.bands):
        raise BadInput(
            f"--bands names {len(told)} bands, and the run was trained on {len(description.bands)}:"
            f" say for each of {', '.join(description.bands)} in this order where it is in the file"
        )
    found: list[int | None] = []
    for word in (each.strip() for each in told):
        matches = [index for index, name in names.items() if word and name == word.lower()]
        if word == "-":
            found.append(None)
        elif word.isdecimal() and int(word) in names:
            found.append(int(word))
        elif len(matches) == 1:
            found.append(matches[0])
        else:
            known = ", ".join(f"{index} {name}".strip() for index, name in names.items())
            how_many = "several bands" if matches else "no band"
            raise SourceError(f"{path} has {how_many} {word!r}: it has {known}")
    return found


def _by_name(
    path: Path, dataset: Any, names: Mapping[int, str], description: Description
) -> list[int | None]:
    """By the names and colours of the file's bands, where they say anything of the network's.

    The rest are taken in the order of the file where as many are left on either side: the fourth band
    beside red, green and blue, say.
    """
    wanted = [name.lower() for name in description.bands]
    colours = _telling_colours(dataset, names, wanted)
    known = {index: name if name in wanted else colours.get(index, "") for index, name in names.items()}
    places = {name: [i for i, label in known.items() if label == name] for name in wanted}
    if not any(places.values()) or len(places) < len(wanted):
        return []
    others = [index for index, label in known.items() if not label]
    missing = [name for name in wanted if not places[name]]
    unclear = [name for name in wanted if len(places[name]) > 1]
    if missing and others and len(others) != len(missing):
        unclear += missing
    if unclear:
        raise SourceError(
            f"{path} has {_count(dataset, list(names))}; the run was trained on {_wanted(description)}:"
            f" which of them is {' or '.join(unclear)}, nobody knows; --bands 1,2,… says for each of"
            f" {', '.join(description.bands)} where it is"
        )
    rest = iter(others)
    found = [places[name][0] if places[name] else next(rest, None) for name in wanted]
    called = ", ".join(known[index] or names[index] or "?" for index in names)
    if missing and others and (len(missing) > 1 or names[others[0]]):
        guessed = ", ".join(missing)
        logger.warning("%s has bands %s: order of the file taken for %s", path, called, guessed)
    elif [index for index in found if index is not None] != list(names):
        logger.info("%s: bands %s are put into the order %s", path, called, ", ".join(wanted))
    return found


def _telling_colours(dataset: Any, names: Mapping[int, str], wanted: Sequence[str]) -> dict[int, str]:
    """Colours by band, where they can be believed.

    Three bands are called red, green and blue when nobody says otherwise, in false colours, too: that
    counts only where the network wants all three.
    """
    colours = {index: dataset.colorinterp[index - 1].name for index in names}
    three = {"red", "green", "blue"}
    natural = three <= set(colours.values()) and three <= set(wanted)
    if not natural and not set(wanted) <= set(colours.values()):
        return {}
    return {index: colour for index, colour in colours.items() if colour in wanted}


def _refuse_palette(path: Path, dataset: Any, found: Sequence[int | None]) -> None:
    if any(dataset.colorinterp[index - 1].name == "palette" for index in found if index is not None):
        raise SourceError(
            f"{path} holds numbers of colours in a palette, not shades: make bands of it first, with"
            " gdal_translate -expand rgb, or name it in --bands"
        )


def _by_place(
    path: Path, dataset: Any, names: Mapping[int, str], description: Description
) -> list[int | None]:
    indexes, wanted = list(names), [name.lower() for name in description.bands]
    if len(indexes) > len(wanted):
        raise SourceError(
            f"{path} has {_count(dataset, indexes)}; the run was trained on {_wanted(description)}:"
            f" --bands 1,2,… says for each of {', '.join(description.bands)} where it is"
        )
    given = [name for name in names.values() if name]
    if len(indexes) == len(wanted) and len(given) == len(indexes) and given != list(wanted):
        logger.warning(
            "%s: its bands are called %s, those of the training %s: taken in the order of the file",
            path,
            ", ".join(dataset.descriptions[index - 1] for index in indexes),
            ", ".join(description.bands),
        )
    return [*indexes, *[None] * (len(wanted) - len(indexes))]


# On which grid


def _grid(
    path: Path, dataset: Any, size: tuple[float, float] | None, resolution: float | None
) -> Resampled | None:
    if resolution is None:
        return None
    if size is None:
        raise SourceError(
            f"{path} cannot be resampled to {resolution} m: nothing says how large its pixels are (no"
            " coordinate system, or control points only)"
        )
    width = max(1, round(dataset.width * size[0] / resolution))
    height = max(1, round(dataset.height * size[1] / resolution))
    if (height, width) == (dataset.height, dataset.width):
        return None
    finer = max(width / dataset.width, height / dataset.height)
    coarser = max(dataset.width / width, dataset.height / height)
    if finer > _FINEST or coarser > _COARSEST:
        raise SourceError(
            f"{path} has pixels of {size[0]:.3g} x {size[1]:.3g} m: at {resolution} m it would have"
            f" {width} x {height} pixels; --resolution is in metres a pixel"
        )
    a, b, c, d, e, f = tuple(dataset.transform)[:6]
    across, down = dataset.width / width, dataset.height / height
    return Resampled(
        transform=(a * across, b * down, c, d * across, e * down, f),
        height=height,
        width=width,
    )


def _compare(path: Path, resolution: tuple[float, float] | None, description: Description) -> None:
    """Warn where the ground is shown larger or smaller than in the training."""
    trained = description.resolution
    if resolution is None or trained is None:
        return
    factor = math.sqrt(resolution[0] * resolution[1]) / trained
    if not 1 / _ALIKE < factor < _ALIKE:
        logger.warning(
            "%s has pixels of %.3g m, the training had %.3g m: what the network knows looks otherwise"
            " here; --resolution %.3g resamples the scene",
            path,
            trained * factor,
            trained,
            trained,
        )


# In which units


def _with_scale(scene: Scene, dataset: Any, description: Description, taking: Taking) -> Scene:
    """The scene with the gain and offset of each band, where its pixels are not taken as they are."""
    bands = len(description.bands)
    if taking.scale is None and None not in scene.bands:
        return scene
    gain, offset = [1.0] * bands, [0.0] * bands
    if taking.scale == RANGE:
        gain = [_range_factor(scene.path, dataset, scene, description)] * bands
    elif taking.scale == STATISTICS:
        gain, offset = _like_training(scene, dataset, description)
    elif taking.scale is not None:
        gain = [float(taking.scale)] * bands
    for number, band in enumerate(scene.bands):
        if band is None:
            offset[number] = description.data_mean[number]
    return replace(scene, gain=tuple(gain), offset=tuple(offset))


def _range_factor(path: Path, dataset: Any, scene: Scene, description: Description) -> float:
    (own,) = {dataset.dtypes[band - 1] for band in scene.bands if band is not None}
    try:
        return float(np.iinfo(description.dtype).max / np.iinfo(own).max)
    except ValueError:
        raise SourceError(
            f"{path}: --scale {RANGE} is for integers, and this is {own} where the training had"
            f" {description.dtype}: give a factor, or {STATISTICS}"
        ) from None


def _like_training(
    scene: Scene, dataset: Any, description: Description
) -> tuple[list[float], list[float]]:
    """Gain and offset that give each band the mean and deviation of the training.

    Measured on about a million pixels that lie evenly over the scene.
    """
    gain, offset = [], []
    found, valid = _sample(scene, dataset)
    if not valid.any():
        return [1.0] * len(scene.bands), [0.0] * len(scene.bands)
    bands = iter(found)
    for number, band in enumerate(scene.bands):
        mean, std = description.data_mean[number], description.data_std[number]
        if band is None:
            gain.append(1.0)
            offset.append(mean)
            continue
        values = next(bands)[valid].astype(np.float64)
        factor = std / float(values.std() or 1.0)
        gain.append(factor)
        offset.append(mean - factor * float(values.mean()))
    return gain, offset


def _sample(scene: Scene, dataset: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """A million pixels that lie evenly: (bands that are there, rows, columns), and where data is."""
    shape = (min(dataset.height, _SAMPLE), min(dataset.width, _SAMPLE))
    there = [band for band in scene.bands if band is not None]
    found = attempt(scene.path, lambda: dataset.read(there, out_shape=(len(there), *shape)))
    valid = has_data(found, scene.nodata)
    if scene.alpha is not None:
        valid &= attempt(scene.path, lambda: dataset.read(scene.alpha, out_shape=shape)) > 0
    elif "per_dataset" in {flag.name for flag in dataset.mask_flag_enums[0]}:
        valid &= attempt(scene.path, lambda: dataset.read_masks(1, out_shape=shape)) > 0
    return found, valid


# What light it was taken in


def _with_statistics(scene: Scene, dataset: Any, description: Description) -> Scene:
    if description.scope != "field":
        return scene
    found, valid = _sample(scene, dataset)
    return replace(scene, statistics=statistics_of(scene.scaled(found), valid, description))


def statistics_of(
    image: NDArray[Any], valid: NDArray[np.bool_], description: Description
) -> ChannelStatistics:
    """Means and deviations of a network's channels over the valid pixels of an image.

    Args:
        image: (bands, height, width), pixels as in the data set.
        valid: (height, width).
        description: of the network.
    """
    bands = image[:, valid & np.isfinite(image).all(0)].astype(np.float64)
    pairs = places(description.indices, description.bands)
    channels = [*bands, *(ratio(bands[first], bands[second]) for first, second in pairs)]
    if not bands.size:
        return (0.0,) * len(channels), (0.0,) * len(channels)
    return tuple(float(c.mean()) for c in channels), tuple(float(c.std()) for c in channels)
