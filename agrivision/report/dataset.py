"""The page about a data set: what is in it, what it looks like, where it lies, and what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image
from rasterio.errors import RasterioError
from rasterio.warp import transform

from agrivision.charts import SERIES, Chart, heat_map, histogram, outlines
from agrivision.data.glance import Example, Footprint, Glance
from agrivision.data.inspect import Inspection
from agrivision.data.schema import Schema
from agrivision.monitor.pictures import PALETTE, composite, enlarge, sheet, thin, truth_picture
from agrivision.pages import (
    DASH,
    Color,
    document,
    escaped,
    facts,
    figure,
    photograph,
    scrolled,
    section,
    share_bar,
    share_words,
    size_words,
    swatch,
    table,
)
from agrivision.report.drawings import drawn, side_by_side
from agrivision.storage import write_atomically

_BAND_COLORS: dict[str, Color] = {
    "red": (213, 94, 0),
    "green": (0, 158, 115),
    "blue": (0, 114, 178),
    "nir": (150, 60, 130),
}
_SHOWN = 200  # findings that are shown one by one
_DEGREES = "EPSG:4326"


def write_dataset_page(out: Path, found: Inspection, glance: Glance) -> None:
    """Write the page: the same bytes for the same data set.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    write_atomically(out, dataset_page(found, glance).encode())


def dataset_page(found: Inspection, glance: Glance) -> str:
    """The page, as HTML that needs no other file.

    Args:
        found: what `inspect` says of the data set.
        glance: what some of its tiles look like.
    """
    schema, name = found.schema, found.folder.resolve().name
    about = f"{schema.source} · {', '.join(schema.bands)} · {schema.dtype}"
    labelled = any(split.labelled for split in schema.splits.values())
    parts = [
        f"<header><h1>{escaped(name)}</h1><p>{escaped(about)}</p></header>",
        facts(_facts(found)),
        section("Is it whole?", _damage(found, glance)),
        section("Splits", _splits(schema)),
        section("Classes", _classes(schema)) if labelled else "",
        section("Labels that overlap", _overlaps(schema, glance)) if labelled else "",
        section("Bands", _bands(schema, glance)),
        section("Where it lies", _places(glance.footprints)) if glance.footprints else "",
        section("Samples by class", _samples(schema, glance)) if glance.examples else "",
    ]
    return document(f"{name} {DASH} data set", parts)


def _facts(found: Inspection) -> list[tuple[str, str]]:
    schema = found.schema
    splits = schema.splits.values()
    return [
        ("Tiles", f"{sum(split.tiles for split in splits):,}"),
        ("Side of a tile", f"{schema.tile} px"),
        ("Resolution", DASH if schema.resolution is None else f"{schema.resolution:.3g} m"),
        ("Valid pixels", f"{sum(split.pixels for split in splits) / 1e6:,.1f} M"),
        ("On disk", size_words(found.bytes)),
        ("Fingerprint", schema.fingerprint[:8]),
    ]


def _damage(found: Inspection, glance: Glance) -> str:
    lines = []
    if found.damaged:
        lines.append(
            f"<p>{found.damage_count:,} damages; {found.damaged_tiles:,} tiles cannot be used."
            " <code>agrivision prepare --repair</code> makes the damaged shards again.</p>"
        )
        rows = [
            (escaped(f"{one.split}/{one.shard}"), [one.key or DASH, one.what])
            for one in found.damage[:_SHOWN]
        ]
        lines.append(f'<div class="words">{table(["Shard", "Tile", "What"], rows)}</div>')
        if found.damage_count > _SHOWN:
            lines.append(f'<p class="note">And {found.damage_count - _SHOWN:,} more.</p>')
    elif found.verified:
        lines.append("<p>Every record was read, and is whole.</p>")
    else:
        lines.append(
            "<p>All shards are there, with the sizes and indexes that they should have. Records were"
            " not compared with their checksums: that is what <code>--verify</code> does.</p>"
        )
    if glance.unreadable and not found.damaged:
        lines.append(f"<p>{glance.unreadable:,} of the tiles looked at cannot be read.</p>")
    if found.left_over:
        names = ", ".join(found.left_over[:_SHOWN])
        lines.append(f'<p class="note">Does not belong to the data set: {escaped(names)}</p>')
    return "\n".join(lines)


def _splits(schema: Schema) -> str:
    rows = [
        (
            escaped(name),
            [
                f"{split.tiles:,}",
                f"{len(split.shards):,}",
                f"{split.pixels:,}",
                "yes" if split.labelled else "no",
            ],
        )
        for name, split in schema.splits.items()
    ]
    return table(["Split", "Tiles", "Shards", "Valid pixels", "Labels"], rows)


def _classes(schema: Schema) -> str:
    """Shares of valid pixels by split; a pixel with two labels counts for both."""
    labelled = {name: split for name, split in schema.splits.items() if split.labelled}
    colors = PALETTE[: len(schema.classes)]
    bars = "".join(
        f"<p>{escaped(name)}</p>{share_bar(split.class_pixels, schema.classes, colors)}"
        for name, split in labelled.items()
    )
    head = ["Class"]
    for name in labelled:
        head += [f"Pixels, {name}", f"Tiles, {name}"]
    rows = []
    for class_id, title in enumerate(schema.classes):
        cells = []
        for split in labelled.values():
            cells += [
                share_words(split.class_pixels[class_id], split.pixels),
                f"{split.class_tiles[class_id]:,}",
            ]
        rows.append((swatch(PALETTE[class_id]) + escaped(title), cells))
    note = '<p class="note">A pixel with two labels counts for both.</p>'
    return bars + table(head, rows) + note


def _overlaps(schema: Schema, glance: Glance) -> str:
    own = np.diagonal(glance.overlaps).astype(np.float64)
    if not (glance.overlaps - np.diag(np.diagonal(glance.overlaps))).any():
        return f"<p>None in the {glance.tiles:,} tiles that were looked at.</p>"
    there = np.flatnonzero(own)
    names = [schema.classes[class_id] for class_id in there]
    shares = (glance.overlaps / np.maximum(own, 1)[:, None])[np.ix_(there, there)]
    np.fill_diagonal(shares, 0)
    chart = heat_map(
        "overlaps",
        _told(names, shares),
        shares,
        names,
        names,
        row_title="of the pixels of",
        column_title="so many per cent are also",
    )
    caption = f"In the {glance.tiles:,} tiles that were looked at."
    shown = scrolled(drawn(chart), "Labels that overlap")
    return f'<div class="square">{figure(shown, caption)}</div>'


def _told(names: Sequence[str], shares: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> str:
    pairs = [
        f"{100 * shares[one, other]:.0f} % of {names[one]} are also {names[other]}"
        for one, other in zip(*np.nonzero(shares), strict=True)
    ]
    return f"Labels that overlap: {'; '.join(pairs)}"


def _bands(schema: Schema, glance: Glance) -> str:
    about = schema.statistics
    columns = about.mean, about.std, about.minimum, about.maximum
    rows = [
        (escaped(band), [f"{value:.6g}" for value in values])
        for band, *values in zip(schema.bands, *columns, strict=True)
    ]
    counts = glance.histograms
    chart = histogram(
        "bands",
        "Histograms of the bands",
        glance.edges.tolist(),
        (100 * counts / np.maximum(1, counts.sum(1, keepdims=True))).tolist(),
        names=schema.bands,
        colors=[_color(band, number) for number, band in enumerate(schema.bands)],
        x="value of a pixel",
        y="% of the valid pixels",
    )
    note = (
        f'<p class="note">The chart is of the {glance.tiles:,} tiles that were looked at, the table of'
        f" all of {escaped(', '.join(about.splits))}.</p>"
    )
    shown = table(["Band", "Mean", "Deviation", "Least", "Greatest"], rows)
    return side_by_side([chart]) + shown + note


def _color(band: str, number: int) -> Color:
    return _BAND_COLORS.get(band, SERIES[number % len(SERIES)])


def _places(footprints: Sequence[Footprint]) -> str:
    """Tiles on a map in degrees; those in a system that nobody knows are left out."""
    found: dict[str, list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]]] = {}
    left_out = 0
    for crs, group in groupby(sorted(footprints, key=lambda one: one.crs), key=lambda one: one.crs):
        tiles = list(group)
        corners = np.stack([tile.corners for tile in tiles])
        try:
            x, y = transform(crs, _DEGREES, corners[..., 0].ravel(), corners[..., 1].ravel())
        except (RasterioError, ValueError):  # no system, or one that PROJ does not know
            left_out += len(tiles)
            continue
        degrees = np.column_stack([x, y]).reshape(corners.shape)
        for tile, place in zip(tiles, degrees, strict=True):
            if np.isfinite(place).all():
                found.setdefault(tile.split, []).append(place)
            else:
                left_out += 1
    note = f"Of {len(footprints):,} tiles that were looked at, in longitude and latitude."
    if left_out:
        note += f" {left_out:,} are in a coordinate system that leads to no place on the Earth."
    chart = side_by_side([_map(found)]) if found else ""
    return f'{chart}<p class="note">{note}</p>'


def _map(found: dict[str, list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]]]) -> Chart:
    shapes = [np.stack(tiles) for tiles in found.values()]
    latitude = float(np.mean([each[..., 1].mean() for each in shapes]))
    return outlines(
        "places",
        f"Where the tiles of {', '.join(found)} lie",
        shapes,
        list(found),
        [SERIES[number % len(SERIES)] for number in range(len(found))],
        x="longitude, °",
        y="latitude, °",
        stretch=1 / max(0.05, float(np.cos(np.radians(latitude)))),
    )


def _samples(schema: Schema, glance: Glance) -> str:
    parts = [
        "<p>The tile with most of the class, and one with as much of it as those that have any usually"
        " have: natural colours, near-infrared as red, labels.</p>"
    ]
    for class_id, examples in glance.examples.items():
        name = escaped(schema.classes[class_id])
        shown = "".join(_sample(schema, example, schema.classes[class_id]) for example in examples)
        parts.append(f"<h3>{swatch(PALETTE[class_id])}{name}</h3>{shown}")
    return "\n".join(parts)


def _sample(schema: Schema, example: Example, name: str) -> str:
    panes = [composite(example.image, schema.bands, kind) for kind in ("rgb", "nir")]
    panes.append(truth_picture(example.labels, len(schema.classes)))
    captions = ["RGB", "NIR-R-G", "labels"]
    picture = Image.fromarray(sheet([enlarge(thin(pane)) for pane in panes], captions, schema.classes))
    words = f"{example.split}: {example.key}, {100 * example.share:.3g} % {name}"
    return figure(scrolled(photograph(picture, f"Tile {words}"), example.key), escaped(words))
