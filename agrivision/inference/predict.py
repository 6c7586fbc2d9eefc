"""Whatever holds imagery → maps: finds out what each input is, checks all of them, then predicts."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from agrivision.data.schema import FILE_NAME
from agrivision.data.sources.guard import ALLOW_VRT, DRIVERS, VRT, is_raster
from agrivision.data.sources.layouts import LAYOUTS
from agrivision.errors import BadInput, SourceError
from agrivision.inference.journal import make_folder
from agrivision.inference.postprocessing import Postprocessing
from agrivision.inference.predictor import Predictor
from agrivision.inference.products import INDEX, Products, make_index, make_products, outputs
from agrivision.inference.scene import Taking, look
from agrivision.inference.scenes import How, SceneWork
from agrivision.inference.tiles import LABELS, PRESENCE, SUBMISSION, predict_tiles, shares
from agrivision.inference.tilesets import Tiles, check_keys, grouped, open_dataset, open_folder
from agrivision.inference.tiling import Tiling
from agrivision.inference.trained import Description, TrainedModel
from agrivision.maps.geopackage import check_name
from agrivision.model.precision import Precision
from agrivision.monitor.progress import Progress, progress
from agrivision.part import WHOLE, Part, Stop, never

logger = logging.getLogger(__name__)

LIST = ".txt"  # suffix of a file that names inputs, one a line
GEOPACKAGE = ".gpkg"
_TILES = 8  # in one forward pass, where nobody says
_SHOWN = 5
# XML, in which GDAL describes a raster that it puts together, cannot hold them.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """How to predict.

    Attributes:
        split: of a data set or an Agriculture-Vision folder; None for all.
        batch_size: tiles, or windows of a scene, in one forward pass; None takes 8, and on a processor
            as many windows as make half a megapixel: more only takes more memory there.
        threads: that read and write beside the network.
        precision: of the forward pass.
        tile: side in pixels of the windows of a scene; None takes that of the training tiles.
        margin: pixels that the network sees around each window; None takes an eighth of the tile.
        overlap: pixels that neighbouring windows share, where one fades into the other; None takes an
            eighth of the tile.
        symmetries: show everything to the network in all eight positions of a square, and average.
        taking: of scenes that are not like the tiles of the training.
        products: what is made of a scene besides the map.
        allow_vrt: take VRTs whose sources are plain files.
        postprocessing: what is done with probabilities; None takes the likeliest class.
    """

    split: str | None = None
    batch_size: int | None = None
    threads: int = 2
    precision: Precision = "fp32"
    tile: int | None = None
    margin: int | None = None
    overlap: int | None = None
    symmetries: bool = False
    taking: Taking = field(default_factory=Taking)
    products: Products = field(default_factory=Products)
    allow_vrt: bool = False
    postprocessing: Postprocessing | None = None

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "threads": 0, "tile": 1, "margin": 0, "overlap": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise BadInput(f"{name} is {value}: it must be at least {bound}")

    def after(self, description: Description) -> Postprocessing | None:
        """The post-processing, if it changes anything.

        Raises:
            BadInput: it is for other classes.
        """
        found = self.postprocessing
        if found is None:
            return None
        if found.classes != description.classes:
            raise BadInput(
                f"the post-processing is for the classes {', '.join(found.classes)}; the network knows"
                f" {', '.join(description.classes)}"
            )
        return found if found.weighs or found.sieves else None


@dataclass(frozen=True, kw_only=True)
class PredictSummary:
    """What `predict` wrote.

    Attributes:
        out: the folder.
        tiles: number of class-id PNGs.
        all_tiles: those of other parts among them.
        maps: GeoTIFFs of the scenes.
        missing: tiles of other parts without which there is no submission yet.
        unfinished: scenes whose maps lack blocks of other parts yet.
    """

    out: Path
    tiles: int
    all_tiles: int
    maps: tuple[Path, ...]
    missing: int = 0
    unfinished: tuple[Path, ...] = ()

    def lines(self) -> list[str]:
        """For people."""
        lines = [str(path) for path in self.maps[:_SHOWN]]
        if len(self.maps) > _SHOWN:
            lines.append(f"and {len(self.maps) - _SHOWN} more maps in {self.out}")
        if self.unfinished:
            lines.append(f"{len(self.unfinished)} scenes lack what other parts do")
        if self.missing:
            lines.append(
                f"{self.tiles} tiles in {self.out / LABELS}; {self.missing} of other parts are still"
                " missing"
            )
        elif self.all_tiles:
            where = f"{self.out / SUBMISSION}, with {self.out / PRESENCE}"
            lines.append(f"{self.all_tiles} tiles in {where}")
        return lines


@dataclass(frozen=True)
class _Found:
    """What the inputs are."""

    tiles: list[Tiles]
    scenes: list[Path]


def predict(
    trained: TrainedModel | Sequence[TrainedModel],
    inputs: Sequence[Path],
    out: Path,
    options: PredictOptions,
    bar: Progress | None = None,
    *,
    part: Part = WHOLE,
    stop: Stop = never,
) -> PredictSummary:
    """Predict tiles and scenes; everything that can be checked beforehand is.

    What is in `out` already, made of the same inputs by the same weights and options, is not made
    again: the same call goes on where it was interrupted. `out/.predict` holds what is known of it.

    Args:
        trained: the network, or several whose probabilities are averaged.
        inputs: prepared data sets, Agriculture-Vision folders, raster files, folders that hold rasters
            or have them in `scenes/`, and lists of these (`.txt`, a path a line), in any mixture.
        out: folder, made where missing. Tiles become `labels/KEY.png`, `submission.zip` and
            `presence.csv`, scenes `STEM.tif` and what belongs to it, see `Products`. Files of these
            names are replaced, each at once when its successor is whole; any others are left alone.
        options: how.
        bar: entered already; it is told how much there is to do, in tiles and windows.
        part: which batches of tiles and blocks of scenes to predict, beside processes that predict the
            others into the same folder. The one that finds all of a scene's blocks there puts its map
            together; the one that finds all tiles there writes `submission.zip` and `presence.csv`.
        stop: whether to stop before the next batch or block.

    Raises:
        BadInput: the networks do not belong together.
        Busy: another process predicts the same, and goes on doing so.
        SourceError: an input is of no known kind, does not fit the network or cannot be read.
        DatasetError: a prepared data set lacks the split, or is damaged.
        Interrupted: asked to stop; the same call goes on.
        StorageError, NotWritable: the disk refused.
    """
    networks = [trained] if isinstance(trained, TrainedModel) else trained
    predictor = Predictor.of(networks, symmetries=options.symmetries, precision=options.precision)
    description = predictor.description
    after = options.after(description)
    found = _find(_listed(inputs), out, options, description)
    check_keys(found.tiles)
    check_outputs(found.scenes, out, options.products)
    tiling = Tiling.of(description, options.tile, options.margin, options.overlap)
    batch_size = options.batch_size or _TILES
    how = How(
        predictor=replace(predictor, fast=True),
        tiling=tiling,
        batch_size=options.batch_size or tiling.batch(predictor.device),
        threads=options.threads,
        confidence=options.products.needs_confidence,
        probabilities=options.products.probabilities,
        postprocessing=after,
    )
    scenes = [look(path, description, options.taking) for path in found.scenes]
    options.products.check(scenes)
    works = [SceneWork(scene, out, how) for scene in scenes]
    shared = list(_shared(works, part))
    tiles = _count_tiles(found.tiles, batch_size, part)
    bar = bar or progress("predicting", unit="tile", show=False)
    bar.total(tiles + sum(work.windows(blocks) for work, blocks in shared))
    make_folder(out)
    missing = 0
    if any(each.keys for each in found.tiles):
        missing = predict_tiles(
            predictor,
            found.tiles,
            out,
            batch_size=batch_size,
            threads=options.threads,
            postprocessing=after,
            report=bar.advance,
            part=part,
            stop=stop,
        )
    done: list[Path] = []
    unfinished: list[Path] = []
    for work, blocks in shared:
        there = _predict_scene(work, blocks, options.products, bar, stop)
        (done if there else unfinished).append(work.layers.map)
    if len(done) == len(works) > 1:
        make_index(works, out)
    return PredictSummary(
        out=out,
        tiles=tiles,
        all_tiles=sum(len(each.keys) for each in found.tiles),
        maps=tuple(done),
        missing=missing,
        unfinished=tuple(unfinished),
    )


def _shared(works: Sequence[SceneWork], part: Part) -> Iterator[tuple[SceneWork, list[int]]]:
    """Which blocks of each scene are a part's: by their place among the blocks of all scenes."""
    start = 0
    for work in works:
        yield work, [block for block in range(work.grid.blocks) if part.takes(start + block)]
        start += work.grid.blocks


def _predict_scene(
    work: SceneWork, blocks: Sequence[int], products: Products, bar: Progress, stop: Stop
) -> bool:
    """Do a part's share of a scene; returns whether its map is there."""
    work.require_own()
    if work.is_finished:
        bar.advance(work.windows(blocks))
    else:
        work.predict(blocks, bar.advance, stop)
    return work.finish(lambda finished: make_products(finished, products), stop)


def _listed(inputs: Sequence[Path]) -> list[Path]:
    """The inputs, lists replaced by what they name."""
    found: list[Path] = []
    for path in inputs:
        if path.suffix.lower() != LIST:
            found.append(path)
            continue
        try:
            if not path.is_file():
                found.append(path)
                continue
            lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
            named = [path.parent / line for line in lines if line and not line.startswith("#")]
            absent = [each for each in named if not each.exists()]
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{path} is no list of paths: {error}") from None
        if not named:
            raise SourceError(f"{path} names nothing: a path a line belongs there")
        if absent:
            raise SourceError(f"{path} names {absent[0]}, which does not exist")
        found.extend(named)
    return found


def check_outputs(paths: Sequence[Path], out: Path, products: Products) -> None:
    """Check that every scene has a map of its own and that none takes the place of an input.

    Raises:
        SourceError: two scenes have the same stem, one a name that no map can have, or `out` is where
            the scenes are.
        NotWritable: a scene has a name of which no GeoPackage can be made.
    """
    inputs = {path.resolve() for path in paths}
    taken: dict[str, Path] = {INDEX: Path("their index")} if len(paths) > 1 else {}
    for path in paths:
        if taken.get(f"{path.stem}.tif") == path:
            raise SourceError(f"{path} is given twice: leave one out")
        for target in outputs(path, out, products):
            if _CONTROL.search(str(target.absolute())):
                raise SourceError(
                    f"{path} cannot become {target}, a name with a control character: rename it"
                )
            if target.suffix == GEOPACKAGE:
                check_name(target)
            if target.name in taken:
                raise SourceError(
                    f"{taken[target.name]} and {path} would both become {target}: rename one, or"
                    " predict them into different folders"
                )
            taken[target.name] = path
            if target.resolve() in inputs:
                raise SourceError(
                    f"the prediction of {path} would overwrite {target}: choose another --out"
                )


def _count_tiles(sets: Sequence[Tiles], batch_size: int, part: Part) -> int:
    count = 0
    for tiles, groups in shares(sets, batch_size, part):
        keys = grouped(tiles, batch_size)
        count += sum(len(keys[group]) for group in groups)
    return count


def _find(
    inputs: Sequence[Path], out: Path, options: PredictOptions, description: Description
) -> _Found:
    found = _Found([], [])
    for path in inputs:
        try:
            if path.resolve() == out.resolve():
                raise SourceError(f"{out} is an input: choose another folder with --out")
            tiles = _find_tiles(path, options.split, description)
            found.tiles.extend(tiles)
            if not tiles:
                found.scenes.extend(find_scenes(path, allow_vrt=options.allow_vrt))
        except (OSError, RuntimeError) as error:  # no permission, too long a name, links in a circle
            raise SourceError(f"{path} cannot be read: {error}") from None
    if options.split is not None and found.scenes:
        logger.warning("scenes have no splits: %r does not choose among them", options.split)
    return found


def _find_tiles(path: Path, split: str | None, description: Description) -> Sequence[Tiles]:
    """The tiles of a data set or of an Agriculture-Vision folder; none where it is neither."""
    if (path / FILE_NAME).is_file():
        return open_dataset(path, split, description)
    folder = open_folder(path, split, description)
    return [] if folder is None else [folder]


def find_scenes(path: Path, *, allow_vrt: bool = False) -> list[Path]:
    """The raster that a path is, or those in the folder that it is or in its `scenes/`, in order.

    Args:
        path: of a file or folder.
        allow_vrt: take VRTs, too.

    Raises:
        SourceError: there is none; the line says what was looked for.
    """
    if not path.exists():
        raise SourceError(f"no such file or folder: {path}")
    if path.is_file():
        if not is_raster(path, allow_vrt=allow_vrt):
            hint = f": {ALLOW_VRT}" if path.suffix.lower() == VRT else f" ({_formats()})"
            raise SourceError(f"{path} is no raster of a known format{hint}")
        return [path]
    if not path.is_dir():
        raise SourceError(f"{path} is neither a file nor a folder")
    folder = path / "scenes" if (path / "scenes").is_dir() else path
    scenes = list(_rasters(folder, allow_vrt))
    if not scenes:
        images = " or ".join(layout.rgb for layout in LAYOUTS)
        raise SourceError(
            f"nothing to predict in {path}: no {FILE_NAME}, no {images} (also under train, val or"
            f" test), and no rasters ({_formats()}) in {folder}"
        )
    return scenes


def _rasters(folder: Path, allow_vrt: bool) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            continue
        if is_raster(path, allow_vrt=allow_vrt):
            yield path
        elif path.suffix.lower() == VRT:
            logger.warning("%s is left out, since it may lead to other files: %s", path, ALLOW_VRT)


def _formats() -> str:
    return ", ".join(suffix.lstrip(".") for suffix in DRIVERS)
