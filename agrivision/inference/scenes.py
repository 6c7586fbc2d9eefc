"""A scene → its map: block by block, resumable, and put together by whoever finds all blocks there."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from agrivision.data.parts import geodata
from agrivision.data.sources.guard import files_of
from agrivision.data.sources.rasters import opened
from agrivision.data.sources.source import Flaw, Window
from agrivision.errors import Interrupted, StorageError
from agrivision.inference.ahead import one_ahead
from agrivision.inference.assemble import Weights, assemble, keep
from agrivision.inference.blend import Values, add_up
from agrivision.inference.cleaning import digest, mend_confidence, remove_specks, slices
from agrivision.inference.journal import (
    FOLDER,
    fingerprint,
    make_folder,
    remove_leftovers,
    require_own_state,
    stamp,
)
from agrivision.inference.postprocessing import Postprocessing
from agrivision.inference.predictor import Predictor
from agrivision.inference.reading import Cut, ScenePixels, open_scene, read_block
from agrivision.inference.scene import Scene, unreadable
from agrivision.inference.store import BlockFolder
from agrivision.inference.tiling import Block, Grid, Tiling
from agrivision.locks import FileLock
from agrivision.maps.cog import write_cog
from agrivision.maps.legend import NODATA, Legend
from agrivision.part import Stop, never
from agrivision.storage import remove_tree, storage_error, write_atomically

SCENES = "scenes"  # folder of what is known of them, in OUT/.predict
_BLOCK = 512  # pixels: side of the blocks of a file
_POLL_SECONDS = 0.2
_KINDS = {"map": "", "confidence": ".confidence", "probabilities": ".probabilities"}


@dataclass(frozen=True, kw_only=True)
class How:
    """How scenes are predicted.

    Attributes:
        predictor: what maps are made with.
        tiling: how scenes are cut.
        batch_size: windows in one forward pass.
        threads: with any, one reads the next block while the network computes.
        confidence: whether to write the layer of the winning class's probability.
        probabilities: whether to write a layer with the probabilities of all classes.
        postprocessing: what is done with probabilities; None takes the likeliest class.
    """

    predictor: Predictor
    tiling: Tiling
    batch_size: int = 8
    threads: int = 2
    confidence: bool = False
    probabilities: bool = False
    postprocessing: Postprocessing | None = None

    @property
    def legend(self) -> Legend:
        """The classes of the maps."""
        return Legend(classes=self.predictor.description.classes)

    @cached_property
    def _networks(self) -> list[str]:
        return [fingerprint(network) for network in self.predictor.networks]

    def digest(self, scene: Scene) -> str:
        """Of everything that the layers of a scene's map depend on."""
        about = (
            self._networks,
            self.predictor.symmetries,
            self.predictor.precision,
            self.tiling,
            self.tiling.axis(1).per_block,
            self.batch_size,
            self.probabilities,
            scene,
            [stamp(path) for path in files_of(scene.path)],
        )
        text = repr(about)
        if self.postprocessing is not None:
            text += repr((self.postprocessing, self.keeps_probabilities))
        return xxhash.xxh3_128_hexdigest(text.encode())

    @property
    def keeps_probabilities(self) -> bool:
        """Whether blocks are kept with those of all classes.

        A pixel whose area was too small gets another class, of which the confidence is wanted then.
        """
        sieves = self.postprocessing is not None and self.postprocessing.sieves
        return self.probabilities or (self.confidence and sieves)


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The rasters of a finished map, all on one grid.

    Attributes:
        map: class ids.
        confidence: None where it was not asked for.
        probabilities: None where they were not asked for.
    """

    map: Path
    confidence: Path | None = None
    probabilities: Path | None = None

    @classmethod
    def of(cls, scene: Path, out: Path, how: How) -> Layers:
        """Where a scene's layers belong."""
        paths = {kind: out / f"{scene.stem}{suffix}.tif" for kind, suffix in _KINDS.items()}
        return cls(
            map=paths["map"],
            confidence=paths["confidence"] if how.confidence else None,
            probabilities=paths["probabilities"] if how.probabilities else None,
        )

    def paths(self) -> dict[str, Path]:
        """Those that are made, by kind."""
        found = {kind: getattr(self, kind) for kind in _KINDS}
        return {kind: path for kind, path in found.items() if path is not None}


class SceneWork:
    """The prediction of one scene into one folder, by this process and perhaps by others.

    Args:
        scene: as `look` found it.
        out: folder of the maps; `out/.predict/scenes` holds what is done so far.
        how: to predict.

    Attributes:
        postprocessing: with least areas in pixels of the scene's grid; None without.
    """

    def __init__(self, scene: Scene, out: Path, how: How) -> None:
        self.scene, self.out, self.how = scene, out, how
        self.grid = Grid.of(how.tiling, scene.height, scene.width)
        self.layers = Layers.of(scene.path, out, how)
        trained, after = how.predictor.description.resolution, how.postprocessing
        self.postprocessing = None if after is None else after.at(trained, scene.resolution)
        self.digest = how.digest(scene)
        state = out / FOLDER / SCENES
        self._folder = state / scene.path.stem
        self._note = Note(state / f"{scene.path.stem}.json")
        self._lock = state / f"{scene.path.stem}.lock"
        self._store = BlockFolder(self._folder / self.digest)

    def windows(self, blocks: Iterable[int]) -> int:
        """How many windows some blocks have."""
        return sum(self.grid.count(self.grid.block(number)) for number in blocks)

    def require_own(self) -> None:
        """Refuse what somebody else left as done of this scene.

        Raises:
            Untrusted: there is such a thing.
            StorageError, NotWritable: it cannot be looked at.
        """
        require_own_state(self._folder, self._lock, self._note.path)

    @property
    def is_finished(self) -> bool:
        """Whether all layers are there, made of the same scene in the same way."""
        return self._note.holds("layers", self.digest, list(self.layers.paths().values()))

    def predict(self, blocks: Sequence[int], report: Callable[[int], None], stop: Stop = never) -> None:
        """Predict some of the blocks; those that are there already are left as they are.

        Args:
            blocks: their numbers.
            report: called with the number of windows finished since the last call.
            stop: whether to stop before the next batch.

        Raises:
            SourceError: the scene cannot be read.
            Interrupted: asked to stop; finished blocks are kept.
            StorageError, NotWritable: the disk refused.
        """
        left = [number for number in blocks if not self._store.is_whole(number)]
        report(self.windows(blocks) - self.windows(left))
        if not left:
            return
        make_folder(self._store.folder)
        remove_leftovers(self._store.folder, {f"{number}.block" for number in left})
        try:
            with open_scene(self.scene) as dataset:
                cuts = self._cuts(ScenePixels(dataset, self.scene), left)
                with closing(one_ahead(cuts) if self.how.threads else cuts) as coming:
                    for block, cut in coming:
                        self._predict(block, cut, report, stop)
        except Flaw as flaw:
            raise unreadable(flaw) from None
        finally:
            self._leave_nothing_empty()

    def _leave_nothing_empty(self) -> None:
        """Remove the folders of what is done so far, where nothing is."""
        with suppress(OSError):
            for folder in (self._store.folder, *self._store.folder.parents[:4]):
                folder.rmdir()

    def _cuts(
        self, pixels: ScenePixels, numbers: Sequence[int]
    ) -> Generator[tuple[Block, Cut], None, None]:
        for number in numbers:
            block = self.grid.block(number)
            yield block, read_block(pixels, block, self.how.tiling)

    def _predict(self, block: Block, cut: Cut, report: Callable[[int], None], stop: Stop) -> None:
        how = self.how
        sums = add_up(
            replace(how.predictor, statistics=self.scene.statistics),
            cut,
            self.grid,
            block,
            how.tiling,
            batch_size=how.batch_size,
            report=report,
            stop=stop,
        )
        keep(
            self._store,
            self.grid,
            block,
            sums,
            cut.valid,
            probabilities=how.keeps_probabilities,
            weights=self._weights,
        )

    @property
    def _weights(self) -> Weights:
        after = self.postprocessing
        return after.weights if after is not None and after.weighs else None

    def missing(self) -> int:
        """How many blocks are not there yet."""
        return sum(not self._store.has(number) for number in range(self.grid.blocks))

    def finish(self, then: Callable[[SceneWork], None], stop: Stop = never) -> bool:
        """Put the map together, if all blocks are there; one process does it, others wait for it.

        Args:
            then: called with what is finished, by one process at a time.
            stop: whether to stop waiting.

        Returns:
            Whether the map is there.

        Raises:
            SourceError: the scene cannot be read.
            Interrupted: asked to stop.
            StorageError, NotWritable: the disk refused.
        """
        with FileLock(self._lock) as lock:
            while not lock.take(alone=True):
                if stop():
                    raise Interrupted("stopped while another process puts the map together")
                time.sleep(_POLL_SECONDS)
            if not self.is_finished:
                if self.missing():
                    return False
                try:
                    self._write()
                except Flaw as flaw:
                    raise unreadable(flaw) from None
                paths = list(self.layers.paths().values())
                self._note.add("layers", self.digest, paths)
            then(self)
            if self._folder.exists():
                remove_tree(self._folder)
        return True

    @property
    def note(self) -> Note:
        """What is known of the files that were made."""
        return self._note

    def _write(self) -> None:
        """Put the layers together beside their places, and then put them there."""
        how, tags = self.how, self._tags()
        paths = self.layers.paths()
        beside = {kind: self._folder / f"{kind}.{os.getpid()}.tif" for kind in paths}
        try:
            with open_scene(self.scene) as dataset:
                counts = dict.fromkeys(paths, 1) | {"probabilities": len(how.legend.classes)}
                profiles = {kind: _profile(self.scene, dataset, counts[kind], kind) for kind in paths}
                points = dataset.gcps if self.scene.resampled is None else ([], None)
            digests = self._write_plain(beside, profiles, points)
            for kind, path in beside.items():
                _check_written(path, paths[kind], digests[kind])
            if self.postprocessing is not None and self.postprocessing.sieves:
                self._remove_specks(beside, self.postprocessing.areas)
            for kind, path in paths.items():
                write_cog(
                    beside[kind],
                    path,
                    categorical=kind == "map",
                    legend=how.legend if kind == "map" else None,
                    tags=tags,
                    descriptions=how.legend.classes if kind == "probabilities" else (kind,),
                    nodata=NODATA if kind == "map" else 0 if kind == "confidence" else None,
                )
        except OSError as error:
            raise storage_error(self.layers.map, error) from error
        finally:
            for path in beside.values():
                path.unlink(missing_ok=True)

    def _write_plain(
        self, beside: Mapping[str, Path], profiles: Mapping[str, dict[str, Any]], points: Any
    ) -> dict[str, list[tuple[Window, int]]]:
        """Write the layers cell by cell, and say what was written where."""
        digests: dict[str, list[tuple[Window, int]]] = {kind: [] for kind in beside}
        classes = len(self.how.legend.classes)
        try:
            with ExitStack() as stack:
                files = {}
                for kind, path in beside.items():
                    path.touch()  # the system says why it cannot be made, clearer than GDAL would
                    files[kind] = stack.enter_context(geodata().open(path, "w", **profiles[kind]))
                    if points[0]:
                        files[kind].gcps = (points[0], points[1] or geodata().CRS())
                cells = assemble(
                    self._store,
                    self.grid,
                    classes,
                    probabilities="probabilities" in beside,
                    weights=self._weights,
                )
                for cell, values in cells:
                    for kind, file in files.items():
                        layer = _layer(values, kind)
                        file.write(layer, window=slices(cell))
                        digests[kind].append((cell, digest(layer)))
        except geodata().errors.RasterioError as error:
            reason = " ".join(str(error.__cause__ or error).split())
            why = f"{reason}; is the disk full?"
            raise StorageError(f"cannot write {self.layers.map}: {why}") from None
        return digests

    def _remove_specks(self, beside: Mapping[str, Path], least: Sequence[int]) -> None:
        """Change the plain layers: the classes of small areas, and the confidence in the new ones."""
        cleaned = remove_specks(beside["map"], least)
        _check_written(beside["map"], self.layers.map, cleaned)
        if self.layers.confidence is not None:
            classes = len(self.how.legend.classes)
            cells = assemble(self._store, self.grid, classes, probabilities=True, weights=self._weights)
            mended = mend_confidence(beside["confidence"], beside["map"], cells)
            _check_written(beside["confidence"], self.layers.confidence, mended)

    def _tags(self) -> dict[str, str]:
        """What the map is made with."""
        networks = self.how.predictor.networks
        names = {f"CLASS_{number}": name for number, name in enumerate(self.how.legend.classes)}
        after = self.postprocessing
        return (
            names
            | {
                "AGRIVISION_DATA": networks[0].description.data_fingerprint,
                "AGRIVISION_STEP": ",".join(str(network.step) for network in networks),
            }
            | ({} if after is None else {"AGRIVISION_POSTPROCESSING": after.line()})
        )


class Note:
    """Which files were made from what, so that they are not made again.

    Attributes:
        path: of a JSON file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def holds(self, name: str, digest: str, files: Sequence[Path]) -> bool:
        """Whether files were made under this digest, and are still what was made."""
        try:
            known = self._read()[name]
            return bool((known["digest"], known["files"]) == (digest, _digests(files)))
        except (OSError, KeyError, TypeError):
            return False

    def about(self, name: str) -> dict[str, Any]:
        """What was noted with the files of this name; empty where nothing was."""
        found = self._read().get(name)
        more = found.get("about") if isinstance(found, dict) else None
        return more if isinstance(more, dict) else {}

    def add(self, name: str, digest: str, files: Sequence[Path], **about: Any) -> None:
        """Files were made under this digest; JSON values about them may be kept, too.

        Raises:
            StorageError, NotWritable: the disk refused.
        """
        made = {"digest": digest, "files": _digests(files), "about": about}
        content = self._read() | {name: made}
        write_atomically(self.path, json.dumps(content).encode())

    def _read(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            content = json.loads(self.path.read_bytes())
            if isinstance(content, dict):
                return content
        return {}


def _digests(files: Sequence[Path]) -> dict[str, str]:
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    return found


def _layer(values: Values, kind: str) -> np.ndarray[Any, Any]:
    """(bands, rows, columns) uint8."""
    if kind == "probabilities":
        assert values.probabilities is not None
        return values.probabilities
    return (values.ids if kind == "map" else values.confidence)[None]


def _profile(scene: Scene, dataset: Any, count: int, kind: str) -> dict[str, Any]:
    """Of a layer on the grid on which a scene is predicted, and in its coordinate system."""
    grid = scene.resampled
    transform = dataset.transform if grid is None else geodata().Affine(*grid.transform)
    return {
        "driver": "GTiff",
        "height": scene.height,
        "width": scene.width,
        "count": count,
        "dtype": "uint8",
        "nodata": NODATA if kind == "map" else 0 if kind == "confidence" else None,
        "crs": dataset.crs,
        "transform": None if transform.is_identity else transform,
        "photometric": "MINISBLACK",
        "interleave": "band",
        "tiled": True,
        "blockxsize": _BLOCK,
        "blockysize": _BLOCK,
        "bigtiff": "IF_SAFER",
    }


def _check_written(path: Path, target: Path, digests: Sequence[tuple[Window, int]]) -> None:
    """Read a layer back: rasterio closes a file in silence when the disk is full.

    Raises:
        StorageError: it is not what was written.
    """
    try:
        with opened(path) as layer:
            whole = all(digest(layer.read(window=slices(cell))) == found for cell, found in digests)
    except (Flaw, geodata().errors.RasterioError):
        whole = False
    if not whole:
        raise StorageError(f"cannot write {target}: it is not whole; is the disk full?")
