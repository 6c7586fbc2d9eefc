"""Charts in a page."""

from __future__ import annotations

from collections.abc import Iterable

from agrivision.charts import DARK, LIGHT, Chart
from agrivision.pages import drawing, figure

_INCH = 96  # pixels


def drawn(chart: Chart) -> str:
    """One, for light and for dark paper."""
    size = round(_INCH * chart.width), round(_INCH * chart.height)
    return drawing(chart.svg(LIGHT), chart.svg(DARK), size, chart.words)


def side_by_side(charts: Iterable[Chart]) -> str:
    """Some, as many beside one another as there is room for; empty without any."""
    figures = "".join(figure(drawn(chart)) for chart in charts)
    return f'<div class="charts">{figures}</div>' if figures else ""
