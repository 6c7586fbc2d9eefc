"""A page about a scene's map for people, and one that leads to those of many scenes.

Each is one file that needs no network: pictures are in it, there is no script, and its content
security policy forbids whatever else a text from elsewhere might try. Colours are attributes of inline
SVG, since that policy takes no `style` attribute.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from PIL import Image

import agrivision
from agrivision.errors import one_line
from agrivision.maps.legend import Legend
from agrivision.maps.stac import LAYERS
from agrivision.maps.style import hexadecimal
from agrivision.storage import storage_error, write_atomically

_PICTURE = 2400  # pixels: the longest side of a picture in a page
_SMALL = 360  # and in the index
_QUALITY = 88  # of JPEG
_UNITS = ("bytes", "kB", "MB", "GB", "TB")
_DASH = "\N{EN DASH}"
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
            f"<header><h1>{_text(page.stem)}</h1><p>{_text(about)}</p></header>",
            _figure(page),
            _section("Classes", _bar(page.pixels, page.legend) + _class_table(page)),
            _section("Confidence", _confidence(page.confidence)) if page.confidence else "",
            _section("Fields", _field_table(page)) if page.fields else "",
            _section("How it was made", _definitions(_making(page))),
            _section("Files", _file_list(page.files)),
        ]
    except OSError as error:
        raise storage_error(target, error) from error
    write_atomically(target, _document(page.stem, parts).encode())


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
        f"<header><h1>{_text(title)}</h1><p>{count}</p></header>",
        _section("Altogether", _total(pages)) if pages else "",
        _section("Scenes", f'<ul class="cards">{cards}</ul>'),
    ]
    write_atomically(target, _document(title, parts).encode())


def _document(title: str, parts: Iterable[str]) -> str:
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none';"
        " form-action 'none'"
    )
    body = "\n".join(part for part in parts if part)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{body}
</main>
<footer>agrivision {_text(agrivision.__version__)}</footer>
</body>
</html>
"""


def _text(text: str) -> str:
    """A text as one line of HTML that means nothing but itself."""
    return html.escape(one_line(text))


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{heading}</h2>\n{content}\n</section>"


def _href(name: str) -> str:
    """A file beside the page; the dot keeps `javascript:x.html` a name."""
    return f"./{quote(os.fsencode(name))}"


def _figure(page: Page) -> str:
    if page.quicklook is None:
        return ""
    picture = _picture(page.quicklook, _PICTURE, f"Scene and map of {page.stem}")
    link = f'<a href="{_href(page.quicklook.name)}">{picture}</a>'
    words = "The scene in natural and in false colours, and its map."
    return f'<figure><div class="wide">{link}</div><figcaption>{words}</figcaption></figure>'


def _picture(path: Path, most: int, words: str) -> str:
    """A picture inside the page, made smaller where it is larger than that."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    picture.thumbnail((most, most), Image.Resampling.BOX)
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=_QUALITY, subsampling=0)  # 0: the colours stay sharp
    data = base64.b64encode(content.getvalue()).decode()
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img src="data:image/jpeg;base64,{data}" {size} alt="{_text(words)}">'


def _bar(amounts: Sequence[float], legend: Legend) -> str:
    """The shares of the classes as one bar."""
    total = sum(amounts)
    if not total:
        return "<p>No pixel of the scene has data.</p>"
    pieces, left = [], 0.0
    for amount, color, name in zip(amounts, legend.colors, legend.classes, strict=True):
        width = 1000 * amount / total
        words = _text(f"{name}: {_share(amount, total)}")
        pieces.append(
            f'<rect x="{left:.2f}" width="{width:.2f}" height="24" fill="{hexadecimal(color)}">'
            f"<title>{words}</title></rect>"
        )
        left += width
    return (
        '<svg class="bar" viewBox="0 0 1000 24" preserveAspectRatio="none" role="img"'
        f' aria-label="Shares of the classes">{"".join(pieces)}</svg>'
    )


def _class_table(page: Page) -> str:
    """The legend, with what there is of each class."""
    total = sum(page.pixels)
    confident = page.confidence.by_class if page.confidence else None
    head = ["Class", *(["Hectares"] if page.hectares else []), "Share", "Pixels"]
    head += ["Mean confidence"] if confident else []
    rows = []
    for class_id, (name, pixels) in enumerate(zip(page.legend.classes, page.pixels, strict=True)):
        cells = [_share(pixels, total), f"{pixels:,}"]
        if page.hectares:
            cells.insert(0, _hectares(page.hectares[class_id]))
        if confident:
            cells.append(_percent(confident[class_id]))
        rows.append((_swatch(page.legend, class_id) + _text(name), cells))
    cells = [_share(total, total), f"{total:,}"]
    if page.hectares:
        cells.insert(0, _hectares(sum(page.hectares)))
    if page.confidence:
        cells.append(_percent(page.confidence.mean))
    return _table(head, rows, ("All", cells))


def _table(
    head: Sequence[str],
    rows: Iterable[tuple[str, Sequence[str]]],
    last: tuple[str, Sequence[str]] | None = None,
) -> str:
    """A table of numbers; what stands in front of each row is HTML."""
    titles = "".join(f'<th scope="col">{_text(title)}</th>' for title in head)
    body = "\n".join(map(_row, rows))
    foot = f"<tfoot>{_row(last)}</tfoot>" if last else ""
    return (
        f'<div class="wide"><table><thead><tr>{titles}</tr></thead>\n<tbody>\n{body}\n</tbody>'
        f"{foot}</table></div>"
    )


def _row(row: tuple[str, Sequence[str]]) -> str:
    cells = "".join(f"<td>{_text(cell)}</td>" for cell in row[1])
    return f'<tr><th scope="row">{row[0]}</th>{cells}</tr>'


def _swatch(legend: Legend, class_id: int) -> str:
    color = hexadecimal(legend.colors[class_id])
    return (
        f'<svg class="swatch" viewBox="0 0 14 14" aria-hidden="true">'
        f'<rect width="14" height="14" rx="2" fill="{color}"/></svg>'
    )


def _confidence(confidence: Confidence) -> str:
    """The mean in words, and how the pixels spread from unsure to sure."""
    bins = len(confidence.histogram)
    highest = max(confidence.histogram, default=0)
    columns = []
    for number, share in enumerate(confidence.histogram):
        height = 100 * share / highest if highest else 0
        words = f"{number / bins:.0%} to {(number + 1) / bins:.0%}: {_percent(share)} of the pixels"
        columns.append(
            f'<rect x="{number * 1000 / bins + 2:.1f}" y="{100 - height:.2f}"'
            f' width="{1000 / bins - 4:.1f}" height="{height:.2f}"><title>{_text(words)}</title></rect>'
        )
    return (
        f"<p>The class that wins has a probability of {_percent(confidence.mean)} on average. How many"
        " pixels are how sure:</p>"
        '<svg class="histogram" viewBox="0 0 1000 100" preserveAspectRatio="none" role="img"'
        f' aria-label="Histogram of the confidence">{"".join(columns)}</svg>'
        '<p class="ends"><span>0 %</span><span>50 %</span><span>100 %</span></p>'
    )


def _field_table(page: Page) -> str:
    classes = range(len(page.legend.classes))
    rows = [
        (_text(field.name), [_hectares(sum(field.hectares)), *map(_hectares, field.hectares)])
        for field in page.fields
    ]
    sums = [sum(field.hectares[class_id] for field in page.fields) for class_id in classes]
    last = ("All", [_hectares(sum(sums)), *map(_hectares, sums)]) if len(rows) > 1 else None
    return _table(["Field", "Hectares", *page.legend.classes], rows, last)


def _making(page: Page) -> list[tuple[str, str]]:
    making = page.making
    bands = ", ".join(band if band == taken else f"{band} from {taken}" for band, taken in making.bands)
    views = f"{making.views} turned and mirrored views averaged" if making.views > 1 else "none"
    ensemble = (
        f" and {len(making.checkpoints) - 1} more, averaged" if len(making.checkpoints) > 1 else ""
    )
    return [
        ("Checkpoint", f"{making.checkpoints[0]}{ensemble}"),
        ("Trained for", f"{making.step:,} steps"),
        ("Validation mIoU", _DASH if making.miou is None else f"{making.miou:.3f}"),
        ("Data set", making.data_fingerprint[:16]),
        ("Bands", bands),
        (
            "Windows",
            f"{making.window} {_BY} {making.window} pixels, {making.overlap} shared with the next",
        ),
        ("Test-time augmentation", views),
        ("Precision", making.precision),
        ("Resampled", making.resampled or "no"),
        ("Coordinate system", page.crs or "none"),
        ("Pixel size", page.pixel_size or "not known"),
    ]


def _definitions(entries: Iterable[tuple[str, str]]) -> str:
    lines = "\n".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in entries)
    return f"<dl>\n{lines}\n</dl>"


def _file_list(files: Iterable[Path]) -> str:
    lines = []
    for path in files:
        layer = next(
            (LAYERS[end] for end in sorted(LAYERS, key=len)[::-1] if path.name.endswith(end)), None
        )
        title = f" {_DASH} {layer.title}" if layer else ""
        size = _size(path.stat().st_size)
        lines.append(
            f'<li><a href="{_href(path.name)}">{_text(path.name)}</a>'
            f"<span>{_text(title)}, {size}</span></li>"
        )
    return f'<ul class="files">\n{chr(10).join(lines)}\n</ul>'


def _card(page: Card) -> str:
    picture = ""
    if page.quicklook is not None:
        picture = _picture(page.quicklook, _SMALL, f"Scene and map of {page.stem}")
    area = f"{sum(page.pixels):,} pixels"
    if page.hectares is not None:
        area = f"{_hectares(sum(page.hectares))} ha"
    return (
        f'<li><a href="{_href(page.stem + ".html")}">{picture}<b>{_text(page.stem)}</b></a>'
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
            cells = [_share(pixels[class_id], sum(pixels)), f"{pixels[class_id]:,}"]
            if hectares:
                cells.insert(0, _hectares(hectares[class_id]))
            rows.append((_swatch(legend, class_id) + _text(name), cells))
        head = ["Class", *(["Hectares"] if hectares else []), "Share of pixels", "Pixels"]
        last = [_share(sum(pixels), sum(pixels)), f"{sum(pixels):,}"]
        if hectares:
            last.insert(0, _hectares(sum(hectares)))
        tables.append(_bar(pixels, legend) + _table(head, rows, ("All", last)))
    notes = ["Ground that lies in two scenes counts twice."] if len(pages) > 1 else []
    missing = sum(page.hectares is None for page in pages)
    if 0 < missing < len(pages):
        notes.append(f"{missing} without coordinates: no hectares of those.")
    return "\n".join(tables) + (f"<p>{' '.join(notes)}</p>" if notes else "")


def _hectares(value: float) -> str:
    if not value:
        return "0"
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def _percent(share: float | None) -> str:
    return _DASH if share is None else f"{100 * share:.1f} %"


def _share(amount: float, total: float) -> str:
    if not total:
        return _DASH
    if amount in (0, total):
        return "100 %" if amount else "0 %"
    return "< 0.1 %" if amount / total < 0.0005 else _percent(amount / total)


def _size(count: int) -> str:
    """Bytes in the largest unit that leaves a number of one or more."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{count} {_UNITS[0]}" if unit == 0 else f"{value:.3g} {_UNITS[unit]}"


_STYLE = """
:root { --paper: #fbfbf9; --ink: #1d2420; --soft: #5d6a62; --line: #dcdfd8; --accent: #2f6b46; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #141816; --ink: #e4e8e3; --soft: #98a59d; --line: #303733; --accent: #8cc7a1; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main, footer { max-width: 62rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding: 2.5rem 0 1rem; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.01em; overflow-wrap: anywhere; }
header p { margin: .35rem 0 0; color: var(--soft); }
h2 { margin: 0 0 .9rem; font-size: 1.15rem; }
section { padding: 1.5rem 0; border-top: 1px solid var(--line); }
figure { margin: .5rem 0 2rem; }
figcaption { margin-top: .5rem; color: var(--soft); font-size: .85rem; }
img { display: block; width: 100%; height: auto; border-radius: 4px; }
a { color: var(--accent); text-underline-offset: .15em; }
.wide { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .75rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child { padding-left: 0; text-align: left; font-weight: 400; white-space: normal;
  min-width: 8rem; overflow-wrap: break-word; }
td:last-child, th:last-child { padding-right: 0; }
thead th, thead th:first-child { color: var(--soft); font-size: .85rem; font-weight: 400;
  vertical-align: bottom; white-space: normal; }
tfoot th:first-child, tfoot td { border-bottom: 0; font-weight: 600; }
.swatch { width: .95rem; height: .95rem; margin-right: .6rem; vertical-align: -.13rem; }
.swatch rect { stroke: var(--soft); stroke-width: 1; }
.bar { display: block; width: 100%; height: 1.1rem; margin: 0 0 1rem; border: 1px solid var(--line);
  border-radius: 3px; }
.histogram { display: block; width: 100%; height: 6rem; border-bottom: 1px solid var(--soft); }
.histogram rect { fill: var(--accent); }
.ends { display: flex; justify-content: space-between; margin: .3rem 0 0; color: var(--soft);
  font-size: .85rem; }
dl { display: grid; grid-template-columns: minmax(9rem, 14rem) 1fr; gap: .35rem 1rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
ul { margin: 0; padding: 0; list-style: none; }
.files li { padding: .2rem 0; overflow-wrap: anywhere; }
.files span { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1.5rem; }
.cards li { break-inside: avoid; }
.cards b { display: block; margin-top: .5rem; font-weight: 600; overflow-wrap: anywhere; }
.cards span { color: var(--soft); font-size: .9rem; }
.cards .bar { height: .5rem; margin: .4rem 0 0; }
footer { padding-top: 1rem; padding-bottom: 2.5rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 40rem) {
  figure img { width: 44rem; max-width: none; }
  table { font-size: .85rem; }
  th, td { padding: .4rem .35rem; }
  thead th, thead th:first-child { font-size: .75rem; }
  th:first-child { min-width: 6rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .6rem; }
}
@media print {
  :root { --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --accent: #000; }
  body { font-size: 10.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main, footer { max-width: none; padding: 0; }
  header { padding-top: 0; }
  tr, figure, svg { break-inside: avoid; }
  h2 { break-after: avoid; }
  .wide { overflow: visible; }
  table { font-size: 8.5pt; }
  th, td { padding: .15rem .3rem; white-space: normal; }
  figure img { width: 100%; }
}
"""
