"""A page about a scene's map for people, and one that leads to those of many scenes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agrivision.maps.legend import Legend
from agrivision.maps.stac import LAYERS
from agrivision.pages import (
    DASH,
    definitions,
    document,
    embedded,
    escaped,
    href,
    percent,
    section,
    share_bar,
    share_words,
    size_words,
    swatch,
    table,
)
from agrivision.storage import storage_error, write_atomically

_PICTURE = 2400  # pixels: the longest side of a picture in a page
_SMALL = 360  # and in the index
_BY = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """How sure the network is: the mean probability of the class that won.

    Attributes:
        mean: over the pixels with data, 0 to 1.
        by_class: over the pixels of each class, by id; None where there is none.
        histogram: shares of the pixels in bins of the same width from 0 to 1.
    """

    mean: float
    by_class: tuple[float | None, ...]
    histogram: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class FieldArea:
    """What was found in a field.

    Attributes:
        name: of the field.
        hectares: by class id.
    """

    name: str
    hectares: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Making:
    """How a map was made.

    Attributes:
        checkpoints: names of what predicted: one, or an ensemble.
        step: optimiser steps of the first.
        miou: its mean intersection over union in validation, 0 to 1; None where it is not known.
        data_fingerprint: of the data set that it learned from.
        bands: of the network, each with the band of the scene that was taken for it.
        window: side of what was predicted at a time, in pixels.
        overlap: of two windows, in pixels.
        views: turned and mirrored views of each window that were averaged; 1 is the plain one alone.
        precision: of the forward pass.
        resampled: how the scene's pixels were made those of the training, or None: as they were.
        postprocessing: factors and least areas by class, in words; None where there were none.
    """

    checkpoints: tuple[str, ...]
    step: int
    miou: float | None
    data_fingerprint: str
    bands: tuple[tuple[str, str], ...]
    window: int
    overlap: int
    views: int
    precision: str
    resampled: str | None = None
    postprocessing: str | None = None


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a page that leads to many scenes says of one.

    Attributes:
        stem: of the files; the scene's own page is `STEM.html`.
        legend: of the map.
        pixels: by class id.
        hectares: by class id; None where the scene lies nowhere on the globe.
        quicklook: `STEM.png`, or None.
    """

    stem: str
    legend: Legend
    pixels: tuple[int, ...]
    hectares: tuple[float, ...] | None
    quicklook: Path | None


@dataclass(frozen=True, kw_only=True)
class Page(Card):
    """What is to be said of a scene's map.

    Attributes:
        confidence: None where it was not asked for.
        fields: in the order of the table.
        making: how it was made.
        height: of the scene in pixels.
        width: the same.
        crs: name of its coordinate system; None without one.
        pixel_size: sides of a pixel with their unit, as `0.6 x 0.6 m`; None where it has no transform.
        taken: when it was photographed; None where nobody knows.
        files: those beside the page, of which it tells the size; ends as `LAYERS` has them.
    """

    confidence: Confidence | None
    fields: tuple[FieldArea, ...]
    making: Making
    height: int
    width: int
    crs: str | None
    pixel_size: str | None
    taken: str | None
    files: tuple[Path, ...]


def write_page(target: Path, page: Page) -> None:
    """Write `STEM.html`: the same bytes for the same content and files.

    Raises:
        StorageError, NotWritable: a file beside it cannot be read, or the page not be written.
    """
    hectares = "" if page.hectares is None else f" · {_hectares(sum(page.hectares))} ha"
    about = f"{page.width:,} {_BY} {page.height:,} pixels{hectares}"
    if page.taken is not None:
        about += f" · {page.taken}"
    try:
        parts = [
            f"<header><h1>{escaped(page.stem)}</h1><p>{escaped(about)}</p></header>",
            _figure(page),
            section(
                "Classes",
                _bar(page.pixels, page.legend) + _class_table(page),
            ),
            section("Confidence", _confidence(page.confidence)) if page.confidence else "",
            section("Fields", _field_table(page)) if page.fields else "",
            section("How it was made", definitions(_making(page))),
            section("Files", _file_list(page.files)),
        ]
    except OSError as error:
        raise storage_error(target, error) from error
    write_atomically(target, document(page.stem, parts).encode())


def write_index(target: Path, pages: Sequence[Card], title: str = "Maps") -> None:
    """Write a page that leads to those of many scenes, with a small picture and the area of each.

    Args:
        target: beside the pages.
        pages: in the order in which they are to be shown.
        title: its heading.

    Raises:
        StorageError, NotWritable: a picture cannot be read, or the page not be written.
    """
    count = "1 scene" if len(pages) == 1 else f"{len(pages):,} scenes"
    try:
        cards = "".join(map(_card, pages))
    except OSError as error:
        raise storage_error(target, error) from error
    parts = [
        f"<header><h1>{escaped(title)}</h1><p>{count}</p></header>",
        section("Altogether", _total(pages)) if pages else "",
        section("Scenes", f'<ul class="cards">{cards}</ul>'),
    ]
    write_atomically(target, document(title, parts).encode())


def _figure(page: Page) -> str:
    if page.quicklook is None:
        return ""
    picture = embedded(page.quicklook, _PICTURE, f"Scene and map of {page.stem}")
    link = f'<a href="{href(page.quicklook.name)}">{picture}</a>'
    words = "The scene in natural and in false colours, and its map."
    return f'<figure><div class="wide">{link}</div><figcaption>{words}</figcaption></figure>'


def _bar(pixels: Sequence[float], legend: Legend) -> str:
    return share_bar(pixels, legend.classes, legend.colors)


def _class_table(page: Page) -> str:
    """The legend, with what there is of each class."""
    total = sum(page.pixels)
    confident = page.confidence.by_class if page.confidence else None
    head = ["Class", *(["Hectares"] if page.hectares else []), "Share", "Pixels"]
    head += ["Mean confidence"] if confident else []
    rows = []
    for class_id, (name, pixels) in enumerate(zip(page.legend.classes, page.pixels, strict=True)):
        cells = [share_words(pixels, total), f"{pixels:,}"]
        if page.hectares:
            cells.insert(0, _hectares(page.hectares[class_id]))
        if confident:
            cells.append(percent(confident[class_id]))
        rows.append((swatch(page.legend.colors[class_id]) + escaped(name), cells))
    cells = [share_words(total, total), f"{total:,}"]
    if page.hectares:
        cells.insert(0, _hectares(sum(page.hectares)))
    if page.confidence:
        cells.append(percent(page.confidence.mean))
    return table(head, rows, ("All", cells))


def _confidence(confidence: Confidence) -> str:
    """The mean in words, and how the pixels spread from unsure to sure."""
    bins = len(confidence.histogram)
    highest = max(confidence.histogram, default=0)
    columns = []
    for number, share in enumerate(confidence.histogram):
        height = 100 * share / highest if highest else 0
        words = f"{number / bins:.0%} to {(number + 1) / bins:.0%}: {percent(share)} of the pixels"
        columns.append(
            f'<rect x="{number * 1000 / bins + 2:.1f}" y="{100 - height:.2f}"'
            f' width="{1000 / bins - 4:.1f}" height="{height:.2f}">'
            f"<title>{escaped(words)}</title></rect>"
        )
    return (
        f"<p>The class that wins has a probability of {percent(confidence.mean)} on average. How many"
        " pixels are how sure:</p>"
        '<svg class="histogram" viewBox="0 0 1000 100" preserveAspectRatio="none" role="img"'
        f' aria-label="Histogram of the confidence">{"".join(columns)}</svg>'
        '<p class="ends"><span>0 %</span><span>50 %</span><span>100 %</span></p>'
    )


def _field_table(page: Page) -> str:
    classes = range(len(page.legend.classes))
    rows = [
        (escaped(field.name), [_hectares(sum(field.hectares)), *map(_hectares, field.hectares)])
        for field in page.fields
    ]
    sums = [sum(field.hectares[class_id] for field in page.fields) for class_id in classes]
    last = ("All", [_hectares(sum(sums)), *map(_hectares, sums)]) if len(rows) > 1 else None
    return table(["Field", "Hectares", *page.legend.classes], rows, last)


def _making(page: Page) -> list[tuple[str, str]]:
    making = page.making
    bands = ", ".join(band if band == taken else f"{band} from {taken}" for band, taken in making.bands)
    views = f"{making.views} turned and mirrored views averaged" if making.views > 1 else "none"
    ensemble = (
        f" and {len(making.checkpoints) - 1} more, averaged" if len(making.checkpoints) > 1 else ""
    )
    after = making.postprocessing
    return [
        ("Checkpoint", f"{making.checkpoints[0]}{ensemble}"),
        ("Trained for", f"{making.step:,} steps"),
        ("Validation mIoU", DASH if making.miou is None else f"{making.miou:.3f}"),
        ("Data set", making.data_fingerprint[:16]),
        ("Bands", bands),
        (
            "Windows",
            f"{making.window} {_BY} {making.window} pixels, {making.overlap} shared with the next",
        ),
        ("Test-time augmentation", views),
        ("Precision", making.precision),
        *([] if after is None else [("Post-processing", after)]),
        ("Resampled", making.resampled or "no"),
        ("Coordinate system", page.crs or "none"),
        ("Pixel size", page.pixel_size or "not known"),
    ]


def _file_list(files: Iterable[Path]) -> str:
    lines = []
    for path in files:
        layer = next(
            (LAYERS[end] for end in sorted(LAYERS, key=len)[::-1] if path.name.endswith(end)), None
        )
        title = f" {DASH} {layer.title}" if layer else ""
        size = size_words(path.stat().st_size)
        lines.append(
            f'<li><a href="{href(path.name)}">{escaped(path.name)}</a>'
            f"<span>{escaped(title)}, {size}</span></li>"
        )
    return f'<ul class="files">\n{chr(10).join(lines)}\n</ul>'


def _card(page: Card) -> str:
    picture = ""
    if page.quicklook is not None:
        picture = embedded(page.quicklook, _SMALL, f"Scene and map of {page.stem}")
    area = f"{sum(page.pixels):,} pixels"
    if page.hectares is not None:
        area = f"{_hectares(sum(page.hectares))} ha"
    return (
        f'<li><a href="{href(page.stem + ".html")}">{picture}<b>{escaped(page.stem)}</b></a>'
        f"<span>{area}</span>{_bar(page.pixels, page.legend)}</li>\n"
    )


def _total(pages: Sequence[Card]) -> str:
    """The classes of all scenes together; those of other classes have a table of their own."""
    tables = []
    for legend in dict.fromkeys(page.legend for page in pages):
        same = [page for page in pages if page.legend == legend]
        pixels = [sum(column) for column in zip(*(page.pixels for page in same), strict=True)]
        placed = [page.hectares for page in same if page.hectares is not None]
        hectares = [sum(column) for column in zip(*placed, strict=True)]
        rows = []
        for class_id, name in enumerate(legend.classes):
            cells = [share_words(pixels[class_id], sum(pixels)), f"{pixels[class_id]:,}"]
            if hectares:
                cells.insert(0, _hectares(hectares[class_id]))
            rows.append((swatch(legend.colors[class_id]) + escaped(name), cells))
        head = ["Class", *(["Hectares"] if hectares else []), "Share of pixels", "Pixels"]
        last = [share_words(sum(pixels), sum(pixels)), f"{sum(pixels):,}"]
        if hectares:
            last.insert(0, _hectares(sum(hectares)))
        tables.append(_bar(pixels, legend) + table(head, rows, ("All", last)))
    notes = ["Ground that lies in two scenes counts twice."] if len(pages) > 1 else []
    missing = sum(page.hectares is None for page in pages)
    if 0 < missing < len(pages):
        notes.append(f"{missing} without coordinates: no hectares of those.")
    return "\n".join(tables) + (f"<p>{' '.join(notes)}</p>" if notes else "")


def _hectares(value: float) -> str:
    if not value:
        return "0"
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"
