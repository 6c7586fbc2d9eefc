"""Scenes → class-id GeoTIFFs on the same grid, window by window, and a picture of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from agrivision.data.parts import geodata
from agrivision.data.sources.rasters import opened, windows
from agrivision.data.sources.source import Flaw, Window
from agrivision.errors import SourceError, StorageError
from agrivision.inference.ahead import one_ahead
from agrivision.inference.quicklook import write_quicklook
from agrivision.inference.trained import TrainedModel
from agrivision.inference.windows import Scene, Tiling, read_window, unreadable
from agrivision.model.precision import Precision
from agrivision.monitor.pictures import PALETTE
from agrivision.storage import storage_error, sync_folder

NODATA = 255
_BLOCK = 512  # pixels


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """A window as it was read.

    Attributes:
        window: in pixels of the scene; it may reach beyond the edge.
        pixels: (bands, height, width), margin included.
        valid: bool, of the part of the window that lies in the scene.
    """

    window: Window
    pixels: NDArray[Any]
    valid: NDArray[np.bool_]

    @property
    def slices(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of that part in the scene, ends excluded."""
        x, y = self.window[:2]
        rows, columns = self.valid.shape
        return (y, y + rows), (x, x + columns)


def count_windows(scene: Scene, tiling: Tiling) -> int:
    """How many windows a scene has."""
    return -(-scene.height // tiling.tile) * -(-scene.width // tiling.tile)


def outputs(path: Path, out: Path) -> tuple[Path, Path]:
    """The map and the picture that a scene's prediction writes."""
    return out / f"{path.stem}.tif", out / f"{path.stem}.png"


def check_outputs(paths: Sequence[Path], out: Path) -> None:
    """Check that every scene has a map of its own and that none takes the place of a scene.

    Raises:
        SourceError: two scenes have the same stem, or `out` is where the scenes are.
    """
    inputs = {path.resolve() for path in paths}
    seen: dict[str, Path] = {}
    for path in paths:
        if path.stem in seen:
            raise SourceError(
                f"{seen[path.stem]} and {path} would both become {out / path.stem}.tif: rename one, or"
                " predict them into different folders"
            )
        seen[path.stem] = path
        for target in outputs(path, out):
            if target.resolve() in inputs:
                raise SourceError(
                    f"the prediction of {path} would overwrite {target}: choose another --out"
                )


def predict_scene(
    trained: TrainedModel,
    scene: Scene,
    out: Path,
    tiling: Tiling,
    *,
    batch_size: int,
    threads: int,
    precision: Precision,
    report: Callable[[int], None],
) -> Path:
    """Write the map of a scene and a picture of both; memory does not grow with the scene.

    Args:
        trained: the network.
        scene: as `look` found it.
        out: folder, which exists; it gets `STEM.tif` and `STEM.png`.
        tiling: how the scene is cut.
        batch_size: windows in one forward pass.
        threads: with any, one reads the next batch while the network computes.
        precision: of the forward pass.
        report: called with the number of windows finished since the last call.

    Returns:
        The map: one band of uint8 class ids, 255 where the scene has no data, with the scene's size,
        coordinate system and transform, a colour table, and tags with the names of the classes.

    Raises:
        SourceError: the scene cannot be read.
        StorageError, NotWritable: the disk refused.
    """
    target, picture = outputs(scene.path, out)
    beside = target.with_name(f".{target.stem}.{os.getpid()}.part.tif")
    try:
        _check_writable(beside)
        with opened(scene.path) as dataset:
            cuts = _read_cuts(dataset, scene, tiling, batch_size)
            with closing(one_ahead(cuts) if threads else cuts) as batches:
                digests = _write_map(
                    beside,
                    dataset,
                    trained,
                    batches,
                    tiling=tiling,
                    precision=precision,
                    report=report,
                )
            _check_written(beside, target, digests)
            sync_folder(beside)
            beside.replace(target)
            sync_folder(out)
            with opened(target) as finished:
                write_quicklook(picture, dataset, scene, finished, trained.description)
    except Flaw as flaw:
        raise unreadable(flaw) from None
    except geodata().errors.RasterioError as error:  # reading gives a Flaw: this is from writing
        reason = " ".join(str(error.__cause__ or error).split())
        raise StorageError(f"cannot write {target}: {reason}") from None
    except OSError as error:
        raise storage_error(target, error) from error
    finally:
        beside.unlink(missing_ok=True)
    return target


def _check_writable(beside: Path) -> None:
    """Let the system say why a file cannot be made: GDAL would not say it as clearly."""
    beside.touch()
    beside.unlink()


def _read_cuts(
    dataset: Any, scene: Scene, tiling: Tiling, batch_size: int
) -> Generator[list[_Cut], None, None]:
    whole = windows(scene.height, scene.width, tiling.tile, tiling.tile)
    for start in range(0, len(whole), batch_size):
        cuts = []
        for window in whole[start : start + batch_size]:
            pixels, valid = read_window(dataset, scene, window, tiling.margin)
            cuts.append(_Cut(window=window, pixels=pixels, valid=valid))
        yield cuts


_Digests = list[tuple[tuple[tuple[int, int], tuple[int, int]], int]]


def _write_map(
    path: Path,
    dataset: Any,
    trained: TrainedModel,
    batches: Generator[list[_Cut], None, None],
    *,
    tiling: Tiling,
    precision: Precision,
    report: Callable[[int], None],
) -> _Digests:
    """Write the map; returns the checksum of every window."""
    digests: _Digests = []
    with geodata().open(path, "w", **_profile(dataset)) as map_:
        _describe(map_, dataset, trained)
        for cuts in batches:
            for cut, ids in zip(cuts, _predict(trained, cuts, tiling, precision), strict=True):
                map_.write(ids, 1, window=cut.slices)
                digests.append((cut.slices, xxhash.xxh3_64_intdigest(ids.data)))
            report(len(cuts))
    return digests


def _profile(dataset: Any) -> dict[str, Any]:
    placed = not dataset.transform.is_identity
    return {
        "driver": "GTiff",
        "height": dataset.height,
        "width": dataset.width,
        "count": 1,
        "dtype": "uint8",
        "nodata": NODATA,
        "crs": dataset.crs,
        "transform": dataset.transform if placed else None,
        "tiled": True,
        "blockxsize": _BLOCK,
        "blockysize": _BLOCK,
        "compress": "deflate",
        "bigtiff": "IF_SAFER",
    }


def _describe(map_: Any, dataset: Any, trained: TrainedModel) -> None:
    """Coordinates by ground control points, colours and tags: all before the first pixel."""
    points, crs = dataset.gcps
    if points:
        map_.gcps = (points, crs)
    classes = trained.description.classes
    colours = {class_id: (*PALETTE[class_id], 255) for class_id in range(len(classes))}
    map_.write_colormap(1, colours | {NODATA: (0, 0, 0, 0)})
    names = {f"CLASS_{class_id}": name for class_id, name in enumerate(classes)}
    fingerprint, step = trained.description.data_fingerprint, trained.step
    map_.update_tags(**names, AGRIVISION_DATA=fingerprint, AGRIVISION_STEP=str(step))


def _predict(
    trained: TrainedModel, cuts: Sequence[_Cut], tiling: Tiling, precision: Precision
) -> list[NDArray[np.uint8]]:
    """Class ids of the parts of the windows that lie in the scene; empty windows cost nothing."""
    maps = [np.full(cut.valid.shape, NODATA, np.uint8) for cut in cuts]
    filled = [number for number, cut in enumerate(cuts) if cut.valid.any()]
    if filled:
        images = np.stack([cuts[number].pixels for number in filled])
        centre = slice(tiling.margin, tiling.margin + tiling.tile)
        probabilities = trained.probabilities(images, precision=precision)[..., centre, centre]
        for number, ids in zip(filled, probabilities.argmax(1).cpu().numpy(), strict=True):
            valid = cuts[number].valid
            maps[number][valid] = ids[: valid.shape[0], : valid.shape[1]][valid]
    return maps


def _check_written(path: Path, target: Path, digests: _Digests) -> None:
    """Read the map back: rasterio closes a file in silence when the disk is full.

    Raises:
        StorageError: it is not what was written.
    """
    try:
        with opened(path) as map_:
            whole = all(
                xxhash.xxh3_64_intdigest(map_.read(1, window=slices).data) == digest
                for slices, digest in digests
            )
    except (Flaw, geodata().errors.RasterioError):
        whole = False
    if not whole:
        raise StorageError(f"cannot write {target}: it is not whole; is the disk full?")
