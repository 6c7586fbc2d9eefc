"""What the page of a scene tells: of the map, and of how it was made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from agrivision.data.sources.rasters import opened
from agrivision.inference.scene import Scene
from agrivision.inference.scenes import SceneWork
from agrivision.maps.confidence import confidence_of
from agrivision.maps.fields import FieldTable
from agrivision.maps.hectares import class_hectares
from agrivision.maps.page import FieldArea, Making, Page
from agrivision.maps.stac import Network


def network_of(work: SceneWork) -> Network:
    """The first of the networks that made a map."""
    first = work.how.predictor.networks[0]
    scores = first.scores() or {}
    return Network(
        data_fingerprint=first.description.data_fingerprint,
        step=first.step,
        miou=scores.get("mIoU"),
        postprocessing=None if work.postprocessing is None else work.postprocessing.line(),
    )


def page_of(
    work: SceneWork,
    network: Network,
    *,
    taken: datetime | None,
    table: FieldTable | None,
    picture: Path,
    files: Sequence[Path],
) -> Page:
    """Everything that is to be said of a finished map.

    Args:
        work: whose layers are finished.
        network: the first one.
        taken: when the scene was photographed; None where nobody knows.
        table: of its fields; None without.
        picture: small one of the scene and its map.
        files: all but the page.

    Raises:
        Flaw, SourceError: the scene or a layer cannot be read.
    """
    scene, layers, legend = work.scene, work.layers, work.how.legend
    classes = class_hectares(layers.map, legend)
    hectares = [each.hectares for each in classes if each.hectares is not None]
    with opened(layers.map) as dataset:
        crs, transform = dataset.crs or dataset.gcps[1], dataset.transform
    count = len(classes)
    sure = None if layers.confidence is None else confidence_of(layers.map, layers.confidence, count)
    return Page(
        stem=scene.path.stem,
        legend=legend,
        pixels=tuple(each.pixels for each in classes),
        hectares=tuple(hectares) if len(hectares) == count else None,
        confidence=sure,
        fields=() if table is None else _areas(table, count),
        making=_making(work, network),
        height=scene.height,
        width=scene.width,
        crs=None if crs is None else _name_of(crs),
        pixel_size=_size(scene, transform),
        taken=None if taken is None else taken.strftime("%Y-%m-%d %H:%M UTC"),
        quicklook=picture,
        files=tuple(files),
    )


def _making(work: SceneWork, network: Network) -> Making:
    how, scene = work.how, work.scene
    wanted = how.predictor.description.bands
    with opened(scene.path) as dataset:
        bands = tuple(
            (name, "missing" if band is None else _band(dataset, band))
            for name, band in zip(wanted, scene.bands, strict=True)
        )
    return Making(
        checkpoints=tuple(each.folder.name for each in how.predictor.networks),
        step=network.step,
        miou=network.miou,
        data_fingerprint=network.data_fingerprint,
        bands=bands,
        window=how.tiling.tile,
        overlap=how.tiling.overlap,
        views=8 if how.predictor.symmetries else 1,
        precision=how.predictor.precision,
        resampled=_resampled(scene),
        postprocessing=network.postprocessing,
    )


def _areas(table: FieldTable, classes: int) -> tuple[FieldArea, ...]:
    """Hectares by class of each field in the order of the table."""
    found: dict[str, list[float]] = {}
    for row in table.rows:
        areas = found.setdefault(row.field, [0.0] * classes)
        if row.class_id is not None:
            areas[row.class_id] = row.hectares
    return tuple(FieldArea(name=name, hectares=tuple(areas)) for name, areas in found.items())


def _band(dataset: Any, band: int) -> str:
    name = dataset.descriptions[band - 1]
    return f"band {band} ({name})" if name else f"band {band}"


def _name_of(crs: Any) -> str:
    """`EPSG:26914`, or the name that it gives itself."""
    code = crs.to_epsg()
    if code is not None:
        return f"EPSG:{code}"
    return str(crs.to_dict(projjson=True).get("name", "its own"))


def _size(scene: Scene, transform: Any) -> str | None:
    if scene.resolution is not None:
        return _metres(scene.resolution)
    if transform.is_identity:
        return None
    return f"{math.hypot(transform.a, transform.d):.6g} x {math.hypot(transform.b, transform.e):.6g}"


def _resampled(scene: Scene) -> str | None:
    if scene.resampled is None or scene.resolution is None:
        return None
    return f"to {_metres(scene.resolution)}"


def _metres(resolution: tuple[float, float]) -> str:
    across, down = resolution
    return f"{across:.3g} x {down:.3g} m"
