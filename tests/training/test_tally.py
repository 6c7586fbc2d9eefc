"""What counts is decided where it was computed, and equals what a program that looks would decide."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from agrivision.config import OptimizerConfig
from agrivision.errors import CheckpointError
from agrivision.training.ema import WeightAverage, exponential
from agrivision.training.optimizer import Optimizer
from agrivision.training.tally import MEANS, Tally

CPU = torch.device("cpu")
VALUES = st.lists(st.sampled_from([0.0, 0.25, 3.0, 1e30, math.nan, math.inf]), min_size=4, max_size=4)


def feed(tally: Tally, steps: Sequence[Sequence[float]], first: int = 1) -> list[bool]:
    return [
        bool(tally.count(torch.tensor(step[:3], dtype=torch.float64), torch.tensor(step[3]), number))
        for number, step in enumerate(steps, first)
    ]


@given(steps=st.lists(VALUES, max_size=12), looked=st.integers(0, 12))
def test_a_tally_is_what_a_program_that_looks_would_note(steps: list[list[float]], looked: int) -> None:
    tally = Tally(CPU)
    good = [all(map(math.isfinite, step)) for step in steps]
    assert feed(tally, steps[:looked]) == good[:looked]
    tally.restart()
    assert feed(tally, steps[looked:], looked + 1) == good[looked:]
    look = tally.look()
    counted = [step for step, fine in zip(steps[looked:], good[looked:], strict=True) if fine]
    if counted:
        expected = [
            sum(float(torch.tensor(v)) for v in column) / len(counted)
            for column in zip(*counted, strict=True)
        ]
        assert list(look.means) == list(MEANS)
        assert list(look.means.values()) == pytest.approx(expected)
    else:
        assert look.means == {}
    bad = [number for number, fine in enumerate(good, 1) if not fine]
    since = [number for number in bad if number > looked]
    assert (look.missed, tally.counts["skipped"]) == (len(since), len(bad))
    assert look.last_missed == (since[-1] if since else 0)
    rows = [0]
    for fine in good:
        rows.append(0 if fine else rows[-1] + 1)
    assert look.most_in_a_row == max(rows[looked + 1 :], default=0)
    assert tally.counts["in_a_row"] == rows[-1]


@given(before=st.lists(VALUES, max_size=6), after=st.lists(VALUES, max_size=6))
def test_a_tally_that_was_saved_goes_on(before: list[list[float]], after: list[list[float]]) -> None:
    whole, first, second = Tally(CPU), Tally(CPU), Tally(CPU)
    feed(whole, before + after)
    feed(first, before)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    feed(second, after, len(before) + 1)
    assert second.state_dict() == whole.state_dict()


def test_means_begin_anew_where_the_loss_has_other_parts() -> None:
    """What was skipped, and a row of bad steps, are counted on."""
    before, after = Tally(CPU), Tally(CPU, ("total", "cross_entropy", "dice", "lovasz"))
    feed(before, [[1.0] * 4, [2.0] * 4, [math.nan] * 4])
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.look().means == {}
    after.count(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64), torch.tensor(5.0), 4)
    assert after.look().means == {
        "total": 1,
        "cross_entropy": 2,
        "dice": 3,
        "lovasz": 4,
        "gradient_norm": 5,
    }
    assert (after.counts["skipped"], after.counts["most_in_a_row"]) == (1, 1)
    back = Tally(CPU)
    back.load_state_dict(after.state_dict())
    assert back.look().means == {}


def test_a_state_of_something_else_is_refused() -> None:
    with pytest.raises(CheckpointError, match="has the entries step"):
        Tally(CPU).load_state_dict({"step": 1})


class NoLook(TorchDispatchMode):
    """Refuses what would make a program wait for a GPU."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


CONFIGS = [
    OptimizerConfig(),
    OptimizerConfig(name="sgd"),
    OptimizerConfig(name="sgd", momentum=0),
    OptimizerConfig(clip_norm=None),
]


def take_step(model: nn.Module, optimizer: Optimizer, tally: Tally, number: int, scale: float) -> None:
    optimizer.zero_grad()
    data = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
    (model(data).square().mean() * scale).backward()
    with NoLook():
        norm = optimizer.clip()
        optimizer.step(0.1, tally.count(torch.zeros(3, dtype=torch.float64), norm, number))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("bad", [1, 2, 4])
def test_a_step_that_does_not_count_leaves_every_bit(config: OptimizerConfig, bad: int) -> None:
    """Weights and the optimiser's state are those of a run without that step, also of the first."""
    states = []
    for spoilt in (True, False):
        model = network()
        optimizer, tally = Optimizer(model, config), Tally(CPU)
        for number in range(1, 6):
            if number != bad:
                take_step(model, optimizer, tally, number, 1.0)
            elif spoilt:
                take_step(model, optimizer, tally, number, math.nan)
        states.append(dict(model.named_parameters()) | optimizer.state_dict())
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_the_average_of_the_weights_needs_no_look() -> None:
    model = network()
    average = WeightAverage(model, exponential(0.9))
    with NoLook():
        average.update(model, 3, 9)
