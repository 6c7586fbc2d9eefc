"""prepared.json: what a data set was made with, so that a shard of it can be made again.

It stands beside dataset.json and is no part of the fingerprint: two sets with the same fingerprint hold
the same bytes, however somebody came to them. Where the source was is not in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zstandard

from agrivision import __version__
from agrivision.data.parts import TIFF, geodata, kind_of
from agrivision.data.schema import Part
from agrivision.errors import DatasetError
from agrivision.json_values import parse
from agrivision.reading import read_plain
from agrivision.storage import write_atomically

FILE_NAME = "prepared.json"
_FORMAT, _VERSION = "agrivision-prepared", 1
_MOST_BYTES = 16 << 20


def made_with(parts: tuple[Part, ...]) -> dict[str, str]:
    """Versions of the programs here that the bytes of a shard with such files come from."""
    versions = {"agrivision": __version__, "zstd": ".".join(map(str, zstandard.ZSTD_VERSION))}
    if any(kind_of(part) == TIFF for part in parts):
        versions["gdal"] = str(geodata().__gdal_version__)
    return versions


def write_recipe(folder: Path, options: Mapping[str, Any], versions: Mapping[str, str]) -> None:
    """Write prepared.json into a folder, whole or not at all.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    content = {"format": _FORMAT, "version": _VERSION, "options": options, "made_with": versions}
    write_atomically(folder / FILE_NAME, (json.dumps(content, indent=2) + "\n").encode())


def read_recipe(folder: Path) -> tuple[dict[str, Any], dict[str, str]] | None:
    """Options and versions; None where the data set does not have them: older ones do not.

    Raises:
        DatasetError: the file cannot be read, or is something else.
    """
    path = folder / FILE_NAME
    try:
        content = parse(read_plain(path, _MOST_BYTES))
        if (content["format"], content["version"]) != (_FORMAT, _VERSION):
            raise ValueError("it is of another format or version")
        return dict(content["options"]), {str(k): str(v) for k, v in content["made_with"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"cannot read {path}: {error}") from None
