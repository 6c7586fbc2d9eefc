"""Styles: well-formed, every class with its name and colour, and what programs look for."""

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from agrivision.errors import NotWritable
from agrivision.maps.legend import Legend
from agrivision.maps.style import CONFIDENCE_RAMP, polygon_style, write_confidence_qml, write_qml

NAMES = ("background", "a <b> & \"c\" 'd'", "мокро", "line\nbreak \0\x1b\udcff]]>")
SHOWN = (*NAMES[:3], "line break \\x00\\x1b\\udcff]]>")
LEGEND = Legend(classes=NAMES)
COLORS = ["#303030", "#e69f00", "#cc79a7", "#009e73"]
SE, OGC = "{http://www.opengis.net/se}", "{http://www.opengis.net/ogc}"


def test_a_map_has_names_and_colours_by_value(tmp_path: Path) -> None:
    write_qml(tmp_path / "map.qml", LEGEND)
    text = (tmp_path / "map.qml").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE qgis ")
    renderer = ET.fromstring(text).find("pipe/rasterrenderer")
    assert renderer is not None
    assert (renderer.get("type"), renderer.get("band")) == ("paletted", "1")
    entries = renderer.findall("colorPalette/paletteEntry")
    assert [entry.get("value") for entry in entries] == ["0", "1", "2", "3"]
    assert tuple(entry.get("label") for entry in entries) == SHOWN
    assert [entry.get("color") for entry in entries] == COLORS
    assert {entry.get("alpha") for entry in entries} == {"255"}


def test_confidence_is_a_ramp_to_the_whole(tmp_path: Path) -> None:
    write_confidence_qml(tmp_path / "map.confidence.qml")
    renderer = ET.parse(tmp_path / "map.confidence.qml").find("pipe/rasterrenderer")
    assert renderer is not None
    assert renderer.get("type") == "singlebandpseudocolor"
    assert (renderer.get("classificationMin"), renderer.get("classificationMax")) == ("1", "255")
    shader = renderer.find("rastershader/colorrampshader")
    assert shader is not None and shader.get("colorRampType") == "INTERPOLATED"
    items = shader.findall("item")
    assert [int(item.get("value", "")) for item in items] == [value for value, _ in CONFIDENCE_RAMP]
    assert [item.get("label") for item in items] == ["0%", "25%", "50%", "75%", "100%"]


@pytest.mark.parametrize("column", ["class_id", 'odd "<column>&'])
def test_polygons_have_a_symbol_for_each_class(column: str) -> None:
    qml, sld = polygon_style(LEGEND, column)
    renderer = ET.fromstring(qml).find("renderer-v2")
    assert renderer is not None
    assert (renderer.get("type"), renderer.get("attr")) == ("categorizedSymbol", column)
    categories = renderer.findall("categories/category")
    assert tuple(category.get("label") for category in categories) == SHOWN
    symbols = {symbol.get("name"): symbol for symbol in renderer.findall("symbols/symbol")}
    for class_id, category in enumerate(categories):
        assert (category.get("value"), category.get("type")) == (str(class_id), "integer")
        properties = {
            entry.get("k"): entry.get("v") for entry in symbols[category.get("symbol")].iter("prop")
        }
        red, green, blue = LEGEND.colors[class_id]
        assert properties["outline_color"] == f"{red},{green},{blue},255"
        assert properties["color"] == f"{red},{green},{blue},140"
    rules = ET.fromstring(sld).findall(f".//{SE}Rule")
    for class_id, rule in enumerate(rules):
        assert rule.findtext(f"{SE}Description/{SE}Title") == SHOWN[class_id]
        equal = rule.find(f"{OGC}Filter/{OGC}PropertyIsEqualTo")
        assert equal is not None
        assert [part.text for part in equal] == [column, str(class_id)]
        parameters = {entry.get("name"): entry.text for entry in rule.iter(f"{SE}SvgParameter")}
        assert parameters["fill"] == parameters["stroke"] == COLORS[class_id]
    assert len(rules) == len(NAMES)


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(NotWritable, match=r"nowhere/map\.qml"):
        write_qml(tmp_path / "nowhere" / "map.qml", LEGEND)
