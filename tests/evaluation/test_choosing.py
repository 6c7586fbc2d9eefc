"""The choice of parameters: the best there is, one at a time, and the same whoever asks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from agrivision.evaluation.choosing import OBJECTIVES, ascend, halves, objective

counts = st.lists(st.integers(0, 50), min_size=4, max_size=4)


def as_matrix(values: Sequence[int]) -> Tensor:
    return torch.tensor(values).reshape(2, 2)


def score(values: Sequence[int], kind: str) -> float:
    found = objective(as_matrix(values), kind)
    return -1.0 if found is None else found


@given(st.lists(counts, min_size=1, max_size=6), st.sampled_from(sorted(OBJECTIVES)), st.data())
def test_one_parameter_gets_the_best_of_all_values(
    grid: list[list[int]], kind: str, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(grid) - 1))
    table = torch.stack([as_matrix(values) for values in grid])
    [[place]] = ascend([[start]], lambda *_: [table], kind)
    best = max(score(values, kind) for values in grid)
    assert score(grid[place], kind) == best
    if score(grid[start], kind) == best:
        assert place == start


@given(st.lists(counts, min_size=9, max_size=9), st.sampled_from(sorted(OBJECTIVES)))
def test_no_parameter_alone_can_be_changed_for_the_better(grid: list[list[int]], kind: str) -> None:
    table = {place: grid[i] for i, place in enumerate(itertools.product(range(3), repeat=2))}

    def count(parameter: int, places: Sequence[Sequence[int]]) -> list[Tensor]:
        def at(mine: Sequence[int], value: int) -> list[int]:
            changed = list(mine)
            changed[parameter] = value
            return table[changed[0], changed[1]]

        return [torch.stack([as_matrix(at(mine, value)) for value in range(3)]) for mine in places]

    for place in ascend([[1, 1], [0, 2]], count, kind):
        here = score(table[place[0], place[1]], kind)
        assert all(here >= score(table[value, place[1]], kind) for value in range(3))
        assert all(here >= score(table[place[0], value], kind) for value in range(3))


def test_parameters_that_help_together_alone_are_found() -> None:
    def count(parameter: int | None, places: Sequence[Sequence[int]]) -> list[Tensor]:
        found = []
        for place in places:
            rows = []
            for value in range(2):
                now = list(place)
                now[slice(None) if parameter is None else slice(parameter, parameter + 1)] = [
                    value for _ in range(2 if parameter is None else 1)
                ]
                right = 5 + 3 * (sum(now) == 2) - (sum(now) == 1)
                rows.append(as_matrix([right, 4, 4, right]))
            found.append(torch.stack(rows))
        return found

    assert ascend([[0, 0]], count, "miou") == [[0, 0]]
    assert ascend([[0, 0]], count, "miou", together=True) == [[1, 1]]


def test_of_equal_scores_what_there_is_stays() -> None:
    same = torch.ones(5, 2, 2, dtype=torch.int64)
    assert ascend([[3], [1]], lambda *_: [same, same], "miou") == [[3], [1]]


@given(st.dictionaries(st.text(max_size=5), st.integers(1, 9), max_size=9), st.randoms())
def test_fields_are_halved_alike_in_any_order(tiles: dict[str, int], random) -> None:
    order = list(tiles)
    random.shuffle(order)
    half = halves(tiles)
    assert halves({name: tiles[name] for name in order}) == half
    counts = [sum(tiles[name] for name in tiles if half[name] == each) for each in (0, 1)]
    assert abs(counts[0] - counts[1]) <= max(tiles.values(), default=0)
    assert set(half.values()) == {0, 1} or len(tiles) < 2
