"""Tiles that cannot be used, and how many of them a run goes on without.

A tile is damaged where its record cannot be read, is not what its checksum says, or is no picture of
the right size. It keeps its place in the batch, so that no shape and no number of steps changes, but
has no weight in the loss; what goes through the network in its place is a copy of its neighbour. From
then on it is in quarantine: it is read no more, whatever the disk would say, so that each rank and each
attempt of the run takes the same decision. The list is a part of the checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from agrivision.data.shards import Refused, SplitReader
from agrivision.errors import CheckpointError, DatasetError

_NAMED = 3  # tiles in a line that says why a run ends


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A tile that cannot be used.

    Attributes:
        tile: its number in the split.
        key: its key; None where the shard's index cannot tell it.
        shard: `SPLIT/NAME.tar`.
        why: one line; files are named from the data set's folder on.
    """

    tile: int
    key: str | None
    shard: str
    why: str

    @classmethod
    def of(cls, reader: SplitReader, tile: int, error: DatasetError) -> Damage:
        """What went wrong with a tile of a split."""
        shard, key = reader.where(tile)
        return cls(tile=tile, key=key, shard=shard, why=str(error).replace(f"{reader.dataset}/", ""))

    @property
    def name(self) -> str:
        """The key, or what can be said without it."""
        return self.key or f"number {self.tile} of {self.shard.partition('/')[0]}"

    def why_in(self, folder: Path) -> str:
        """Why, with the shard's whole path."""
        shard = self.shard.removesuffix(".tar")
        return self.why.replace(shard, str(folder / shard))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def most_damaged(share: float, tiles: int) -> int:
    """How many of a split's tiles may be damaged: the share of them, rounded down.

    The share is taken as the decimal number that somebody wrote, and the product is exact: 0.29 of 100
    tiles are 29, although the nearest double is a little less than 0.29.

    Args:
        share: 0 to 1.
        tiles: in the split.
    """
    return math.floor(Fraction(repr(share)) * tiles)


def passes(error: DatasetError) -> bool:
    """Whether a tile may be readable at another time: the operating system refused to read it."""
    return isinstance(error, Refused)


def refusal(reader: SplitReader, found: Sequence[Damage], allowed: int) -> DatasetError:
    """Why a run or an evaluation ends: what is damaged, how much of it, and what to do.

    Args:
        reader: of the split.
        found: all damaged tiles, those to be named first.
        allowed: how many there may be.
    """
    folder = reader.dataset
    named = "; ".join(f"tile {each.name}: {each.why_in(folder)}" for each in found[:_NAMED])
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    limit = f", at most {allowed} may be (data.max_damaged_share)" if allowed else ""
    return DatasetError(
        f"{len(found)} of {len(reader)} tiles of {folder}/{reader.name} cannot be read{limit}: {named}"
        f"{more}. `agrivision inspect {folder} --verify` finds all that is damaged, `agrivision prepare"
        f" SOURCE {folder} --repair` makes it anew"
    )


class Quarantine:
    """The tiles of a split that a run goes on without.

    Args:
        reader: of the split.
        share: of its tiles that may be damaged; see `most_damaged`.

    Attributes:
        allowed: how many may be.
    """

    def __init__(self, reader: SplitReader, share: float) -> None:
        self.allowed = most_damaged(share, len(reader))
        self._reader = reader
        self._rows: dict[int, dict[str, Any]] = {}

    def __contains__(self, tile: object) -> bool:
        return tile in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One for each tile, in the order in which they were found: step, tile, key, shard, why."""
        return list(self._rows.values())

    def add(self, found: Iterable[Damage], step: int) -> list[Damage]:
        """Take tiles in, all of them or, where they would be too many, none.

        Args:
            found: what ranks have met in one step; a tile may come twice.
            step: the first that goes on without them.

        Returns:
            Those that are new, by number.

        Raises:
            DatasetError: there are more than may be.
        """
        by_tile = {each.tile: each for each in found if each.tile not in self}
        new = [by_tile[tile] for tile in sorted(by_tile)]
        if len(self) + len(new) > self.allowed:
            raise refusal(self._reader, new + self._known(), self.allowed)
        self._rows |= {each.tile: {"step": step} | each.to_dict() for each in new}
        return new

    def _known(self) -> list[Damage]:
        names = [field.name for field in dataclasses.fields(Damage)]
        return [Damage(**{name: row[name] for name in names}) for row in self._rows.values()]

    def load(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take over what `rows` gave.

        Raises:
            CheckpointError: it is something else.
        """
        try:
            self._rows = {int(row["tile"]): dict(row) for row in rows}
            self._known()
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint's list of damaged tiles cannot be read: {error!r}"
            ) from None
