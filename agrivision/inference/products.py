"""What is made of a finished map: a picture, styles, polygons, tables, a STAC item, a page."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

from agrivision.data.sources.rasters import opened
from agrivision.data.sources.source import Flaw
from agrivision.errors import BadInput
from agrivision.inference.journal import remove_leftovers, stamp
from agrivision.inference.quicklook import write_quicklook
from agrivision.inference.reading import open_scene
from agrivision.inference.scene import Scene, unreadable
from agrivision.inference.scenes import SceneWork
from agrivision.maps.boundaries import read_boundaries
from agrivision.maps.fields import FieldTable, write_fields
from agrivision.maps.polygons import PolygonOptions, PolygonSummary, write_polygons
from agrivision.maps.style import write_confidence_qml, write_qml

logger = logging.getLogger(__name__)


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

    def check(self) -> None:
        """Read what is needed besides scenes, before hours of work are done in vain.

        Raises:
            SourceError: the layer of fields cannot be used.
        """
        if self.fields is not None:
            read_boundaries(self.fields, self.field_name)


@dataclass(frozen=True, kw_only=True)
class _Files:
    """Where a scene's products belong; None where they are not asked for."""

    style: Path
    confidence_style: Path | None
    picture: Path
    geopackage: Path | None
    geojson: Path | None
    fields: Path | None

    @classmethod
    def of(cls, stem: str, out: Path, products: Products) -> _Files:
        def place(suffix: str, *, wanted: bool = True) -> Path | None:
            return out / f"{stem}{suffix}" if wanted else None

        return cls(
            style=out / f"{stem}.qml",
            confidence_style=place(".confidence.qml", wanted=products.needs_confidence),
            picture=out / f"{stem}.png",
            geopackage=place(".gpkg", wanted=products.polygons),
            geojson=place(".geojson", wanted=products.polygons),
            fields=place(".fields.csv", wanted=products.fields is not None),
        )

    def all(self) -> list[Path]:
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
    there = [path for path in files.all() if path != files.geojson or _has_degrees(work.scene)]
    if work.note.holds("products", digest, there):
        return
    made = outputs(work.scene.path, work.out, products)
    remove_leftovers(work.out, {part for path in made for part in (path.name, path.stem)})
    _Maker(work, products, files).make()
    work.note.add("products", digest, there)


def _has_degrees(scene: Scene) -> bool:
    """Whether anybody knows where on the Earth a scene lies."""
    try:
        with opened(scene.path) as dataset:
            return dataset.crs is not None or bool(dataset.gcps[0] and dataset.gcps[1])
    except Flaw as flaw:
        raise unreadable(flaw) from None


class _Maker:
    """Makes the products of one scene."""

    def __init__(self, work: SceneWork, products: Products, files: _Files) -> None:
        self._work, self._products, self._files = work, products, files
        self._scene, self._layers, self._legend = work.scene, work.layers, work.how.legend

    def make(self) -> None:
        write_qml(self._files.style, self._legend)
        if self._files.confidence_style is not None:
            write_confidence_qml(self._files.confidence_style)
        self._picture()
        if self._products.polygons:
            self._polygons()
        if self._products.fields is not None:
            self._fields(self._products.fields)

    def _picture(self) -> None:
        try:
            with open_scene(self._scene) as dataset, opened(self._layers.map) as finished:
                about = self._work.how.predictor.description
                write_quicklook(self._files.picture, dataset, self._scene, finished, about)
        except Flaw as flaw:
            raise unreadable(flaw) from None

    def _polygons(self) -> PolygonSummary:
        placed = _has_degrees(self._scene)
        if not placed:
            logger.warning(
                "%s: nothing says where it lies, so there are no hectares and no GeoJSON",
                self._scene.path,
            )
        include = tuple(range(len(self._legend.classes))) if self._products.background else None
        return write_polygons(
            self._layers.map,
            self._legend,
            self._scene.path.stem,
            geopackage=self._files.geopackage,
            geojson=self._files.geojson if placed else None,
            confidence=self._layers.confidence,
            options=PolygonOptions(
                include=include,
                sieve=self._products.smallest,
                simplify=self._products.simplify * self._units_a_metre(),
            ),
        )

    def _units_a_metre(self) -> float:
        """Units of the scene's coordinate system in a metre; pixels where nobody knows."""
        if self._scene.resolution is None:
            return 1.0
        with opened(self._layers.map) as dataset:
            a, b, _, d, e, _ = tuple(dataset.transform)[:6]
        across, down = self._scene.resolution
        return math.sqrt(abs(a * e - b * d) / (across * down))

    def _fields(self, boundaries: Path) -> FieldTable:
        assert self._files.fields is not None
        return write_fields(
            self._layers.map,
            boundaries,
            self._legend,
            self._scene.path.stem,
            self._files.fields,
            name_column=self._products.field_name,
        )
