"""Small Agriculture-Vision folders, written by hand with Pillow and simplejpeg."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

SIZE = 64
YEARS = {
    "2020": (
        "cloud_shadow",
        "double_plant",
        "planter_skip",
        "standing_water",
        "waterway",
        "weed_cluster",
    ),
    "2021": (
        "double_plant",
        "drydown",
        "endrow",
        "nutrient_deficiency",
        "planter_skip",
        "water",
        "waterway",
        "weed_cluster",
        "storm_damage",
    ),
}
CHALLENGE = {"images": "images", "valid": ("boundaries", "masks"), "labels": "labels"}
PAPER = {"images": "field_images", "valid": ("field_bounds", "field_masks"), "labels": "field_labels"}


def ids(field: str, tiles: int) -> list[str]:
    return [f"{field}_{64 * i}-0-{64 * i + 64}-64" for i in range(tiles)]


def _generator(*words: str) -> np.random.Generator:
    digest = hashlib.blake2b("/".join(words).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def pixels(key: str, bands: int, size: int = SIZE) -> NDArray[np.uint8]:
    return _generator(key, str(bands)).integers(0, 256, (size, size, bands), dtype=np.uint8)


def jpeg(key: str, bands: int, size: int = SIZE) -> bytes:
    colours = {"colorspace": "GRAY", "colorsubsampling": "Gray"} if bands == 1 else {}
    content: bytes = simplejpeg.encode_jpeg(pixels(key, bands, size), quality=90, **colours)
    return content


def mask(key: str, name: str, share: float, size: int = SIZE) -> NDArray[np.bool_]:
    return _generator(key, name).random((size, size)) < share


def write_png(path: Path, on: NDArray[np.bool_]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(on.astype(np.uint8) * 255).save(path)


def write_tile(
    folder: Path, key: str, *, layout: dict = CHALLENGE, year: str = "2021", labels: bool = True
) -> None:
    for name, bands in (("rgb", 3), ("nir", 1)):
        path = folder / layout["images"] / name / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(key, bands))
    for name in layout["valid"]:
        write_png(folder / name / f"{key}.png", mask(key, name, 0.9))
    for name in YEARS[year] if labels else ():
        write_png(folder / layout["labels"] / name / f"{key}.png", mask(key, name, 0.1))


def write_folder(
    root: Path,
    splits: dict[str, list[str]] | None = None,
    *,
    layout: dict = CHALLENGE,
    year: str = "2021",
) -> dict[str, list[str]]:
    """Write the splits, "" for none, and return them; `test` has no labels."""
    splits = splits or {
        "train": ids("AAA", 3) + ids("BBB", 2),
        "val": ids("CCC", 2),
        "test": ids("DDD", 1),
    }
    for split, keys in splits.items():
        for key in keys:
            write_tile(root / split, key, layout=layout, year=year, labels=split != "test")
    return splits
