"""Which fields train and which validate: whole fields, so that no ground is in both."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from agrivision.errors import SourceError

TRAIN, VAL = "train", "val"
_KEY = b"agrivision splits"
_SHOWN = 20


def divide(
    tiles: Mapping[str, int], val: Sequence[str], fraction: float, aliases: Mapping[str, str]
) -> dict[str, str]:
    """The split of every field.

    Without names, fields are taken in the order of a keyed hash of their names until the wanted
    share of the tiles is reached. The order of the others does not change when a field is added.

    Args:
        tiles: number of tiles by field.
        val: fields that validate; empty lets the hash decide.
        fraction: share of the tiles that validate where the hash decides; 0 for none. Where there
            are two fields or more, each split gets at least one.
        aliases: other names of fields, which `val` may use.

    Returns:
        `train` or `val` by field.

    Raises:
        SourceError: `val` has a name that is no field; the line lists those there are.
    """
    chosen = {_known(name, tiles, aliases) for name in val} if val else _ranked(tiles, fraction)
    return {field: VAL if field in chosen else TRAIN for field in tiles}


def _known(name: str, tiles: Mapping[str, int], aliases: Mapping[str, str]) -> str:
    for candidate in (name, aliases.get(name, ""), name.rpartition(".")[0]):
        if candidate in tiles:
            return candidate
    shown = sorted(tiles)[:_SHOWN]
    more = f" and {len(tiles) - _SHOWN} more" if len(tiles) > _SHOWN else ""
    raise SourceError(f"no field or scene {name!r} to validate on: there are {', '.join(shown)}{more}")


def _ranked(tiles: Mapping[str, int], fraction: float) -> set[str]:
    if fraction == 0 or len(tiles) < 2:
        return set()
    wanted = fraction * sum(tiles.values())
    taken, chosen = 0, set[str]()
    for field in sorted(tiles, key=_rank)[:-1]:  # the last one always trains
        if chosen and taken >= wanted:
            break
        chosen.add(field)
        taken += tiles[field]
    return chosen


def _rank(field: str) -> bytes:
    return hashlib.blake2b(field.encode(), key=_KEY, digest_size=16).digest()
