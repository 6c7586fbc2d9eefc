"""The folders of Agriculture-Vision in every layout, its editions, and which tiles are complete."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agrivision.data.sources.source import UNDIVIDED, Problem
from agrivision.data.tile import is_key
from agrivision.errors import SourceError

SPLITS = ("train", "val", "test")
STRAY = "stray file"  # the kind of problem that costs no tile
_TILE_NAME = re.compile(r"(.+)_\d+-\d+-\d+-\d+")


@dataclass(frozen=True, kw_only=True)
class Edition:
    """The labels of one edition of the data set.

    Attributes:
        classes: scored names by id; background has no folder.
        unscored: folders that are kept but not scored.
    """

    classes: tuple[str, ...]
    unscored: tuple[str, ...] = ()

    @property
    def folders(self) -> dict[str, int]:
        """Bit in the label image by name of the class folder."""
        names = (*self.classes, *self.unscored)
        return {name: bit for bit, name in enumerate(names) if bit > 0}


EDITIONS = {
    "2020": Edition(
        classes=(
            "background",
            "cloud_shadow",
            "double_plant",
            "planter_skip",
            "standing_water",
            "waterway",
            "weed_cluster",
        )
    ),
    "2021": Edition(
        classes=(
            "background",
            "double_plant",
            "drydown",
            "endrow",
            "nutrient_deficiency",
            "planter_skip",
            "water",
            "waterway",
            "weed_cluster",
        ),
        unscored=("storm_damage",),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names of the folders, relative to the split's folder."""

    rgb: str
    nir: str
    boundaries: str
    masks: str
    labels: str

    def images_of(self, folder: Path) -> SplitFolder:
        """The images of a split's folder and the masks of validity that are there, without labels."""
        valid = (folder / self.boundaries, folder / self.masks)
        present = tuple(path for path in valid if has_images(path, ".png"))
        return SplitFolder(rgb=folder / self.rgb, nir=folder / self.nir, valid=present, classes=())


LAYOUTS = (
    Layout(rgb="images/rgb", nir="images/nir", boundaries="boundaries", masks="masks", labels="labels"),
    Layout(
        rgb="field_images/rgb",
        nir="field_images/nir",
        boundaries="field_bounds",
        masks="field_masks",
        labels="field_labels",
    ),
)


@dataclass(frozen=True, kw_only=True)
class SplitFolder:
    """Where the files of one split are.

    Attributes:
        rgb: folder of ID.jpg, three bands.
        nir: folder of ID.jpg, one band.
        valid: folders of ID.png that are on where a pixel counts: boundaries and masks.
        classes: folders of ID.png by bit in the label image; empty without labels.
    """

    rgb: Path
    nir: Path
    valid: tuple[Path, ...]
    classes: tuple[tuple[int, Path], ...]

    def files(self, key: str) -> list[Path]:
        """Every file of a tile, images first."""
        images = [folder / f"{key}.jpg" for folder in (self.rgb, self.nir)]
        masks = [*self.valid, *(folder for _, folder in self.classes)]
        return images + [folder / f"{key}.png" for folder in masks]


def find_layouts(root: Path) -> dict[str, tuple[Path, Layout]]:
    """The splits of an Agriculture-Vision folder, or UNDIVIDED alone; empty if it is none."""
    found = {name: (root / name, _layout(root / name)) for name in SPLITS if (root / name).is_dir()}
    if not any(layout for _, layout in found.values()):
        found = {UNDIVIDED: (root, _layout(root))}
    return {name: (folder, layout) for name, (folder, layout) in found.items() if layout}


def _layout(folder: Path) -> Layout | None:
    for layout in LAYOUTS:
        images = (folder / layout.rgb).parent
        if images.is_dir() or (folder / layout.boundaries).is_dir():
            return layout
    return None


def field_of(key: str) -> str:
    """The field that a tile was cut from: what stands before its four coordinates."""
    match = _TILE_NAME.fullmatch(key)
    return match[1] if match else key


def find_edition(label_folders: Iterable[Path], wanted: str | None) -> str:
    """Which edition the class folders belong to.

    Args:
        label_folders: those that exist.
        wanted: what the user says, or None to look.

    Raises:
        SourceError: no such edition, or the folders do not tell.
    """
    if wanted is not None:
        if wanted not in EDITIONS:
            raise SourceError(f"no edition {wanted!r}: there are {', '.join(EDITIONS)}")
        return wanted
    label_folders = list(label_folders)
    present = {name for folder in label_folders for name in class_folders(folder)}
    fitting = [year for year in EDITIONS if present & _only_in(year)]
    if len(fitting) == 1:
        return fitting[0]
    where = ", ".join(map(str, label_folders)) or "a copy without labels"
    what = "those of several editions" if fitting else "none that belongs to one edition alone"
    raise SourceError(
        f"the class folders in {where} ({', '.join(sorted(present)) or 'none'}) include {what}:"
        f" say which it is with --edition {' or --edition '.join(EDITIONS)}"
    )


def _only_in(year: str) -> set[str]:
    others = [EDITIONS[other].folders.keys() for other in EDITIONS if other != year]
    return set(EDITIONS[year].folders).difference(*others)


def class_folders(labels: Path) -> list[str]:
    """Names of the folders in a folder of labels, in order; none if it does not exist."""
    if not labels.is_dir():
        return []
    with os.scandir(labels) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith((".", "__")))


def open_split(
    name: str, folder: Path, layout: Layout, edition: Edition, *, assume_valid: bool
) -> tuple[SplitFolder, list[Problem]]:
    """The folders of one split, and what is wrong with its class folders.

    Raises:
        SourceError: images, labels, boundaries or masks are missing as a whole.
    """
    rgb, nir, labels = folder / layout.rgb, folder / layout.nir, folder / layout.labels
    valid = [folder / layout.boundaries, folder / layout.masks]
    require([rgb, nir])
    if assume_valid:
        valid = [path for path in valid if has_images(path, ".png")]
    require(valid, hint="; --assume_valid takes every pixel as valid")
    classes, problems = _open_classes(labels, edition)
    if not classes and name != "test":
        raise SourceError(f"{labels} has no folder of a known class: there is nothing to learn from")
    if not classes:  # a test split as the challenge gives it out
        problems = []
    return SplitFolder(rgb=rgb, nir=nir, valid=tuple(valid), classes=classes), problems


def require(folders: Sequence[Path], hint: str = "") -> None:
    """Check that folders exist and hold files of their kind.

    Raises:
        SourceError: names those that do not.
    """
    suffixes = {"rgb": ".jpg", "nir": ".jpg"}
    missing = [path for path in folders if not has_images(path, suffixes.get(path.name, ".png"))]
    if missing:
        names = " and ".join(map(str, missing))
        raise SourceError(f"no images in {names} (missing or empty){hint}")


def _open_classes(labels: Path, edition: Edition) -> tuple[tuple[tuple[int, Path], ...], list[Problem]]:
    known = edition.folders
    problems = [
        Problem(str(labels / name), "unknown class", "not a class of this edition: ignored")
        for name in class_folders(labels)
        if name not in known
    ]
    present = [(bit, labels / name) for name, bit in known.items() if has_images(labels / name, ".png")]
    absent = [name for name, bit in known.items() if (bit, labels / name) not in present]
    problems += [
        Problem(str(labels / name), "missing class", f"missing: no pixel is labelled {name}")
        for name in absent
        if name not in edition.unscored
    ]
    return tuple(present), problems


def has_images(folder: Path, suffix: str) -> bool:
    """Whether a folder holds a file of this kind."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(_is_image(entry.name, suffix) for entry in entries)


def _is_image(name: str, suffix: str) -> bool:
    return name.endswith(suffix) and not name.startswith(".")


def pair(split: SplitFolder) -> tuple[list[str], list[Problem]]:
    """The ids that have every file, in order, and a problem for each that has not."""
    folders = dict.fromkeys((split.rgb, split.nir), ".jpg") | dict.fromkeys(
        (*split.valid, *(folder for _, folder in split.classes)), ".png"
    )
    problems: list[Problem] = []
    ids: dict[Path, set[str]] = {}
    for folder, suffix in folders.items():
        ids[folder], strays = _ids(folder, suffix)
        problems += strays
    complete = set.intersection(*ids.values())
    problems += [_unpaired(key, ids, folders) for key in sorted(set.union(*ids.values()) - complete)]
    bad = sorted(key for key in complete if not is_key(key))
    problems += [
        Problem(str(split.rgb / f"{key}.jpg"), "bad name", "a name that cannot be a key: left out")
        for key in bad
    ]
    return sorted(complete.difference(bad)), problems


def _ids(folder: Path, suffix: str) -> tuple[set[str], list[Problem]]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    other = ".png" if suffix == ".jpg" else ".jpg"
    strays = [
        Problem(str(folder / name), STRAY, f"not a {suffix} file: ignored")
        for name in names
        if name.endswith(other)
    ]
    return {name.removesuffix(suffix) for name in names if name.endswith(suffix)}, strays


def _unpaired(key: str, ids: Mapping[Path, set[str]], suffixes: Mapping[Path, str]) -> Problem:
    missing = [folder for folder, present in ids.items() if key not in present]
    others = f" and so are {len(missing) - 1} other files of the tile" if len(missing) > 1 else ""
    path = missing[0] / f"{key}{suffixes[missing[0]]}"
    return Problem(str(path), "unpaired", f"missing{others}: the tile is left out")
