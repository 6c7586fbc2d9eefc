"""Charts as SVG, in one style: for pages and for papers.

A chart is as wide as a column of a journal, so that on a phone it is read at its own size. Lines are
named where they end, not in a legend. The same chart has the same bytes each time, in light and in
dark. No text is taken for mathematics or for markup.
"""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from agrivision.errors import one_line

Color = tuple[int, int, int]  # red, green, blue, 0 to 255
Numbers = NDArray[np.float64]

# Okabe and Ito's colours, which people of any colour vision tell apart.
SERIES: tuple[Color, ...] = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
    (60, 60, 60),
)

_WIDTH, _HEIGHT = 3.5, 2.35  # inches: a column of most journals
_LEFT, _BOTTOM, _TOP = 0.5, 0.42, 0.3  # inches around the axes
_TEXT, _SMALL = 7.5, 6.5  # points
_POINTS = 200  # of a line; one with more is drawn as the mean and the range of so many stretches
_TAG = re.compile(rb"<[^<>]*>")
_DIGITS = re.compile(rb"(\d\.\d{3})\d+")  # a thousandth of a point is finer than any paper
_LONGEST = 22  # characters of a name in a chart

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells users of its cache of fonts


@dataclass(frozen=True, kw_only=True)
class Theme:
    """What a chart is drawn on, and with.

    Attributes:
        paper: behind it; the chart itself has no ground.
        ink: of texts and of what counts.
        soft: of axes and what is beside the point.
        faint: of grid lines and grounds.
        contrast: of a line against the paper at least; WCAG 2 wants 3 for what is no text.
    """

    paper: Color
    ink: Color
    soft: Color
    faint: Color
    contrast: float


LIGHT = Theme(
    paper=(255, 255, 255), ink=(29, 36, 32), soft=(93, 106, 98), faint=(226, 229, 222), contrast=3.0
)
DARK = Theme(
    paper=(20, 24, 22), ink=(228, 232, 227), soft=(152, 165, 157), faint=(48, 55, 51), contrast=4.5
)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart that can be drawn.

    Attributes:
        name: of its file, without an end.
        words: what it shows, for those who cannot see it.
        width: in inches.
        height: the same.
        draw: on a figure of that size.
    """

    name: str
    words: str
    width: float
    height: float
    draw: Callable[[Figure, Theme], None]

    def svg(self, theme: Theme = LIGHT, *, outlines: bool = False) -> bytes:
        """The content of an SVG file: the same bytes for the same chart.

        Args:
            theme: what it will stand on.
            outlines: draw texts as outlines: a file for papers, which needs no font and is larger.
        """
        with mpl.rc_context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a sign that the font has not is drawn as a box
            mpl.rcdefaults()  # whatever a file of settings in this folder may say
            settings: Any = _settings(theme) | {"svg.fonttype": "path" if outlines else "none"}
            mpl.rcParams.update(settings)
            figure = Figure(figsize=(self.width, self.height))
            FigureCanvasSVG(figure)
            self.draw(figure, theme)
            content = io.BytesIO()
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(content, format="svg", metadata=nothing, transparent=True)
        return _TAG.sub(lambda tag: _DIGITS.sub(rb"\1", tag[0]), content.getvalue())


def _settings(theme: Theme) -> dict[str, Any]:
    ink, soft = _unit(theme.ink), _unit(theme.soft)
    return {
        "svg.hashsalt": "agrivision",
        "text.parse_math": False,
        "font.family": ["DejaVu Sans", "Verdana", "sans-serif"],  # of the same widths
        "font.size": _TEXT,
        "text.color": ink,
        "axes.edgecolor": soft,
        "axes.labelcolor": ink,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.labelsize": _TEXT,
        "axes.axisbelow": True,
        "xtick.color": soft,
        "ytick.color": soft,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "xtick.labelsize": _SMALL,
        "ytick.labelsize": _SMALL,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.major.size": 2.5,
        "ytick.major.size": 2.5,
        "lines.linewidth": 1.1,
        "lines.solid_capstyle": "round",
        "lines.solid_joinstyle": "round",
    }


@dataclass(frozen=True, kw_only=True)
class Line:
    """One quantity over another.

    Attributes:
        name: written where it ends; empty for none.
        x: increasing; what is not finite is left out, in `y` as well.
        y: as many.
        color: made darker or lighter until it is seen on the paper; None takes the ink.
        strong: a thicker line, for the one that counts.
        dashed: for one that belongs to another of the same colour.
        dots: mark the points, where there are few.
    """

    name: str
    x: Numbers
    y: Numbers
    color: Color | None
    strong: bool = False
    dashed: bool = False
    dots: bool = False


def line_chart(
    name: str,
    words: str,
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    marks: Sequence[float] = (),
    gaps: Sequence[tuple[float, float]] = (),
    low: float | None = None,
    high: float | None = None,
) -> Chart:
    """Lines over a common axis.

    Args:
        name: of the file.
        words: for those who cannot see it.
        lines: back to front; those without a point are left out.
        x: what the lower axis is, with its unit.
        y: what the other is, with its unit.
        marks: places on the lower axis for thin vertical lines.
        gaps: stretches of the lower axis where nothing was: shaded.
        low: where the other axis begins; None: a little below the lowest.
        high: where it ends.
    """

    def draw(figure: Figure, theme: Theme) -> None:
        seen = [line for line in map(_finite, lines) if len(line.x)]
        right = 0.12 + max((_width(line.name) for line in seen), default=0.0)
        axes = _axes(figure, theme, right=right, x=x, y=y)
        for start, end in gaps:
            axes.axvspan(start, end, color=_unit(theme.faint), linewidth=0)
        for place in marks:
            axes.axvline(place, color=_unit(theme.soft), linewidth=0.5, dashes=(2, 2), zorder=1)
        for line in seen:
            _draw_line(axes, line, theme)
        _limits(axes, seen, low, high)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(_number))
        _name_ends(axes, seen, theme)

    return Chart(name=name, words=words, width=_WIDTH, height=_HEIGHT, draw=draw)


def histogram(
    name: str,
    words: str,
    edges: Sequence[float],
    shares: Sequence[Sequence[float]],
    *,
    names: Sequence[str],
    colors: Sequence[Color],
    x: str,
    y: str,
) -> Chart:
    """Histograms over the same bins as outlines, each named where it is highest.

    Args:
        name: of the file.
        words: for those who cannot see it.
        edges: of the bins, one more than there are bins.
        shares: of each histogram, by bin.
        names: of the histograms.
        colors: of each.
        x: what the bins are of, with its unit.
        y: what the heights are.
    """

    def draw(figure: Figure, theme: Theme) -> None:
        axes = _axes(figure, theme, right=0.15, x=x, y=y)
        for share, title, color in zip(shares, names, colors, strict=True):
            shade = _unit(legible(color, theme))
            axes.stairs(share, edges, color=shade, linewidth=1.0)
            if len(share):
                top = int(np.argmax(share))
                place = ((edges[top] + edges[top + 1]) / 2, share[top])
                axes.annotate(
                    shortened(title), place, (0, 2), textcoords="offset points", ha="center",
                    fontsize=_SMALL, color=shade,
                )  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.set_xlim(edges[0], edges[-1])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(_number))

    return Chart(name=name, words=words, width=_WIDTH, height=_HEIGHT, draw=draw)


def heat_map(
    name: str,
    words: str,
    values: Numbers,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    row_title: str,
    column_title: str,
    color: Color = SERIES[0],
) -> Chart:
    """Shares as a field of squares, each with its number in per cent; 0 is left empty.

    Args:
        name: of the file.
        words: for those who cannot see it.
        values: (rows, columns), 0 to 1; NaN where there is nothing to divide by.
        rows: their names, from above.
        columns: their names.
        row_title: what the rows are.
        column_title: what the columns are.
        color: of 1.
    """
    cell = 0.37
    left = 0.2 + max(map(_width, rows), default=0.0)
    top = 0.34 + 0.72 * max(map(_width, columns), default=0.0)
    more = 0.72 * max((_width(text) - cell * i for i, text in enumerate(columns[::-1])), default=0.0)
    width = left + cell * len(columns) + max(0.12, more)
    height = top + cell * len(rows) + 0.08

    def draw(figure: Figure, theme: Theme) -> None:
        box = (left / width, 0.08 / height, cell * len(columns) / width, cell * len(rows) / height)
        axes = figure.add_axes(box)
        ends = [_unit(_mix(theme.paper, theme.faint, 0.35)), _unit(legible(color, theme))]
        shades = LinearSegmentedColormap.from_list("shares", ends)
        axes.pcolormesh(
            np.nan_to_num(values), cmap=shades, vmin=0, vmax=1, edgecolors=[_unit(theme.paper)],
            linewidth=0.8,
        )  # fmt: skip
        axes.invert_yaxis()
        for (row, column), value in np.ndenumerate(values):
            if value > 0:
                ground: Color = tuple(round(255 * part) for part in shades(float(value))[:3])  # type: ignore[assignment]
                text = "<1" if value < 0.005 else f"{100 * value:.0f}"
                ink = max((theme.ink, theme.paper), key=lambda shade: contrast(shade, ground))
                axes.text(
                    column + 0.5, row + 0.53, text, ha="center", va="center", fontsize=_SMALL,
                    color=_unit(ink),
                )  # fmt: skip
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set_xticks(np.arange(len(columns)) + 0.5, [shortened(text) for text in columns])
        for label in axes.get_xticklabels():
            label.set(rotation=45, ha="left", rotation_mode="anchor")
        axes.set_yticks(np.arange(len(rows)) + 0.5, [shortened(text) for text in rows])
        axes.tick_params(length=0, pad=2)
        axes.spines[:].set_visible(False)
        figure.text(0.05 / width, 1 - 0.05 / height, column_title, ha="left", va="top")
        middle = (0.08 + cell * len(rows) / 2) / height
        figure.text(0.05 / width, middle, row_title, ha="left", va="center", rotation=90)

    return Chart(name=name, words=words, width=width, height=height, draw=draw)


def outlines(
    name: str,
    words: str,
    shapes: Sequence[Numbers],
    names: Sequence[str],
    colors: Sequence[Color],
    *,
    x: str,
    y: str,
    stretch: float = 1.0,
) -> Chart:
    """Groups of polygons where they lie, each group named once, under the chart.

    Args:
        name: of the file.
        words: for those who cannot see it.
        shapes: of each group (polygons, corners, 2), x and y.
        names: of the groups.
        colors: of each.
        x: what it is, with its unit.
        y: the same.
        stretch: length of a unit of y in units of x.
    """
    low, high = (
        np.min([each.min((0, 1)) for each in shapes], 0),
        np.max([each.max((0, 1)) for each in shapes], 0),
    )
    wide, tall = np.maximum(high - low, 1e-9) * (1.0, stretch)
    across = _WIDTH - _LEFT - 0.15
    height = _TOP + _BOTTOM + 0.25 + min(across, max(0.6, across * tall / wide))

    def draw(figure: Figure, theme: Theme) -> None:
        axes = _axes(figure, theme, right=0.15, x=x, y=y)
        axes.set_position(_above(axes, 0.25 / height))
        for group, color in zip(shapes, colors, strict=True):
            shade = legible(color, theme)
            drawn = PolyCollection(list(group), linewidths=0.6)
            drawn.set_facecolor((*_unit(shade), 0.25))
            drawn.set_edgecolor(_unit(shade))
            axes.add_collection(drawn)
        axes.set_aspect(stretch, adjustable="datalim")
        axes.autoscale_view()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(3))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.7g}"))
        left = _LEFT
        for text, color in zip(names, colors, strict=True):
            ink = _unit(legible(color, theme))
            figure.text(left / _WIDTH, 0.05 / height, shortened(text), color=ink, fontsize=_SMALL)
            left += _width(text) + 0.15

    return Chart(name=name, words=words, width=_WIDTH, height=height, draw=draw)


def _above(axes: Axes, share: float) -> tuple[float, float, float, float]:
    """The place of axes that leave a share of the figure free beneath."""
    x, y, width, height = axes.get_position().bounds
    return x, y + share, width, height - share


def thinned(x: Numbers, y: Numbers, points: int = _POINTS) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """A long line in so many stretches.

    Args:
        x: finite.
        y: as many, finite.
        points: stretches at most, each of the same number of points but for one.

    Returns:
        For each stretch the mean of `x`, and the mean, the least and the greatest of `y`.
    """
    starts = np.linspace(0, len(x), min(points, len(x)), endpoint=False).astype(np.int64)
    counts = np.diff([*starts, len(x)])
    return (
        np.add.reduceat(x, starts) / counts,
        np.add.reduceat(y, starts) / counts,
        np.minimum.reduceat(y, starts),
        np.maximum.reduceat(y, starts),
    )


def shortened(name: str) -> str:
    """A name as a chart has room for it."""
    name = one_line(name)
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def legible(color: Color, theme: Theme) -> Color:
    """A colour, or the nearest shade of it that is seen on a theme's paper."""
    end = (0, 0, 0) if _luminance(theme.paper) > 0.18 else (255, 255, 255)
    for share in np.linspace(0, 1, 51):
        shade = _mix(color, end, float(share))
        if contrast(shade, theme.paper) >= theme.contrast:
            return shade
    return end


def contrast(one: Color, other: Color) -> float:
    """The contrast of two colours as WCAG 2 has it, 1 to 21."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: Color) -> float:
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in _unit(color)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _mix(one: Color, other: Color, share: float) -> Color:
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _unit(color: Color) -> tuple[float, float, float]:
    return color[0] / 255, color[1] / 255, color[2] / 255


def _axes(figure: Figure, theme: Theme, *, x: str, y: str, right: float, left: float = _LEFT) -> Axes:
    """Axes with their title above and room at their right, in inches."""
    width, height = figure.get_size_inches()
    box = (
        left / width,
        _BOTTOM / height,
        (width - left - right) / width,
        (height - _BOTTOM - _TOP) / height,
    )
    axes = figure.add_axes(box)
    axes.grid(axis="y" if y else "x", color=_unit(theme.faint), linewidth=0.5)
    axes.set_xlabel(x, labelpad=3)
    figure.text(0.03 / width, 1 - 0.06 / height, y, ha="left", va="top")
    return axes


def _finite(line: Line) -> Line:
    good = np.isfinite(line.x) & np.isfinite(line.y)
    return Line(**(vars(line) | {"x": line.x[good], "y": line.y[good]}))


def _draw_line(axes: Axes, line: Line, theme: Theme) -> None:
    shade = _unit(_shade(line, theme))
    x, y = line.x, line.y
    if len(x) > _POINTS:
        x, y, low, high = thinned(x, y)
        axes.fill_between(
            x, low, high, color=_unit(_mix(theme.paper, _shade(line, theme), 0.25)), linewidth=0
        )
    axes.plot(
        x,
        y,
        color=shade,
        linewidth=1.7 if line.strong else 1.0,
        linestyle=(0, (3, 1.5)) if line.dashed else "-",
        marker="o" if len(x) == 1 or (line.dots and len(x) <= 40) else None,
        markersize=2.6 if line.strong else 2.0,
        zorder=3 if line.strong else 2,
    )


def _shade(line: Line, theme: Theme) -> Color:
    return theme.ink if line.color is None else legible(line.color, theme)


def _limits(axes: Axes, lines: Sequence[Line], low: float | None, high: float | None) -> None:
    least = min((float(line.y.min()) for line in lines), default=0.0)
    most = max((float(line.y.max()) for line in lines), default=1.0)
    room = 0.05 * (most - least) or 0.05 * abs(most) or 0.5
    axes.set_ylim(least - room if low is None else low, most + room if high is None else high)
    starts = [float(line.x[0]) for line in lines]
    ends = [float(line.x[-1]) for line in lines]
    if lines and min(starts) < max(ends):
        axes.set_xlim(min(0.0, *starts), max(ends))


def _name_ends(axes: Axes, lines: Sequence[Line], theme: Theme) -> None:
    """Write the lines' names beside their ends, moved apart where they would lie on one another."""
    named = sorted((line for line in lines if line.name), key=lambda line: float(line.y[-1]))
    bottom, top = axes.get_ylim()
    inches = axes.get_position().height * axes.figure.get_size_inches()[1]  # type: ignore[union-attr]
    unit = (top - bottom) / inches
    wanted = [min(max(float(line.y[-1]), bottom), top) for line in named]
    places = spread(wanted, 0.115 * unit, bottom, top)
    width = axes.figure.get_size_inches()[0]  # type: ignore[union-attr]
    beside = 1 + 0.1 / (axes.get_position().width * width)
    for line, place, at in zip(named, places, wanted, strict=True):
        shade = _unit(_shade(line, theme))
        arrow = {"arrowstyle": "-", "color": shade, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 0}
        axes.annotate(
            shortened(line.name),
            xy=(float(line.x[-1]), at),
            xytext=(beside, place),
            textcoords=("axes fraction", "data"),
            va="center",
            fontsize=_SMALL,
            fontweight="bold" if line.strong else "normal",
            color=_unit(theme.ink),
            arrowprops=arrow | {"relpos": (0, 0.5)},
            annotation_clip=False,
        )


def spread(wanted: Sequence[float], least: float, bottom: float, top: float) -> list[float]:
    """Places near those wanted, in the same order and at least so far from one another.

    Args:
        wanted: increasing.
        least: distance of two neighbours; where they do not all fit, less.
        bottom: of where they may be.
        top: likewise.
    """
    if len(wanted) > 1:
        least = min(least, (top - bottom) / (len(wanted) - 1))
    groups: list[tuple[float, int]] = []  # middle and size of runs that touch one another
    for place in wanted:
        middle, size = place, 1
        while groups:
            before, count = groups[-1]
            if middle - before >= least * (size + count) / 2:
                break
            groups.pop()
            middle, size = (middle * size + before * count) / (size + count), size + count
        half = least * (size - 1) / 2
        groups.append((min(max(middle, bottom + half), top - half), size))
    return [middle + least * (i - (size - 1) / 2) for middle, size in groups for i in range(size)]


def _width(name: str) -> float:
    """Inches that a name takes in a chart, with the space before it."""
    if not name:
        return 0.0
    font = FontProperties(family="DejaVu Sans", size=_SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        width, _, _ = text_to_path.get_text_width_height_descent(shortened(name), font, ismath=False)
    return float(width) / 72 + 0.14


def _number(value: float, _: object = None) -> str:
    """A number on an axis: 0.25, 1,000, 20k, 3M."""
    size = abs(value)
    if size >= 1e9 or (0 < size < 1e-3):
        return f"{value:.2g}"
    if size >= 1e4:
        unit, letter = (1e6, "M") if size >= 1e6 else (1e3, "k")
        return f"{value / unit:.4g}{letter}"
    if size >= 1 and math.isclose(value, round(value)):
        return f"{round(value):,}"
    return f"{value:.3g}"
