"""Pages for people: each is one file that needs no network.

Pictures are in it, there is no script, and its content security policy forbids whatever else a text
from elsewhere might try. Colours are attributes of inline SVG, since that policy takes no `style`
attribute.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

from PIL import Image

import agrivision
from agrivision.errors import one_line

DASH = "\N{EN DASH}"
Color = tuple[int, int, int]  # red, green, blue, 0 to 255

_QUALITY = 88  # of JPEG
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def hexadecimal(color: Color) -> str:
    """A colour as `#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page of parts that are HTML; empty ones are left out."""
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
<title>{escaped(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{body}
</main>
<footer>agrivision {escaped(agrivision.__version__)}</footer>
</body>
</html>
"""


def escaped(text: str) -> str:
    """A text as one line of HTML that means nothing but itself."""
    return html.escape(one_line(text))


def section(heading: str, content: str, *, level: int = 2) -> str:
    """A part with a heading; both are HTML. One within another has a greater level."""
    return f"<section><h{level}>{heading}</h{level}>\n{content}\n</section>"


def href(name: str) -> str:
    """A file beside the page; the dot keeps `javascript:x.html` a name."""
    return f"./{quote(os.fsencode(name))}"


def embedded(path: Path, most: int, words: str) -> str:
    """A picture inside the page.

    Args:
        path: of a file that Pillow reads.
        most: pixels; a longer side is made smaller.
        words: for those who cannot see it.

    Raises:
        OSError: it cannot be read.
    """
    with Image.open(path) as image:
        picture = image.convert("RGB")
    picture.thumbnail((most, most), Image.Resampling.BOX)
    return photograph(picture, words)


def photograph(picture: Image.Image, words: str, quality: int = _QUALITY) -> str:
    """A picture in RGB inside the page.

    Args:
        picture: as it is to be shown.
        words: for those who cannot see it.
        quality: of JPEG; a page of many pictures takes less.
    """
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=quality, subsampling=0)  # 0: the colours stay sharp
    data = base64.b64encode(content.getvalue()).decode()
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img src="data:image/jpeg;base64,{data}" {size} alt="{escaped(words)}">'


def drawing(light: bytes, dark: bytes, size: tuple[int, int], words: str) -> str:
    """An SVG inside the page, as a picture of its own: nothing in it can reach the page.

    Args:
        light: on light paper.
        dark: the same on dark paper.
        size: width and height in pixels.
        words: for those who cannot see it.
    """
    sources = [f"data:image/svg+xml;base64,{base64.b64encode(one).decode()}" for one in (light, dark)]
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{sources[1]}">'
        f'<img src="{sources[0]}" width="{size[0]}" height="{size[1]}" alt="{escaped(words)}">'
        "</picture>"
    )


def figure(content: str, caption: str = "") -> str:
    """A picture, or several, with words beneath; both are HTML."""
    return f"<figure>{content}{f'<figcaption>{caption}</figcaption>' if caption else ''}</figure>"


def scrolled(content: str, words: str) -> str:
    """What may be wider than a phone; the keyboard reaches it.

    Args:
        content: HTML.
        words: what it is.
    """
    return f'<div class="wide" tabindex="0" role="group" aria-label="{escaped(words)}">{content}</div>'


def facts(entries: Iterable[tuple[str, str]]) -> str:
    """A few figures that count, each under its name; both plain text."""
    lines = "\n".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in entries
    )
    return f'<dl class="facts">\n{lines}\n</dl>'


def listing(lines: Iterable[tuple[str, bool]]) -> str:
    """Lines of a file, with some of them marked."""
    shown = [f"<mark>{escaped(line)}</mark>" if marked else escaped(line) for line, marked in lines]
    return f"<pre>{chr(10).join(shown)}</pre>"


def share_bar(amounts: Sequence[float], names: Sequence[str], colors: Sequence[Color]) -> str:
    """The shares of some classes as one bar."""
    total = sum(amounts)
    if not total:
        return "<p>No pixel has data.</p>"
    pieces, left = [], 0.0
    for amount, color, name in zip(amounts, colors, names, strict=True):
        width = 1000 * amount / total
        words = escaped(f"{name}: {share_words(amount, total)}")
        pieces.append(
            f'<rect x="{left:.2f}" width="{width:.2f}" height="24" fill="{hexadecimal(color)}">'
            f"<title>{words}</title></rect>"
        )
        left += width
    return (
        '<svg class="bar" viewBox="0 0 1000 24" preserveAspectRatio="none" role="img"'
        f' aria-label="Shares of the classes">{"".join(pieces)}</svg>'
    )


def table(
    head: Sequence[str],
    rows: Iterable[tuple[str, Sequence[str]]],
    last: tuple[str, Sequence[str]] | None = None,
) -> str:
    """A table of numbers; what stands in front of each row is HTML."""
    titles = "".join(f'<th scope="col">{escaped(title)}</th>' for title in head)
    body = "\n".join(map(_row, rows))
    foot = f"<tfoot>{_row(last)}</tfoot>" if last else ""
    whole = f"<table><thead><tr>{titles}</tr></thead>\n<tbody>\n{body}\n</tbody>{foot}</table>"
    return scrolled(whole, f"Table: {head[0]}")


def _row(row: tuple[str, Sequence[str]]) -> str:
    cells = "".join(f"<td>{escaped(cell)}</td>" for cell in row[1])
    return f'<tr><th scope="row">{row[0]}</th>{cells}</tr>'


def swatch(color: Color) -> str:
    """A small square of a colour, for a legend."""
    return (
        f'<svg class="swatch" viewBox="0 0 14 14" aria-hidden="true">'
        f'<rect width="14" height="14" rx="2" fill="{hexadecimal(color)}"/></svg>'
    )


def definitions(entries: Iterable[tuple[str, str]]) -> str:
    """Names with what they stand for, both plain text."""
    lines = "\n".join(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in entries)
    return f"<dl>\n{lines}\n</dl>"


def percent(share: float | None) -> str:
    """A share, 0 to 1, as `12.3 %`."""
    return DASH if share is None else f"{100 * share:.1f} %"


def share_words(amount: float, total: float) -> str:
    """What part of a total something is, in per cent; not 0 for what is there."""
    if not total:
        return DASH
    if amount in (0, total):
        return "100 %" if amount else "0 %"
    return "< 0.1 %" if amount / total < 0.0005 else percent(amount / total)


def size_words(count: int) -> str:
    """Bytes in the largest unit that leaves a number of one or more."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{count} {_UNITS[0]}" if unit == 0 else f"{value:.3g} {_UNITS[unit]}"


_STYLE = """
:root { --paper: #fbfbf9; --ink: #1d2420; --soft: #5d6a62; --line: #dcdfd8; --accent: #2f6b46;
  --mark: #fbe9a7; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #141816; --ink: #e4e8e3; --soft: #98a59d; --line: #303733; --accent: #8cc7a1;
    --mark: #56480f; }
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
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20.5rem, 100%), 1fr));
  gap: 1rem 1.5rem; margin: 0 0 .75rem; }
.charts figure { margin: 0; min-width: 0; }
.charts img { border-radius: 0; }
.square img { max-width: 44rem; border-radius: 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr));
  gap: 1.1rem 1.5rem; }
.facts dt { font-size: .85rem; }
.facts dd { margin: 0; font-size: 1.45rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
h3 { margin: 0 0 .6rem; font-size: 1rem; }
h4 { margin: 1.4rem 0 .5rem; font-size: .95rem; }
section section { border-top: 0; padding: 1.1rem 0; }
.words th, .words td { text-align: left; }
.words th:first-child { min-width: 0; }
.words td:last-child { min-width: 14rem; white-space: normal; overflow-wrap: anywhere; }
.note { margin: .5rem 0; color: var(--soft); font-size: .85rem; }
pre { margin: 0; columns: 19rem; column-gap: 2rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .8rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
mark { background: var(--mark); color: inherit; }
.wide:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
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
  .charts figure img { width: 100%; }
  .square figure img { width: 31rem; }
  .facts { grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); gap: .9rem 1rem; }
  .facts dd { font-size: 1.2rem; margin: 0; }
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
