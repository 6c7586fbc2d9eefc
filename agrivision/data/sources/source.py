"""What `prepare` needs to know of a source, whatever its kind, and how a source names a problem."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from agrivision.data.schema import Part
from agrivision.data.tile import Tile
from agrivision.errors import SourceError, one_line
from agrivision.reading import read_plain

Window = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels, ends excluded

_MOST_BYTES = 1 << 30  # of an image file of one tile; larger ones are scenes, read window by window

UNDIVIDED = ""  # name of the only split of a source that has none of its own


class Problem(NamedTuple):
    """Something in a source, or in a data set, that is not as it should be.

    Attributes:
        path: the file or folder.
        kind: what problems are counted by, for example `unpaired`.
        what: the rest of the sentence, with its consequence.
    """

    path: str
    kind: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


class Flaw(Exception):
    """A problem that costs one tile; caught where tiles are read, never shown as it is.

    Attributes:
        problem: the same, with its consequence for a data set that is being prepared.
    """

    def __init__(self, path: Path | str, kind: str, what: str) -> None:
        what = one_line(what)
        super().__init__(f"{path}: {what}")
        self.problem = Problem(str(path), kind, f"{what}: left out")


def content_of(path: Path | str, most: int = _MOST_BYTES) -> bytes:
    """What is in a small file of a tile.

    Args:
        path: of the file.
        most: bytes that it may have.

    Raises:
        Flaw: it cannot be read, is no plain file, or is larger.
    """
    try:
        return read_plain(path, most)
    except OSError as error:
        raise Flaw(path, "unreadable", f"cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise Flaw(path, "unreadable", str(error)) from None


class Report(Protocol):
    """Who is told how far the work has come."""

    def total(self, tiles: int) -> None:
        """So many tiles are to be done."""

    def advance(self, tiles: int) -> None:
        """So many more are done."""

    def problem(self, path: str, what: str) -> None:
        """Something in this file or folder is not as it should be."""


class Silence:
    """A report to nobody."""

    def total(self, tiles: int) -> None:
        """See Report."""

    def advance(self, tiles: int) -> None:
        """See Report."""

    def problem(self, path: str, what: str) -> None:
        """See Report."""


class Reference(NamedTuple):
    """A tile that has not been read yet.

    Attributes:
        key: of the tile.
        field: the group that splits keep together.
        group: which of the reader's folders or scenes it comes from.
        window: the part of the scene, where tiles are cut from scenes.
    """

    key: str
    field: str
    group: int
    window: Window | None = None


Read = Callable[[Reference], Tile | None]


class TileReader(Protocol):
    """Reads the tiles of a source; small and picklable, since every worker process gets one."""

    def files(self, reference: Reference) -> Sequence[Path]:
        """Every file that the tile is made from, in a fixed order."""

    def reading(self) -> AbstractContextManager[Read]:
        """A function that reads tiles; files may stay open until the block ends.

        It returns None for a tile without a valid pixel, and raises Flaw for one that is damaged.
        """


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source that was looked through: what its tiles hold, and which there are.

    Attributes:
        kind: `agriculture-vision-2021`, `rasters`, …
        bands: names in order.
        dtype: numpy name of the pixels' type.
        tile: side of the tiles in pixels.
        parts: image files of a record.
        classes: scored names by id.
        class_values: of the classes in label rasters; empty for masks.
        unscored: labels kept beside the classes.
        splits: tiles by split; the one split UNDIVIDED where `prepare` is to divide them.
        unlabelled: splits without labels.
        nodata: value that all bands of a pixel without data hold; None where there is no single one.
        resolution: metres a pixel; None where nothing says where the tiles lie.
        aliases: other names under which users may know a field, such as its file's name.
        reader: reads the tiles.
        problems: what was found while looking.
    """

    kind: str
    bands: tuple[str, ...]
    dtype: str
    tile: int
    parts: tuple[Part, ...]
    classes: tuple[str, ...]
    class_values: tuple[int, ...] = ()
    unscored: tuple[str, ...] = ()
    splits: Mapping[str, Sequence[Reference]]
    unlabelled: frozenset[str] = frozenset()
    nodata: float | None = None
    resolution: float | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    reader: TileReader
    problems: Sequence[Problem] = ()


@dataclass
class Problems:
    """Collects problems; where `strict`, the first one ends the work.

    Attributes:
        strict: raise at the first.
        report: is told each one.
        keep: how many are kept in full; all are counted.
        kept: the first ones.
        kinds: number by kind.
    """

    strict: bool = False
    report: Report = field(default_factory=Silence)
    keep: int = 1000
    kept: list[Problem] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, problems: Iterable[Problem]) -> None:
        """Take note of problems.

        Raises:
            SourceError: strict, and there is one.
        """
        for problem in problems:
            if self.strict:
                raise SourceError(str(problem))
            self.kinds[problem.kind] += 1
            self.report.problem(problem.path, problem.what)
            if len(self.kept) < self.keep:
                self.kept.append(problem)
