"""Parameters that make a score largest: one after the other, each at its best while the others stay.

Coordinate ascent over grids: for each parameter in turn all values of its grid are scored, and the best
is taken where it is better than what there is. It ends when a round changes nothing: then no single
parameter can be changed for the better. Scores come from confusion matrices, sums of integers, so the
same predictions give the same choice on any machine and any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import xxhash
from torch import Tensor

from agrivision.evaluation.confusion import scores

Objective = Literal["miou", "f1"]
OBJECTIVES: dict[str, str] = {"miou": "mIoU", "f1": "mean F1"}  # for people
_MOST_ROUNDS = 12  # it ends by itself long before, since each change is for the better


def objective(matrix: Tensor, kind: Objective) -> float | None:
    """Mean IoU or mean F1 over the classes that have one; None where no class has.

    Args:
        matrix: int64 (classes, classes), rows predicted, columns true.
        kind: which.
    """
    found = scores(matrix, [str(class_id) for class_id in range(len(matrix))])
    if kind == "miou":
        return found.miou
    known = [value for value in found.f1.values() if value is not None]
    return sum(known) / len(known) if known else None


# A parameter's number, or None for all parameters together, and the places of all searches → the
# confusion matrices (grid, classes, classes) of each search, the parameter at each place of its grid.
Count = Callable[[int | None, Sequence[Sequence[int]]], Sequence[Tensor]]


def ascend(
    starts: Sequence[Sequence[int]], count: Count, kind: Objective, *, together: bool = False
) -> list[list[int]]:
    """Climb from one or several starts at once, so that each pass over the predictions serves all.

    Args:
        starts: by search, the place of each parameter in its grid at first: that which changes nothing.
        count: counts what each place of a grid gives.
        kind: what is to become largest.
        together: begin with the best value that all parameters have in common: where none helps alone,
            several may.

    Returns:
        By search, the places that were found. Of equal scores what there is stays, and else the place
        nearest to the start wins, the lower one of two.
    """
    places = [list(start) for start in starts]
    if together:
        found = count(None, places)
        for mine, start, matrices in zip(places, starts, found, strict=True):
            mine[:] = [_best(matrices, start[0], start[0], kind)] * len(mine)
    for _ in range(_MOST_ROUNDS):
        before = [list(each) for each in places]
        for parameter in range(len(starts[0])):
            found = count(parameter, places)
            for mine, start, matrices in zip(places, starts, found, strict=True):
                mine[parameter] = _best(matrices, mine[parameter], start[parameter], kind)
        if places == before:
            break
    return places


def _best(matrices: Tensor, now: int, start: int, kind: Objective) -> int:
    found = [objective(matrix, kind) for matrix in matrices]
    values = [-1.0 if value is None else value for value in found]
    best = max(values)
    if values[now] == best:
        return now
    ties = (place for place, value in enumerate(values) if value == best)
    return min(ties, key=lambda place: (abs(place - start), place))


def halves(tiles: Mapping[str, int]) -> dict[str, int]:
    """Share fields out to two halves of about as many tiles, whatever the order of the fields.

    Args:
        tiles: how many each field has, by its name.

    Returns:
        0 or 1 by field; all 0 where there is only one.
    """
    order = sorted(
        tiles, key=lambda name: (-tiles[name], xxhash.xxh3_64_intdigest(name.encode()), name)
    )
    counts, found = [0, 0], {}
    for name in order:
        half = int(counts[1] < counts[0])
        found[name] = half
        counts[half] += tiles[name]
    return found
