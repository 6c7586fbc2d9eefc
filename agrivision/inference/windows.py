"""A window of a scene with a margin around it: pixels in the network's order, and where they count."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agrivision.data.sources.rasters import attempt, has_data, opened, own_mask
from agrivision.data.sources.source import Flaw, Window
from agrivision.errors import SourceError
from agrivision.inference.trained import Description
from agrivision.model.padding import mirrored

logger = logging.getLogger(__name__)

_PROBE = 256  # pixels: side to which a band is reduced to see whether it is a mask
_GRID = 16  # pixels: margins of a multiple let every window meet the down-sampling in the same phase


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a scene is cut.

    Attributes:
        tile: side of the windows in pixels; they lie side by side.
        margin: pixels that the network sees around each window; what it says of them is not used.
    """

    tile: int
    margin: int

    @classmethod
    def of(cls, description: Description, tile: int | None, margin: int | None) -> Tiling:
        """As asked for; else the tiles of the training with a margin of an eighth.

        An eighth on each side lets the network see a ground half as large again as the map it makes:
        enough to hide the seams, though its field of view reaches further.
        """
        side = description.tile if tile is None else tile
        return cls(tile=side, margin=-(-side // (8 * _GRID)) * _GRID if margin is None else margin)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A raster that fits a network.

    Attributes:
        path: of the file.
        height: in pixels.
        width: in pixels.
        bands: their indexes in the file, from 1, in the order of the network.
        alpha: index of the band that says where the scene is valid, or None.
        nodata: value of each band that holds no data; None where there is no such value.
        empty: value that the network knows as no data; None where there is none.
    """

    path: Path
    height: int
    width: int
    bands: tuple[int, ...]
    alpha: int | None
    nodata: tuple[float | None, ...]
    empty: float | None


def look(path: Path, description: Description) -> Scene:
    """Open a raster and check that it fits a network.

    Raises:
        SourceError: it cannot be read, or has other bands or another type of pixels.
    """
    try:
        with opened(path) as dataset:
            alpha = attempt(path, lambda: _alpha(dataset, len(description.bands)))
            indexes = [index for index in dataset.indexes if index != alpha]
            _check(path, dataset, indexes, description)
            bands = _in_order(path, [dataset.descriptions[i - 1] for i in indexes], description.bands)
            chosen = tuple(indexes[band] for band in bands)
            nodata = tuple(dataset.nodatavals[index - 1] for index in chosen)
            if all(value is None for value in nodata):
                nodata = (description.nodata,) * len(chosen)
            return Scene(
                path=path,
                height=dataset.height,
                width=dataset.width,
                bands=chosen,
                alpha=alpha,
                nodata=nodata,
                empty=description.nodata,
            )
    except Flaw as flaw:
        raise unreadable(flaw) from None


def unreadable(flaw: Flaw) -> SourceError:
    """The same as an error: here no tile is left out, the prediction ends."""
    return SourceError(str(flaw))


def _alpha(dataset: Any, bands: int) -> int | None:
    """Index of a band that is a mask, in a file with one band more than the network takes.

    GDAL calls the fourth band of 8-bit images alpha when nobody says otherwise, so a band is taken as
    a mask only if it knows no shades.
    """
    tagged = [i for i, colour in enumerate(dataset.colorinterp, 1) if colour.name == "alpha"]
    if dataset.count != bands + 1 or len(tagged) != 1:
        return None
    shape = (min(dataset.height, _PROBE), min(dataset.width, _PROBE))
    values = dataset.read(tagged[0], out_shape=shape)
    full = np.iinfo(values.dtype).max if np.issubdtype(values.dtype, np.integer) else 1
    return int(tagged[0]) if np.isin(values, (0, 1, full)).all() else None


def _check(path: Path, dataset: Any, indexes: Sequence[int], description: Description) -> None:
    types = ", ".join(dict.fromkeys(dataset.dtypes[index - 1] for index in indexes))
    if len(indexes) != len(description.bands) or types != description.dtype:
        raise SourceError(
            f"{path} has {len(indexes)} bands of {types}; the run was trained on"
            f" {len(description.bands)} of {description.dtype} ({', '.join(description.bands)})"
        )


def _in_order(path: Path, names: Sequence[str | None], wanted: Sequence[str]) -> list[int]:
    """Which of the file's bands is each of the network's: by name where all have one, else by place."""
    lower = [name.strip().lower() for name in names if name]
    targets = [name.lower() for name in wanted]
    by_place = list(range(len(wanted)))
    if len(lower) < len(names) or lower == targets:
        return by_place
    if sorted(lower) != sorted(targets) or len(set(targets)) < len(targets):
        logger.warning(
            "%s: its bands are called %s, those of the training %s: taken in the order of the file",
            path,
            ", ".join(map(str, names)),
            ", ".join(wanted),
        )
        return by_place
    logger.info("%s: bands %s are put into the order %s", path, ", ".join(lower), ", ".join(targets))
    return [lower.index(name) for name in targets]


def read_window(
    dataset: Any, scene: Scene, window: Window, margin: int
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Read a window and what is around it; beyond the scene's edges its pixels are mirrored.

    Args:
        dataset: the scene, open.
        scene: what is known of it.
        window: begins inside of the scene and may reach beyond its edge.
        margin: pixels around the window.

    Returns:
        Pixels (bands, height + 2 margin, width + 2 margin) of the scene's type, and where the part of
        the window that lies in the scene has data, bool (rows, columns).

    Raises:
        Flaw: the file cannot be read there.
    """
    x1, y1, x2, y2 = window
    rows = mirrored(scene.height, margin - y1, y2 - y1 + 2 * margin).numpy()
    columns = mirrored(scene.width, margin - x1, x2 - x1 + 2 * margin).numpy()
    inside = (
        (int(rows.min()), int(rows.max()) + 1),
        (int(columns.min()), int(columns.max()) + 1),
    )
    pixels, valid = _read(dataset, scene, inside, window)
    (top, _), (left, _) = inside
    own = valid[y1 - top : min(y2, scene.height) - top, x1 - left : min(x2, scene.width) - left]
    whole: NDArray[Any] = pixels[:, rows[:, None] - top, columns - left]
    return whole, own


def _read(
    dataset: Any, scene: Scene, inside: tuple[tuple[int, int], tuple[int, int]], window: Window
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Pixels in the network's order, empty ones as it knows them, and where there is data."""
    pixels: NDArray[Any] = attempt(
        scene.path, lambda: dataset.read(list(scene.bands), window=inside), window
    )
    valid = attempt(scene.path, lambda: own_mask(dataset, inside), window)
    if scene.alpha is not None:
        alpha = attempt(scene.path, lambda: dataset.read(scene.alpha, window=inside), window)
        valid = valid & np.greater(alpha, 0)
    valid = valid & has_data(pixels, scene.nodata)
    if scene.empty is not None:
        pixels[:, ~valid] = scene.empty
    elif np.issubdtype(pixels.dtype, np.floating):
        pixels[:, ~valid] = np.nan  # to the network the mean; -9999 would outshine the neighbours
    return pixels, valid
