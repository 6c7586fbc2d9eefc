from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agrivision.evaluation.confusion import confusion_matrix, scores

VALID = 1 << 15


def slow(predicted: Tensor, labels: Tensor, classes: int) -> list[list[int]]:
    """The rule, pixel by pixel."""
    matrix = [[0] * classes for _ in range(classes)]
    for x, bits in zip(predicted.flatten().tolist(), labels.flatten().tolist(), strict=True):
        if not bits & VALID:
            continue
        true = [y for y in range(classes) if bits >> y & 1]
        for y in true:
            matrix[y if x in true else x][y] += 1
    return matrix


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Overlaps, unscored bits, empty sets, absent classes, pixels that are not valid."""
    classes = draw(st.integers(1, 15))
    shape = draw(st.tuples(st.integers(0, 2), st.integers(1, 5), st.integers(1, 5)))
    pixels = shape[0] * shape[1] * shape[2]
    mask = draw(st.integers(0, 2**16 - 1)) | VALID
    bits = draw(st.lists(st.integers(0, 2**16 - 1), min_size=pixels, max_size=pixels))
    ids = draw(st.lists(st.integers(0, classes - 1), min_size=pixels, max_size=pixels))
    labels = torch.tensor([b & mask for b in bits], dtype=torch.int32).reshape(shape)
    dtype = draw(st.sampled_from([torch.uint8, torch.int32, torch.int64]))
    return torch.tensor(ids, dtype=dtype).reshape(shape), labels, classes


@settings(max_examples=120, deadline=None)
@given(case=cases())
def test_the_matrix_is_the_rule_pixel_by_pixel(case: tuple[Tensor, Tensor, int]) -> None:
    matrix = confusion_matrix(*case)
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == slow(*case)


def test_a_miss_on_two_labels_is_two_false_positives_and_a_false_negative_of_each() -> None:
    labels = torch.tensor([[[0b011 | VALID, 0b011 | VALID]]], dtype=torch.int32)
    matrix = confusion_matrix(torch.tensor([[[2, 1]]]), labels, 3)
    assert matrix.tolist() == [[1, 0, 0], [0, 1, 0], [1, 1, 0]]
    # IoU of 0 and 1: one hit, one miss; of 2: no hit, two false positives
    assert scores(matrix, "abc").iou == {"a": 0.5, "b": 0.5, "c": 0.0}


def test_parts_add_up_to_the_whole() -> None:
    torch.manual_seed(0)
    predicted = torch.randint(9, (6, 16, 16))
    labels = torch.randint(2**16, (6, 16, 16), dtype=torch.int32)
    parts = [confusion_matrix(predicted[i : i + 2], labels[i : i + 2], 9) for i in (0, 2, 4)]
    assert torch.equal(sum(parts, torch.zeros(9, 9).long()), confusion_matrix(predicted, labels, 9))


def test_it_is_legal_where_only_deterministic_kernels_are() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        labels = torch.full((1, 2, 2), VALID | 1, dtype=torch.int32)
        assert confusion_matrix(torch.zeros(1, 2, 2).long(), labels, 2).tolist() == [[4, 0], [0, 0]]
    finally:
        torch.use_deterministic_algorithms(False)


def test_perfect_predictions_are_diagonal_and_score_one() -> None:
    ids = torch.arange(3).repeat(1, 4, 4)
    matrix = confusion_matrix(ids, (1 << ids).int() | VALID, 3)
    assert torch.equal(matrix, torch.diag(matrix.diagonal()))
    assert scores(matrix, ["a", "b", "c"]).miou == 1


@pytest.mark.parametrize("wrong", [-1, 3, 255])
def test_ids_that_are_no_class_are_refused(wrong: int) -> None:
    predicted = torch.tensor([[[0, wrong]]])
    with pytest.raises(ValueError, match=f"class id {wrong} "):
        confusion_matrix(predicted, torch.zeros(1, 1, 2, dtype=torch.int32), 3)


def test_shapes_and_class_counts_are_checked() -> None:
    with pytest.raises(ValueError, match="for labels"):
        confusion_matrix(torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 3).int(), 3)
    with pytest.raises(ValueError, match="16 classes"):
        confusion_matrix(torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 2).int(), 16)
    with pytest.raises(ValueError, match="2 classes"):
        scores(torch.zeros(3, 3).long(), "ab")


def test_scores_of_a_matrix_by_hand() -> None:
    matrix = torch.tensor([[6, 2, 0, 0], [1, 3, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    found = scores(matrix, ["a", "b", "predicted only", "absent"])
    assert found.iou == {"a": 6 / 10, "b": 3 / 6, "predicted only": 0, "absent": None}
    assert found.precision == {"a": 6 / 8, "b": 3 / 4, "predicted only": 0, "absent": None}
    assert found.recall == {"a": 6 / 8, "b": 3 / 5, "predicted only": 0, "absent": None}
    assert found.f1 == {"a": 12 / 16, "b": 6 / 9, "predicted only": 0, "absent": None}
    assert found.miou == pytest.approx((0.6 + 0.5 + 0) / 3)
    assert found.absent == ("absent",)


def test_nothing_counted_has_no_score() -> None:
    found = scores(torch.zeros(2, 2).long(), ["a", "b"])
    assert found.miou is None
    assert json.loads(json.dumps(found.to_dict())) == {
        "miou": None,
        "iou": {"a": None, "b": None},
        "precision": {"a": None, "b": None},
        "recall": {"a": None, "b": None},
        "f1": {"a": None, "b": None},
        "confusion": [[0, 0], [0, 0]],
        "classes": ["a", "b"],
        "absent": ["a", "b"],
    }
