"""Finished maps → what people open: layers with styles, polygons, tables, a page."""
