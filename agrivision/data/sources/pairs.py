"""Which scene goes with which label raster: two folders of the same names, or a table."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agrivision.data.sources.guard import ALLOW_VRT, DRIVERS, VRT, is_no_path, is_raster
from agrivision.data.sources.layouts import find_layouts
from agrivision.data.sources.source import UNDIVIDED, Problem
from agrivision.data.tile import safe_name
from agrivision.errors import SourceError
from agrivision.reading import open_plain

_MOST_BYTES = 64 << 20  # of a table: hundreds of thousands of pairs
_FOLDERS = ("scenes", "labels")
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A scene and its labels.

    Attributes:
        name: the scene's stem, made fit for keys; the tiles' field.
        scene: raster file.
        label: raster file.
        split: UNDIVIDED where `prepare` decides.
    """

    name: str
    scene: Path
    label: Path
    split: str = UNDIVIDED


def find_pairs(path: Path, *, allow_vrt: bool = False) -> tuple[list[Pair], list[Problem]] | None:
    """Scenes with their labels, ordered by name, and what has no partner; None for another source.

    Args:
        path: a folder with `scenes/` and `labels/`, or a CSV file with the columns scene, label and,
            if wanted, split; its paths are relative to it.
        allow_vrt: take VRTs, too.

    Raises:
        SourceError: the table cannot be read, two scenes have the same name, or one of the two folders
            is missing.
    """
    if path.is_file() and path.suffix.lower() == ".csv":
        pairs, problems = _from_table(path, allow_vrt)
    elif (path / "scenes").is_dir() and (path / "labels").is_dir():
        pairs, problems = _from_folders(path / "scenes", path / "labels", allow_vrt)
    else:
        _refuse_half(path)
        return None
    return sorted(_distinct(pairs), key=lambda pair: pair.name), problems


def _refuse_half(path: Path) -> None:
    """Say what is missing where somebody clearly means scenes and labels.

    Raises:
        SourceError: one of the two folders is there alone or has another case, or is what was given.
    """
    if not path.is_dir() or find_layouts(path):
        return
    above = path.absolute().parent
    if path.absolute().name in _FOLDERS and (above / "scenes").is_dir():
        raise SourceError(
            f"{path} is one of the two folders of a source: give the folder above, {above}"
        )
    there = sorted(child.name for child in path.iterdir() if child.is_dir())
    alike = [name for name in there if name.lower() in _FOLDERS]
    missing = [name for name in _FOLDERS if name not in there]
    if not alike:
        return
    otherwise = "".join(f"; call {name} {name.lower()}" for name in alike if name not in _FOLDERS)
    found = " and ".join(f"{name}/" for name in alike)
    lacking = " and no ".join(f"{name}/" for name in missing)
    raise SourceError(f"{path} has {found} but no {lacking}: scenes and labels go together{otherwise}")


def _distinct(pairs: list[Pair]) -> list[Pair]:
    seen: dict[str, Path] = {}
    for pair in pairs:
        if pair.name in seen:
            raise SourceError(
                f"{seen[pair.name]} and {pair.scene} have the same name {pair.name!r} for their tiles:"
                " rename one"
            )
        seen[pair.name] = pair.scene
    return pairs


def _from_folders(scenes: Path, labels: Path, allow_vrt: bool) -> tuple[list[Pair], list[Problem]]:
    scene_files, problems = _rasters(scenes, allow_vrt)
    label_files, more = _rasters(labels, allow_vrt)
    problems += more
    for stem in sorted(scene_files.keys() ^ label_files.keys()):
        there, lacking = (scene_files, "label") if stem in scene_files else (label_files, "scene")
        what = f"has no {lacking} raster of the same name: left out"
        problems.append(Problem(str(there[stem]), "unpaired", what))
    pairs = [
        Pair(name=safe_name(stem), scene=path, label=label_files[stem])
        for stem, path in scene_files.items()
        if stem in label_files
    ]
    return pairs, problems


def _rasters(folder: Path, allow_vrt: bool) -> tuple[dict[str, Path], list[Problem]]:
    files: dict[str, Path] = {}
    problems = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            continue
        if is_raster(path, allow_vrt=allow_vrt):
            if path.stem in files:
                raise SourceError(f"{files[path.stem]} and {path} have the same name: rename one")
            files[path.stem] = path
        elif path.suffix.lower() == VRT:
            problems.append(_refusal(path))
    return files, problems


def _refusal(path: Path) -> Problem:
    if path.suffix.lower() == VRT:
        return Problem(str(path), "format", f"a VRT may lead to other files: left out; {ALLOW_VRT}")
    formats = ", ".join(suffix.lstrip(".") for suffix in DRIVERS)
    return Problem(str(path), "format", f"not one of the formats {formats}: left out")


def _from_table(table: Path, allow_vrt: bool) -> tuple[list[Pair], list[Problem]]:
    try:
        size = table.stat().st_size
        if size > _MOST_BYTES:
            raise SourceError(f"{table} has {size} bytes: a table of pairs has {_MOST_BYTES} at most")
        with open_plain(table) as content, io.TextIOWrapper(content, "utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except (OSError, UnicodeError, csv.Error) as error:
        raise SourceError(f"cannot read {table}: {error}") from None
    columns = list(rows[0]) if rows else []
    if not {"scene", "label"} <= set(columns):
        found = ", ".join(map(str, columns)) or "nothing"
        raise SourceError(f"{table} needs the columns scene, label and perhaps split; it has {found}")
    pairs, problems = [], []
    for line, row in enumerate(rows, 2):
        pair = _pair(table, line, row)
        found_problems = [
            *_not_usable(pair.scene, allow_vrt),
            *_not_usable(pair.label, allow_vrt),
        ]
        problems += found_problems
        if not found_problems:
            pairs.append(pair)
    if len({pair.split == UNDIVIDED for pair in pairs}) > 1:
        raise SourceError(f"{table} names the split of some scenes only: name all, or none")
    return pairs, problems


def _pair(table: Path, line: int, row: Mapping[str, str | None]) -> Pair:
    scene, label, split = ((row.get(name) or "").strip() for name in ("scene", "label", "split"))
    for value in (scene, label):
        if is_no_path(value):
            raise SourceError(f"{table}, line {line}: {value!r} is not the path of a file")
    if split and not _SPLIT_NAME.fullmatch(split):
        raise SourceError(
            f"{table}, line {line}: {split!r} cannot name a split; use letters, digits, _ and -"
        )
    return Pair(
        name=safe_name(Path(scene).stem),
        scene=table.parent / scene,
        label=table.parent / label,
        split=split or UNDIVIDED,
    )


def _not_usable(path: Path, allow_vrt: bool) -> list[Problem]:
    if not is_raster(path, allow_vrt=allow_vrt):
        return [_refusal(path)]
    try:
        there = path.is_file()
    except OSError:  # a name that is too long for any file
        there = False
    return [] if there else [Problem(str(path), "unpaired", "missing: the scene is left out")]
