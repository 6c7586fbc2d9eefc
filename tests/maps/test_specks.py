"""Small areas: what they are, what becomes of them, and that nobody's strips have a say in it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from agrivision.maps.legend import NODATA
from agrivision.maps.specks import Areas, Survey, strips_without_specks, without_specks

Map = NDArray[np.uint8]


@st.composite
def maps(draw: st.DrawFn) -> Map:
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    value = st.sampled_from([0, 0, 0, 1, 1, 2, NODATA])
    return np.array(
        draw(st.lists(value, min_size=height * width, max_size=height * width)), np.uint8
    ).reshape(height, width)


bounds = st.lists(st.integers(0, 9), min_size=3, max_size=3)


def drawn(*rows: str) -> Map:
    """`.` for 0, `#` for no data."""
    ids = [[0 if c == "." else NODATA if c == "#" else int(c) for c in row] for row in rows]
    return np.array(ids, np.uint8)


def found(ids: Map) -> tuple[Areas, NDArray[np.int64]]:
    survey = Survey()
    labels = survey.add(ids)
    areas, numbers = survey.areas()
    return areas, numbers[labels]


def flooded(ids: Map) -> NDArray[np.int64]:
    """Areas numbered by their first pixels, one pixel after the other."""
    labels = np.full(ids.shape, -1)
    for place in np.ndindex(ids.shape):
        if labels[place] < 0:
            number, waiting = labels.max() + 1, [place]
            while waiting:
                row, column = waiting.pop()
                inside = 0 <= row < ids.shape[0] and 0 <= column < ids.shape[1]
                if inside and labels[row, column] < 0 and ids[row, column] == ids[place]:
                    labels[row, column] = number
                    waiting += [(row + 1, column), (row - 1, column)]
                    waiting += [(row, column + 1), (row, column - 1)]
    return labels


@given(maps())
def test_areas_are_what_a_flood_reaches(ids: Map) -> None:
    areas, labels = found(ids)
    assert (labels == flooded(ids)).all()
    assert areas.sizes.tolist() == np.bincount(labels.ravel()).tolist()
    assert (areas.values[labels] == ids).all()


@given(maps())
def test_an_area_stays_where_it_touches_the_edge_or_nothing(ids: Map) -> None:
    areas, labels = found(ids)
    framed = np.pad(ids, 1, constant_values=NODATA) == NODATA
    beside = framed[:-2, 1:-1] | framed[2:, 1:-1] | framed[1:-1, :-2] | framed[1:-1, 2:]
    for area in range(len(areas.values)):
        there = labels == area
        assert areas.stays[area] == (beside[there].any() or areas.values[area] == NODATA)


@given(maps(), bounds)
def test_no_bound_changes_nothing_and_a_bound_leaves_nothing_small(ids: Map, least: list[int]) -> None:
    assert (without_specks(ids, [0, 0, 0]) == ids).all()
    assert (without_specks(ids, [1, 1, 1]) == ids).all()
    clean = without_specks(ids, least)
    assert ((clean == NODATA) == (ids == NODATA)).all()
    areas, _ = found(clean)
    counted = areas.values != NODATA
    small = areas.sizes[counted] < np.array(least)[areas.values[counted]]
    assert not (small & ~areas.stays[counted]).any()
    assert (without_specks(clean, least) == clean).all()


@given(maps(), bounds, st.data())
def test_strips_of_any_heights_give_the_same(ids: Map, least: list[int], data: st.DataObject) -> None:
    cuts = data.draw(st.sets(st.integers(1, len(ids)))) - {len(ids)}
    strips = np.split(ids, sorted(cuts))
    joined = np.concatenate(list(strips_without_specks(strips, strips, least)))
    assert (joined == without_specks(ids, least)).all()


def test_each_class_has_its_own_bound_and_the_largest_neighbour_gets_what_is_small() -> None:
    ids = drawn(
        "........",
        ".11..2..",
        ".1...22.",
        "......2.",
        "....1...",
        "........",
    )
    assert (without_specks(ids, [0, 4, 4]) == np.where(ids == 1, 0, ids)).all()
    assert (without_specks(ids, [0, 2, 5]) == np.where(ids == 2, 0, drawn(
        "........",
        ".11..2..",
        ".1...22.",
        "......2.",
        "........",
        "........",
    ))).all()  # fmt: skip


def test_what_lies_within_something_small_gets_what_surrounds_both() -> None:
    ids = drawn(
        ".......",
        ".22222.",
        ".21112.",
        ".21112.",
        ".22222.",
        ".......",
    )
    assert not without_specks(ids, [0, 10, 20]).any()
    assert (without_specks(ids, [0, 10, 10]) == np.where(ids == 1, 2, ids)).all()


def test_diagonals_do_not_touch() -> None:
    ids = drawn(".....", ".1...", "..1..", "...1.", ".....")
    assert not without_specks(ids, [0, 2, 0]).any()


def test_a_speck_at_the_edge_or_beside_no_data_stays() -> None:
    ids = drawn("1....", ".....", "..1#.", ".....", ".1...", ".....")
    left = without_specks(ids, [0, 9, 0])
    assert (left == drawn("1....", ".....", "..1#.", ".....", ".....", ".....")).all()
