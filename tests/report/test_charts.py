"""Charts: the same bytes, whatever texts they have, and nothing lost by thinning."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from agrivision.charts import (
    DARK,
    LIGHT,
    SERIES,
    Chart,
    Line,
    contrast,
    heat_map,
    histogram,
    legible,
    line_chart,
    spread,
    thinned,
)
from agrivision.monitor.pictures import PALETTE
from tests.report.made import EVIL

SVG = "{http://www.w3.org/2000/svg}"


def texts(chart: Chart) -> list[str]:
    return [
        "".join(element.itertext()).strip() for element in ET.fromstring(chart.svg()).iter(f"{SVG}text")
    ]


def curve(name: str = "loss", points: int = 50) -> Chart:
    x = np.arange(1.0, points + 1)
    return line_chart("c", "w", [Line(name=name, x=x, y=1 / x, color=SERIES[0])], x="Step", y="Loss")


@pytest.mark.parametrize("theme", [LIGHT, DARK])
@pytest.mark.parametrize("outlines", [False, True])
def test_the_same_chart_has_the_same_bytes(theme: object, outlines: bool) -> None:
    first, second = (curve().svg(theme, outlines=outlines) for _ in range(2))  # type: ignore[arg-type]
    assert first == second
    assert b"<dc:date" not in first


def test_texts_of_any_content_are_texts() -> None:
    name = EVIL[:20]
    made = [
        curve(name),
        heat_map("h", "w", np.eye(2), [name, "b"], ["a", name], row_title="r", column_title="c"),
        histogram("g", "w", [0, 1, 2], [[1, 2]], names=[name], colors=SERIES[:1], x="x", y="y"),
    ]
    for chart in made:
        content = chart.svg()
        assert name in texts(chart)
        assert b"<script" not in content
        assert not [e for e in ET.fromstring(content).iter() if e.tag == f"{SVG}script"]
    assert len(curve("$\\frac{").svg(outlines=True)) > 0


def test_a_heat_map_has_the_numbers() -> None:
    values = np.array([[0.914, 0.004], [0.086, np.nan]])
    chart = heat_map("h", "w", values, ["a", "b"], ["c", "d"], row_title="r", column_title="t")
    assert set(texts(chart)) == {"91", "<1", "9", "a", "b", "c", "d", "r", "t"}


def test_thinning_keeps_the_extremes_and_the_sum() -> None:
    y = np.random.default_rng(0).normal(size=100_003)
    y[51_234], y[777] = 100.0, -100.0
    x = np.arange(len(y), dtype=np.float64)
    middles, means, low, high = thinned(x, y, 200)
    assert len(middles) == len(means) == len(low) == len(high) == 200
    assert (low.min(), high.max()) == (-100.0, 100.0)
    sizes = np.diff([*np.linspace(0, len(y), 200, endpoint=False).astype(int), len(y)])
    assert (means * sizes).sum() == pytest.approx(y.sum())
    assert (np.diff(middles) > 0).all()


def test_a_long_line_takes_no_more_room_than_a_short_one() -> None:
    assert len(curve(points=100_000).svg()) < 40_000


def test_few_points_stay_as_they_are() -> None:
    x, y = np.array([1.0, 2.0, 4.0]), np.array([3.0, 1.0, 2.0])
    middles, means, low, high = thinned(x, y, 200)
    assert middles.tolist() == x.tolist()
    assert means.tolist() == low.tolist() == high.tolist() == y.tolist()


def test_nothing_and_what_is_not_finite_can_be_drawn() -> None:
    nothing = Line(name="none", x=np.empty(0), y=np.empty(0), color=SERIES[0])
    gaps = Line(name="gaps", x=np.arange(3.0), y=np.array([1, np.nan, 2]), color=SERIES[1])
    for lines in ([], [nothing], [nothing, gaps]):
        shown = texts(line_chart("c", "w", lines, x="x", y="y"))
        assert ("gaps" in shown) == (gaps in lines)
        assert "none" not in shown


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_every_colour_is_seen_on_the_paper(theme: object) -> None:
    for color in {*SERIES, *PALETTE}:
        shade = legible(color, theme)  # type: ignore[arg-type]
        assert contrast(shade, theme.paper) >= theme.contrast  # type: ignore[attr-defined]
    assert legible(SERIES[0], LIGHT) == SERIES[0]


def test_names_are_moved_apart_and_stay_in_order() -> None:
    places = spread([0.1, 0.11, 0.12, 0.9], 0.1, 0.0, 1.0)
    assert places == pytest.approx([0.01, 0.11, 0.21, 0.9])
    crowded = spread([0.5] * 21, 0.1, 0.0, 1.0)
    assert np.diff(crowded) == pytest.approx(0.05)
    assert (min(crowded), max(crowded)) == pytest.approx((0.0, 1.0))
