"""Styles for maps and polygons, so that a GIS shows names and colours without being told.

QGIS takes the style of `STEM.tif` from `STEM.qml` beside it. The style of polygons is text for the
table `layer_styles` of a GeoPackage: QML, and SLD (OGC 05-078r4) for others.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET  # nosec B405 - written here, never parsed

from agrivision.errors import one_line
from agrivision.maps.legend import Legend
from agrivision.monitor.pictures import Color
from agrivision.pages import hexadecimal
from agrivision.storage import write_atomically

CONFIDENCE_RAMP: tuple[
    tuple[int, Color], ...
] = (  # value in the file; viridis (CC0), five of its stops
    (1, (68, 1, 84)),
    (64, (59, 82, 139)),
    (128, (33, 145, 140)),
    (191, (94, 201, 98)),
    (255, (253, 231, 37)),
)
_QGIS = "3.16.0"  # the oldest that it is written for; newer ones convert what they changed
_DOCTYPE = "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"
_OPACITY = 0.55  # of a polygon's inside: the scene beneath stays visible
_OUTLINE = "0.3"  # mm
_OUTLINE_PIXELS = "1"
_NAMESPACES = {
    "xmlns": "http://www.opengis.net/sld",
    "xmlns:ogc": "http://www.opengis.net/ogc",
    "xmlns:se": "http://www.opengis.net/se",
}


def write_qml(target: Path, legend: Legend) -> None:
    """Write the style of a map of class ids: a colour and a name for each value.

    Args:
        target: `STEM.qml` beside `STEM.tif`.
        legend: of the map.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    root, renderer = _raster("paletted")
    palette = ET.SubElement(renderer, "colorPalette")
    for class_id, (name, color) in enumerate(zip(legend.classes, legend.colors, strict=True)):
        about = {"value": str(class_id), "label": one_line(name), "color": hexadecimal(color)}
        ET.SubElement(palette, "paletteEntry", {**about, "alpha": "255"})
    write_atomically(target, _text(root).encode())


def write_confidence_qml(target: Path) -> None:
    """Write the style of a confidence layer: a ramp from 0 to 100 %.

    Args:
        target: `STEM.confidence.qml` beside `STEM.confidence.tif`.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    root, renderer = _raster("singlebandpseudocolor")
    (least, _), *_, (most, _) = CONFIDENCE_RAMP
    renderer.attrib.update(classificationMin=str(least), classificationMax=str(most))
    about = {"colorRampType": "INTERPOLATED", "classificationMode": "1", "clip": "0"}
    shader = ET.SubElement(ET.SubElement(renderer, "rastershader"), "colorrampshader", about)
    shader.attrib.update(minimumValue=str(least), maximumValue=str(most))
    for value, color in CONFIDENCE_RAMP:
        entry = {"value": str(value), "label": f"{value / most:.0%}", "color": hexadecimal(color)}
        ET.SubElement(shader, "item", {**entry, "alpha": "255"})
    write_atomically(target, _text(root).encode())


def polygon_style(legend: Legend, column: str = "class_id") -> tuple[str, str]:
    """The style of polygons: a colour and a name for each value of a column.

    Args:
        legend: of the map that the polygons are of.
        column: integer column with the class ids.

    Returns:
        QML and SLD 1.1, both without an XML declaration.
    """
    return _polygon_qml(legend, column), _polygon_sld(legend, column)


def _raster(kind: str) -> tuple[ET.Element, ET.Element]:
    """A style of a raster layer, and the renderer of the first band in it."""
    root = ET.Element("qgis", version=_QGIS, styleCategories="Symbology")
    pipe = ET.SubElement(root, "pipe")
    about = {"type": kind, "band": "1", "opacity": "1", "alphaBand": "-1", "nodataColor": ""}
    renderer = ET.SubElement(pipe, "rasterrenderer", about)
    ET.SubElement(renderer, "rasterTransparency")
    ET.SubElement(root, "blendMode").text = "0"
    return root, renderer


def _polygon_qml(legend: Legend, column: str) -> str:
    root = ET.Element("qgis", version=_QGIS, styleCategories="Symbology")
    about = {"type": "categorizedSymbol", "attr": one_line(column), "symbollevels": "0"}
    renderer = ET.SubElement(root, "renderer-v2", about)
    categories, symbols = (ET.SubElement(renderer, name) for name in ("categories", "symbols"))
    for class_id, (name, color) in enumerate(zip(legend.classes, legend.colors, strict=True)):
        number = str(class_id)
        category = {"value": number, "type": "integer", "symbol": number, "render": "true"}
        ET.SubElement(categories, "category", {**category, "label": one_line(name)})
        symbol = {"type": "fill", "name": number, "alpha": "1", "clip_to_extent": "1"}
        place = ET.SubElement(symbols, "symbol", symbol)
        layer = ET.SubElement(place, "layer", {"class": "SimpleFill", "enabled": "1"})
        _add_fill(layer, color)
    ET.SubElement(root, "blendMode").text = "0"
    return _text(root)


def _add_fill(layer: ET.Element, color: Color) -> None:
    """A translucent inside, and an outline of the same colour."""
    properties = {
        "color": ",".join(map(str, (*color, round(_OPACITY * 255)))),
        "outline_color": ",".join(map(str, (*color, 255))),
        "outline_style": "solid",
        "outline_width": _OUTLINE,
        "outline_width_unit": "MM",
        "style": "solid",
    }
    for key, value in properties.items():  # as `prop`, which old and new versions read
        ET.SubElement(layer, "prop", k=key, v=value)


def _polygon_sld(legend: Legend, column: str) -> str:
    root = ET.Element("StyledLayerDescriptor", _NAMESPACES, version="1.1.0")
    layer = ET.SubElement(root, "NamedLayer")
    ET.SubElement(layer, "se:Name").text = "classes"
    style = ET.SubElement(ET.SubElement(layer, "UserStyle"), "se:FeatureTypeStyle")
    for class_id, (name, color) in enumerate(zip(legend.classes, legend.colors, strict=True)):
        rule = ET.SubElement(style, "se:Rule")
        ET.SubElement(rule, "se:Name").text = str(class_id)
        ET.SubElement(ET.SubElement(rule, "se:Description"), "se:Title").text = one_line(name)
        equal = ET.SubElement(ET.SubElement(rule, "ogc:Filter"), "ogc:PropertyIsEqualTo")
        ET.SubElement(equal, "ogc:PropertyName").text = one_line(column)
        ET.SubElement(equal, "ogc:Literal").text = str(class_id)
        _add_symbol(rule, hexadecimal(color))
    return ET.tostring(root, encoding="unicode")


def _add_symbol(rule: ET.Element, color: str) -> None:
    symbol = ET.SubElement(rule, "se:PolygonSymbolizer")
    inside, outline = (ET.SubElement(symbol, f"se:{name}") for name in ("Fill", "Stroke"))
    for part, name, value in (
        (inside, "fill", color),
        (inside, "fill-opacity", str(_OPACITY)),
        (outline, "stroke", color),
        (outline, "stroke-width", _OUTLINE_PIXELS),
    ):
        ET.SubElement(part, "se:SvgParameter", name=name).text = value


def _text(root: ET.Element) -> str:
    ET.indent(root)
    return _DOCTYPE + ET.tostring(root, encoding="unicode") + "\n"
