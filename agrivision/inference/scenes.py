"""Scenes → class-id GeoTIFFs on the same grid, window by window, and a picture of each."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from agrivision.data.parts import geodata
from agrivision.data.sources.guard import files_of
from agrivision.data.sources.rasters import opened, windows
from agrivision.data.sources.source import Flaw
from agrivision.errors import Interrupted, SourceError, StorageError
from agrivision.inference.ahead import one_ahead
from agrivision.inference.journal import FOLDER, Journal, fingerprint, remove_leftovers, stamp
from agrivision.inference.quicklook import write_quicklook
from agrivision.inference.trained import TrainedModel
from agrivision.inference.windows import Scene, Tiling, read_window, unreadable
from agrivision.model.precision import Precision
from agrivision.monitor.pictures import PALETTE
from agrivision.part import Stop, never
from agrivision.storage import storage_error, sync_folder, write_atomically

NODATA = 255
SCENES = "scenes"  # folder of what is known of them, in OUT/.predict
_BLOCK = 512  # pixels


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """A window as it was read.

    Attributes:
        pixels: (bands, height, width), margin included.
        valid: bool, of the part of the window that lies in the scene.
    """

    pixels: NDArray[Any]
    valid: NDArray[np.bool_]


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
    stop: Stop = never,
) -> Path:
    """Write the map of a scene and a picture of both; memory does not grow with the scene.

    A map that is there already, of the same scene by the same weights and options, is left as it is.
    An interrupted one goes on with the next batch of windows.

    Args:
        trained: the network.
        scene: as `look` found it.
        out: folder, which exists; it gets `STEM.tif` and `STEM.png`.
        tiling: how the scene is cut.
        batch_size: windows in one forward pass.
        threads: with any, one reads the next batch while the network computes.
        precision: of the forward pass.
        report: called with the number of windows finished since the last call.
        stop: whether to stop before the next batch.

    Returns:
        The map: one band of uint8 class ids, 255 where the scene has no data, with the scene's size,
        coordinate system and transform, a colour table, and tags with the names of the classes.

    Raises:
        Busy: another process predicts the scene into the same folder, and goes on doing so.
        SourceError: the scene cannot be read.
        Interrupted: asked to stop; finished windows are kept.
        StorageError, NotWritable: the disk refused.
    """
    target, picture = outputs(scene.path, out)
    digest = fingerprint(
        trained, batch_size, precision, tiling, scene, *map(stamp, files_of(scene.path))
    )
    note = out / FOLDER / SCENES / f"{target.name}.json"
    if _is_finished(note, digest, (target, picture)):
        report(count_windows(scene, tiling))
        return target
    path = note.with_name(f"{target.name}.windows")
    with Journal(path, digest, f"{scene.path} into {out}", stop) as journal:
        if _is_finished(note, digest, (target, picture)):  # by whoever had the journal before
            report(count_windows(scene, tiling))
            return target
        remove_leftovers(out, (target.stem, picture.name))
        try:
            with opened(scene.path) as dataset:
                cuts = _read_cuts(dataset, scene, tiling, batch_size, skip=journal.count)
                report(min(journal.count * batch_size, count_windows(scene, tiling)))
                with closing(one_ahead(cuts) if threads else cuts) as batches:
                    for batch in batches:
                        if stop():
                            raise Interrupted(
                                "stopped; finished windows are kept, and the same command goes on"
                            )
                        maps = _predict(trained, batch, tiling, precision)
                        journal.append(zlib.compress(b"".join(map(np.ndarray.tobytes, maps)), 1))
                        report(len(batch))
                _write_map(target, dataset, trained, _strips(scene, tiling, batch_size, journal))
                with opened(target) as finished:
                    write_quicklook(picture, dataset, scene, finished, trained.description)
        except Flaw as flaw:
            raise unreadable(flaw) from None
        digests = {file.name: _digest_of(file) for file in (target, picture)}
        write_atomically(note, json.dumps({"digest": digest, "files": digests}).encode())
        journal.remove()
    return target


def _is_finished(note: Path, digest: str, files: Sequence[Path]) -> bool:
    """Whether the files were written under this digest, and are still what was written."""
    try:
        content = json.loads(note.read_bytes())
        digests = {file.name: _digest_of(file) for file in files}
    except (OSError, ValueError):
        return False
    return bool(content == {"digest": digest, "files": digests})


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _check_writable(beside: Path) -> None:
    """Let the system say why a file cannot be made: GDAL would not say it as clearly."""
    beside.touch()
    beside.unlink()


def _read_cuts(
    dataset: Any, scene: Scene, tiling: Tiling, batch_size: int, skip: int
) -> Generator[list[_Cut], None, None]:
    """The windows batch by batch, without those of the first batches."""
    whole = windows(scene.height, scene.width, tiling.tile, tiling.tile)
    for start in range(skip * batch_size, len(whole), batch_size):
        cuts = []
        for window in whole[start : start + batch_size]:
            pixels, valid = read_window(dataset, scene, window, tiling.margin)
            cuts.append(_Cut(pixels=pixels, valid=valid))
        yield cuts


def _strips(
    scene: Scene, tiling: Tiling, batch_size: int, journal: Journal
) -> Iterator[NDArray[np.uint8]]:
    """The map from the journal, top down, in strips (rows, width) of the height of a file's blocks.

    Written so, each block is written once and in order: the same bytes, however the work was
    interrupted and however much memory GDAL may use.
    """
    whole = windows(scene.height, scene.width, tiling.tile, tiling.tile)
    waiting = np.empty((0, scene.width), np.uint8)
    row = np.empty((0, 0), np.uint8)
    for number, record in enumerate(journal.records()):
        batch = whole[number * batch_size : (number + 1) * batch_size]
        most = batch_size * tiling.tile**2  # a pixel is a byte; a record cannot ask for more
        content, start = np.frombuffer(zlib.decompressobj().decompress(record, most), np.uint8), 0
        for x, y, x2, y2 in batch:
            height, width = min(y2, scene.height) - y, min(x2, scene.width) - x
            if x == 0:
                row = np.empty((height, scene.width), np.uint8)
            row[:, x : x + width] = content[start : start + height * width].reshape(height, width)
            start += height * width
            if x2 >= scene.width:
                waiting = np.concatenate([waiting, row])
        while len(waiting) >= _BLOCK:
            yield waiting[:_BLOCK]
            waiting = waiting[_BLOCK:]
    if len(waiting):
        yield waiting


def _write_map(
    target: Path, dataset: Any, trained: TrainedModel, strips: Iterator[NDArray[np.uint8]]
) -> None:
    """Write the map beside its place, read it back, and put it there."""
    beside = target.with_name(f".{target.stem}.{os.getpid()}.part.tif")
    try:
        _check_writable(beside)
        digests = []
        with geodata().open(beside, "w", **_profile(dataset)) as map_:
            _describe(map_, dataset, trained)
            for number, strip in enumerate(strips):
                rows = (number * _BLOCK, number * _BLOCK + len(strip))
                map_.write(strip, 1, window=(rows, (0, dataset.width)))
                digests.append((rows, xxhash.xxh3_64_intdigest(np.ascontiguousarray(strip).data)))
        _check_written(beside, target, digests)
        sync_folder(beside)
        beside.replace(target)
        sync_folder(target.parent)
    except geodata().errors.RasterioError as error:  # reading gives a Flaw: this is from writing
        reason = " ".join(str(error.__cause__ or error).split())
        raise StorageError(f"cannot write {target}: {reason}") from None
    except OSError as error:
        raise storage_error(target, error) from error
    finally:
        beside.unlink(missing_ok=True)


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


def _check_written(path: Path, target: Path, digests: Sequence[tuple[tuple[int, int], int]]) -> None:
    """Read the map back: rasterio closes a file in silence when the disk is full.

    Raises:
        StorageError: it is not what was written.
    """
    try:
        with opened(path) as map_:
            columns = (0, map_.width)
            whole = all(
                xxhash.xxh3_64_intdigest(map_.read(1, window=(rows, columns)).data) == digest
                for rows, digest in digests
            )
    except (Flaw, geodata().errors.RasterioError):
        whole = False
    if not whole:
        raise StorageError(f"cannot write {target}: it is not whole; is the disk full?")
