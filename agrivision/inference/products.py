"""What is made of a finished map: a picture, styles, polygons, tables, a STAC item, a page."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import shapely

from agrivision.data.sources.rasters import opened
from agrivision.data.sources.source import Flaw
from agrivision.errors import BadInput, SourceError
from agrivision.inference.journal import remove_leftovers, stamp
from agrivision.inference.quicklook import write_quicklook
from agrivision.inference.reading import open_scene
from agrivision.inference.scene import Scene, unreadable
from agrivision.inference.scenes import SceneWork
from agrivision.inference.told import network_of, page_of
from agrivision.maps.areas import Unmeasurable
from agrivision.maps.boundaries import read_boundaries
from agrivision.maps.cog import SIDECAR
from agrivision.maps.fields import FieldTable, write_fields
from agrivision.maps.geojson import NoLongitudes
from agrivision.maps.grid import grid_of
from agrivision.maps.page import Card, Page, write_index, write_page
from agrivision.maps.polygons import PolygonOptions, write_polygons
from agrivision.maps.stac import stac_item, taken_at, write_stac
from agrivision.maps.style import write_confidence_qml, write_qml
from agrivision.storage import storage_error

logger = logging.getLogger(__name__)

INDEX = "index.html"
_NAME = "products"  # in a scene's note


@dataclass(frozen=True, kw_only=True)
class Products:
    """What is made of a scene besides `STEM.tif`, its style, its picture, its page and its STAC item.

    Attributes:
        confidence: `STEM.confidence.tif`, the probability of each pixel's class.
        probabilities: `STEM.probabilities.tif`, those of all classes.
        polygons: `STEM.gpkg` and `STEM.geojson`; they come with the confidence.
        background: polygons of the class 0, too.
        smallest: areas of fewer square metres are given to their largest neighbour.
        simplify: metres by which outlines may move; neighbours keep the outline they share.
        fields: vector layer with the fields' boundaries, for `STEM.fields.csv`.
        field_name: its column with their names; None takes one called name, or numbers.
    """

    confidence: bool = False
    probabilities: bool = False
    polygons: bool = False
    background: bool = False
    smallest: float = 0.0
    simplify: float = 0.0
    fields: Path | None = None
    field_name: str | None = None

    def __post_init__(self) -> None:
        for name in ("smallest", "simplify"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise BadInput(f"{name} is {value}: it must be at least 0")
            if value and not self.polygons:
                raise BadInput(f"{name} is about polygons: ask for them with --polygons")
        if self.background and not self.polygons:
            raise BadInput("background is about polygons: ask for them with --polygons")
        if self.field_name is not None and self.fields is None:
            raise BadInput("field_name is a column of fields: give the layer with --fields")

    @property
    def needs_confidence(self) -> bool:
        """Whether a layer of confidences is written."""
        return self.confidence or self.polygons

    def check(self, scenes: Sequence[Scene]) -> None:
        """Look at what is needed besides pixels, before hours of work are done in vain.

        Raises:
            SourceError: the layer of fields cannot be used, or a scene that needs a place has none.
        """
        if self.fields is not None and read_boundaries(self.fields, self.field_name).crs is None:
            raise SourceError(f"{self.fields} has no coordinate system: assign it, with ogr2ogr -a_srs")
        for scene in scenes if self.fields is not None or self.smallest else ():
            what = "--fields" if self.fields is not None else "--smallest"
            try:
                with opened(scene.path) as dataset:
                    _ = grid_of(dataset).ground
            except Unmeasurable as error:
                raise SourceError(f"{scene.path}: leave out {what}, since {error}") from None
            except Flaw as flaw:
                raise unreadable(flaw) from None


@dataclass(frozen=True, kw_only=True)
class _Files:
    """Where a scene's products belong; None where they are not asked for."""

    style: Path
    confidence_style: Path | None
    picture: Path
    geopackage: Path | None
    geojson: Path | None
    fields: Path | None
    item: Path
    page: Path

    @classmethod
    def of(cls, stem: str, out: Path, products: Products) -> _Files:
        def place(suffix: str, *, wanted: bool) -> Path | None:
            return out / f"{stem}{suffix}" if wanted else None

        return cls(
            style=out / f"{stem}.qml",
            confidence_style=place(".confidence.qml", wanted=products.needs_confidence),
            picture=out / f"{stem}.png",
            geopackage=place(".gpkg", wanted=products.polygons),
            geojson=place(".geojson", wanted=products.polygons),
            fields=place(".fields.csv", wanted=products.fields is not None),
            item=out / f"{stem}.json",
            page=out / f"{stem}.html",
        )

    def all(self) -> list[Path]:
        """Those that are asked for; there is no GeoJSON of a scene that is nowhere on the Earth."""
        return [path for path in vars(self).values() if path is not None]


def outputs(scene: Path, out: Path, products: Products) -> list[Path]:
    """Every file that a scene's prediction may write."""
    layers = [out / f"{scene.stem}.tif"]
    if products.needs_confidence:
        layers.append(out / f"{scene.stem}.confidence.tif")
    if products.probabilities:
        layers.append(out / f"{scene.stem}.probabilities.tif")
    return [*layers, *_Files.of(scene.stem, out, products).all()]


def make_products(work: SceneWork, products: Products) -> None:
    """Make what is not there yet of a scene whose layers are finished.

    Raises:
        SourceError: the scene or the fields cannot be read.
        StorageError, NotWritable: the disk refused.
    """
    files = _Files.of(work.scene.path.stem, work.out, products)
    digest = f"{work.digest} {products}"
    if products.fields is not None:
        digest += f" {stamp(products.fields)}"
    there = [path for path in files.all() if path.exists()]
    if work.note.holds(_NAME, digest, there):
        return
    made = outputs(work.scene.path, work.out, products)
    remove_leftovers(work.out, {part for path in made for part in (path.name, path.stem)})
    try:
        page = _Maker(work, products, files).make()
    except Flaw as flaw:
        raise unreadable(flaw) from None
    except OSError as error:
        raise storage_error(files.page, error) from error
    there = [path for path in files.all() if path.exists()]
    work.note.add(_NAME, digest, there, pixels=page.pixels, hectares=page.hectares)


def make_index(works: Sequence[SceneWork], out: Path) -> None:
    """Write the page that leads to those of several scenes, all of which are finished.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    cards = []
    for work in works:
        about, stem = work.note.about(_NAME), work.scene.path.stem
        hectares = about["hectares"]
        cards.append(
            Card(
                stem=stem,
                legend=work.how.legend,
                pixels=tuple(about["pixels"]),
                hectares=None if hectares is None else tuple(hectares),
                quicklook=out / f"{stem}.png",
            )
        )
    write_index(out / INDEX, cards)


def _is_placed(scene: Scene) -> bool:
    """Whether anybody knows where on the Earth a scene lies."""
    try:
        with opened(scene.path) as dataset:
            return scene.resolution is not None or bool(dataset.gcps[0] and grid_of(dataset).crs)
    except Flaw as flaw:
        raise unreadable(flaw) from None


class _Maker:
    """Makes the products of one scene."""

    def __init__(self, work: SceneWork, products: Products, files: _Files) -> None:
        self._work, self._products, self._files = work, products, files
        self._scene, self._layers, self._legend = work.scene, work.layers, work.how.legend
        self._placed = _is_placed(work.scene)
        self._network = network_of(work)

    def make(self) -> Page:
        write_qml(self._files.style, self._legend)
        if self._files.confidence_style is not None:
            write_confidence_qml(self._files.confidence_style)
        with open_scene(self._scene) as dataset, opened(self._layers.map) as finished:
            about = self._work.how.predictor.description
            write_quicklook(self._files.picture, dataset, self._scene, finished, about)
            taken = taken_at(dataset)
        if self._products.polygons:
            self._polygons()
        table = None if self._products.fields is None else self._fields(self._products.fields)
        self._item(taken)
        page = page_of(
            self._work,
            self._network,
            taken=taken,
            table=table,
            picture=self._files.picture,
            files=[path for path in self._written() if path != self._files.page],
        )
        write_page(self._files.page, page)
        return page

    def _polygons(self) -> None:
        geojson = self._files.geojson
        assert geojson is not None
        try:
            geojson.unlink(missing_ok=True)  # of an earlier prediction; there may be none of this one
            if self._placed:
                self._write_polygons(geojson)
            else:
                logger.warning(
                    "%s: nothing says where it lies, so there are no hectares and no GeoJSON",
                    self._scene.path,
                )
                self._write_polygons(None)
        except NoLongitudes as error:
            logger.warning("%s", error)

    def _write_polygons(self, geojson: Path | None) -> None:
        every = tuple(range(len(self._legend.classes)))
        write_polygons(
            self._layers.map,
            self._legend,
            self._scene.path.stem,
            geopackage=self._files.geopackage,
            geojson=geojson,
            confidence=self._layers.confidence,
            options=PolygonOptions(
                include=every if self._products.background else None,
                sieve=self._products.smallest,
                simplify=self._products.simplify * self._units_a_metre(),
            ),
        )

    def _units_a_metre(self) -> float:
        """Units of the scene's coordinate system in a metre, in its middle; 1 where nobody knows."""
        with opened(self._layers.map) as dataset:
            grid = grid_of(dataset)
        row, column = grid.height // 2, grid.width // 2
        pixel = shapely.transform(shapely.box(column, row, column + 1, row + 1), grid.world)
        try:
            metres = float(grid.ground.areas(np.array([pixel]))[0])
        except Unmeasurable:
            return 1.0
        return math.sqrt(pixel.area / metres) if metres > 0 else 1.0

    def _fields(self, boundaries: Path) -> FieldTable:
        assert self._files.fields is not None
        table = write_fields(
            self._layers.map,
            boundaries,
            self._legend,
            self._scene.path.stem,
            self._files.fields,
            name_column=self._products.field_name,
        )
        if table.outside:
            logger.info("%s: %d fields lie outside", self._scene.path, table.outside)
        return table

    def _written(self) -> list[Path]:
        """The files of the scene in their order, those that GDAL may add among them."""
        paths = list(self._layers.paths().values())
        sidecars = [path.with_name(path.name + SIDECAR) for path in paths[:1]]
        products = self._files.all()
        if self._files.geojson is not None and not self._files.geojson.exists():
            products.remove(self._files.geojson)
        return [*paths, *(path for path in sidecars if path.exists()), *products]

    def _item(self, taken: datetime | None) -> None:
        files = [path for path in self._written() if path != self._files.item]
        item = stac_item(
            self._layers.map, files, legend=self._legend, network=self._network, taken=taken
        )
        write_stac(self._files.item, item)
