"""The small parts of training: schedule, average, optimiser, stop request, run directory."""

from __future__ import annotations

import copy
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from agrivision import checkpoint
from agrivision.config import OptimizerConfig, ScheduleConfig
from agrivision.errors import CheckpointError, NotWritable, RunMismatch, StorageError
from agrivision.rundir import RunDirectory, best_step
from agrivision.training.ema import WeightAverage, exponential
from agrivision.training.optimizer import Optimizer
from agrivision.training.preemption import StopRequest
from agrivision.training.schedule import learning_rate
from agrivision.world import World

# The schedule

SCHEDULES = st.builds(
    ScheduleConfig,
    name=st.sampled_from(["cosine", "polynomial", "constant"]),
    warmup=st.floats(0, 1),
    final=st.floats(0, 1),
    power=st.floats(0.01, 10),
)


@given(config=SCHEDULES, peak=st.floats(1e-8, 1e3), total=st.integers(1, 300))
def test_the_rate_rises_to_the_peak_and_then_never_again(
    config: ScheduleConfig, peak: float, total: int
) -> None:
    rates = [learning_rate(config, peak, step, total) for step in range(total)]
    warmup = round(config.warmup * total)
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)
    assert all(rate > 0 for rate in rates[: warmup + 1])
    rises = [rate == pytest.approx(peak * (step + 1) / (warmup + 1)) for step, rate in enumerate(rates)]
    assert all(rises[: warmup + 1])
    after = rates[warmup:]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(after))
    if config.name != "constant":
        assert all(rate >= peak * config.final * (1 - 1e-12) for rate in after)


@pytest.mark.parametrize("final", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("name", ["cosine", "polynomial"])
def test_the_decay_ends_at_the_final_rate(name: Any, final: float) -> None:
    config = ScheduleConfig(name=name, warmup=0.1, final=final)
    assert learning_rate(config, 2.0, 10_000, 10_000) == pytest.approx(2 * final, abs=1e-12)
    last = learning_rate(config, 2.0, 9_999, 10_000)
    assert last == pytest.approx(2 * final, abs=1e-3)


def test_decays_of_known_values() -> None:
    cosine = ScheduleConfig(name="cosine", warmup=0.0, final=0.2)
    assert learning_rate(cosine, 1.0, 50, 100) == pytest.approx(0.6)
    assert learning_rate(cosine, 1.0, 25, 100) == pytest.approx(0.2 + 0.8 * (0.5 + 0.5**1.5))
    polynomial = ScheduleConfig(name="polynomial", warmup=0.0, power=2.0)
    assert learning_rate(polynomial, 1.0, 25, 100) == pytest.approx(0.75**2)
    constant = ScheduleConfig(name="constant", warmup=0.1)
    assert {learning_rate(constant, 1.0, step, 100) for step in range(10, 100)} == {1.0}


# Models


class Net(nn.Module):
    """Four-dimensional, one-dimensional and scalar parameters, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 2, 1)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.scale * self.second(torch.relu(self.norm(self.first(images))))


def net(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net().to(memory_format=torch.channels_last)


def learn(model: nn.Module, optimizer: Optimizer, steps: range) -> list[torch.Tensor]:
    norms = []
    for step in steps:
        random = torch.Generator().manual_seed(step)
        images = torch.randn(4, 3, 8, 8, generator=random).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        model(images).square().mean().backward()
        norms.append(optimizer.clip())
        optimizer.step(1e-2 / (step + 1))
    return norms


def assert_same_state(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


# The average


def test_the_average_is_the_plain_formula() -> None:
    model = net(0)
    average = WeightAverage(model, exponential(0.6))
    plain = {name: p.detach().double() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, OptimizerConfig())
    for step in range(1, 12):
        learn(model, optimizer, range(step, step + 1))
        average.update(model, step, 11)
        decay = min(0.6, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            plain[name] = decay * plain[name] + (1 - decay) * parameter.detach().double()
    found = dict(average.model.named_parameters())
    for name, value in plain.items():
        torch.testing.assert_close(found[name].double(), value, atol=1e-6, rtol=1e-5)
        assert not torch.equal(found[name], model.get_parameter(name))
    assert_same_state(dict(average.model.named_buffers()), dict(model.named_buffers()))


def test_the_average_is_apart_from_the_model() -> None:
    model = net(0)
    before = copy.deepcopy(model.state_dict())
    average = WeightAverage(model, exponential(0.9))
    assert not average.model.training
    assert not any(p.requires_grad for p in average.model.parameters())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    learn(model, Optimizer(model, OptimizerConfig()), range(3))
    assert_same_state(average.state_dict(), before)
    model.load_state_dict(before)
    average.update(net(1), 5, 9)
    assert_same_state(model.state_dict(), before)


def test_an_average_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, other = net(0), net(1)
    first = WeightAverage(model, exponential(0.9))
    first.update(other, 1, 3)
    second = WeightAverage(net(2), exponential(0.9))
    folder = checkpoint.save(tmp_path, {"ema": first.state_dict()}, step=1, epoch=0)
    second.load_state_dict(checkpoint.load(folder).states["ema"])
    for step in (2, 3):
        first.update(model, step, 3)
        second.update(model, step, 3)
    assert_same_state(first.state_dict(), second.state_dict())


# The optimiser

OPTIMIZERS = [
    OptimizerConfig(),
    OptimizerConfig(clip_norm=None),
    OptimizerConfig(name="sgd"),
    OptimizerConfig(name="sgd", momentum=0.0),
]


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda c: f"{c.name}-{c.clip_norm}-{c.momentum}")
@pytest.mark.parametrize("done", [0, 1, 4])
def test_an_optimiser_goes_on_bit_for_bit(config: OptimizerConfig, done: int, tmp_path: Path) -> None:
    model = net(0)
    optimizer = Optimizer(model, config)
    learn(model, optimizer, range(done))
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    found = checkpoint.load(checkpoint.save(tmp_path, states, step=done, epoch=0)).states
    other = net(1)
    resumed = Optimizer(other, config)
    learn(other, resumed, range(2))  # a state to be forgotten
    other.load_state_dict(found["model"])
    resumed.load_state_dict(found["optimizer"])
    assert_same_state(resumed.state_dict(), optimizer.state_dict())
    norms = learn(model, optimizer, range(done, done + 3))
    assert learn(other, resumed, range(done, done + 3)) == norms
    assert_same_state(other.state_dict(), model.state_dict())
    assert_same_state(resumed.state_dict(), optimizer.state_dict())
    for name, value in resumed.state_dict().items():
        if value.ndim == 4:
            assert value.is_contiguous(memory_format=torch.channels_last), name


def test_a_loaded_state_is_a_copy() -> None:
    model = net(0)
    optimizer = Optimizer(model, OptimizerConfig())
    learn(model, optimizer, range(2))
    state = {name: value.clone() for name, value in optimizer.state_dict().items()}
    given = {name: value.clone() for name, value in state.items()}
    optimizer.load_state_dict(given)
    learn(model, optimizer, range(2, 4))
    assert_same_state(given, state)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state | {"exp_avg/foreign": torch.zeros(1)},
        lambda state: state | {"exp_avg/first.weight": torch.zeros(3, 3)},
        lambda state: state | {"step/foreign": torch.tensor(1.0)},
    ],
)
def test_the_state_of_another_model_is_refused(
    spoil: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
) -> None:
    model = net(0)
    optimizer = Optimizer(model, OptimizerConfig())
    learn(model, optimizer, range(1))
    with pytest.raises(CheckpointError, match="fits no parameter of this model"):
        optimizer.load_state_dict(spoil(optimizer.state_dict()))


@pytest.mark.parametrize("names", [("adamw", "sgd"), ("sgd", "adamw")])
def test_the_state_of_another_algorithm_is_left(
    names: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, other = net(0), net(0)
    before = Optimizer(net(1), OptimizerConfig(name=names[0]))
    for parameter in before._named.values():
        parameter.grad = torch.ones_like(parameter)
    before.step(0.1)
    fresh, loaded = (Optimizer(each, OptimizerConfig(name=names[1])) for each in (model, other))
    loaded.load_state_dict(before.state_dict())
    assert "starts anew" in caplog.text
    learn(model, fresh, range(2))
    learn(other, loaded, range(2))
    assert_same_state(loaded.state_dict(), fresh.state_dict())
    assert_same_state(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_vectors_and_scalars_are_not_decayed(name: Any) -> None:
    model = net(0)
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = Optimizer(model, OptimizerConfig(name=name, weight_decay=0.1, momentum=0.0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.5)
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.5 * 0.1) if parameter.ndim > 1 else before[name]
        torch.testing.assert_close(parameter, expected, atol=0, rtol=1e-6)
    assert torch.equal(model.norm.weight, before["norm.weight"])


@pytest.mark.parametrize(("limit", "after"), [(1.0, 1.0), (5.5, 5.0), (None, 5.0)])
def test_clipping_returns_the_norm_before_it(limit: float | None, after: float) -> None:
    model = nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([-4.0])
    norm = Optimizer(model, OptimizerConfig(clip_norm=limit)).clip()
    assert norm.item() == 5
    clipped = torch.cat([model.weight.grad.view(-1), model.bias.grad])
    assert clipped.norm().item() == pytest.approx(after, rel=1e-5)
    if after == 5:
        assert clipped.tolist() == [3, 0, -4]


def test_frozen_parameters_have_no_state() -> None:
    model = net(0)
    model.first.requires_grad_(requires_grad=False)
    before = model.first.weight.clone()
    optimizer = Optimizer(model, OptimizerConfig())
    learn(model, optimizer, range(2))
    assert torch.equal(model.first.weight, before)
    assert not any("first" in name for name in optimizer.state_dict())


# The request to stop


@pytest.fixture
def handlers() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_sets_the_flag(number: signal.Signals) -> None:
    stop = StopRequest()
    assert not stop.made
    assert stop.listen() is stop
    signal.raise_signal(number)
    assert stop.made
    assert stop.reason == number.name
    for later in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR1, signal.SIGTERM):
        signal.raise_signal(later)
    assert stop.reason == number.name


def ends(numbers: list[signal.Signals]) -> int:
    """How a process ends that receives these signals: 0, or the number of the one that killed it."""
    code = (
        "import signal, sys\n"
        "from agrivision.training.preemption import StopRequest\n"
        "assert 'torch' not in sys.modules\n"
        "stop = StopRequest().listen()\n"
        f"for number in {[int(number) for number in numbers]}:\n"
        "    signal.raise_signal(number)\n"
        "    assert stop.made\n"
        "print('survived')\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stderr == ""
    assert ("survived" in found.stdout) == (found.returncode == 0)
    return -found.returncode


@pytest.mark.parametrize(
    ("numbers", "end"),
    [
        ([signal.SIGINT], 0),
        ([signal.SIGINT, signal.SIGINT], signal.SIGINT),
        ([signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], 0),
        ([signal.SIGTERM, signal.SIGINT, signal.SIGINT], signal.SIGINT),
    ],
)
def test_only_a_second_ctrl_c_ends_the_process(numbers: list[signal.Signals], end: int) -> None:
    assert ends(numbers) == end


# The run directory


def start_holder(path: Path) -> subprocess.Popen[str]:
    code = (
        "import pathlib, sys, time\n"
        "from agrivision.rundir import RunDirectory\n"
        "from agrivision.world import World\n"
        f"with RunDirectory(pathlib.Path({str(path)!r})).held(World()):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with start_holder(run.path) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with (
                pytest.raises(RunMismatch, match="is in use by another run") as error,
                run.held(World()),
            ):
                pass
            assert str(run.path) in str(error.value)
        finally:
            holder.send_signal(signal.SIGKILL)
    with run.held(World()):
        pass
    assert run.path.stat().st_mode & 0o777 == 0o700


def test_the_lock_ends_with_the_block(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for _ in range(2):
        with run.held(World()), pytest.raises(RunMismatch), RunDirectory(tmp_path).held(World()):
            pass
    with pytest.raises(KeyError), run.held(World()):
        raise KeyError
    with run.held(World()):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_costs_a_warning(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse_locks(monkeypatch, number)
    entered = False
    with RunDirectory(tmp_path).held(World()):
        entered = True
    assert entered
    assert "no locks" in caplog.text


def test_a_lock_that_fails_otherwise_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_locks(monkeypatch, errno.EIO)
    with (
        pytest.raises(StorageError, match=r"cannot write .*\.lock"),
        RunDirectory(tmp_path).held(World()),
    ):
        pass


def refuse_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_run_directory_that_is_a_file_is_the_users_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotWritable), RunDirectory(tmp_path / "file").held(World()):
        pass


ROWS = st.lists(
    st.tuples(
        st.sampled_from(["evaluation", "training"]),
        st.integers(0, 9),
        st.none() | st.floats(0, 1),
    ),
    max_size=8,
)
FOREIGN = [
    b"",
    b"[]",
    b"null",
    b"7",
    b'"evaluation"',
    b"{}",
    b'{"kind": "evaluation"}',
    b'{"kind": "evaluation", "step": 3}',
    b'{"kind": "evaluation", "step": null, "miou": 2}',
    b'{"kind": "evaluation", "step": 3, "miou": "good"}',
    b'{"kind": "evaluation", "step": 3, "miou": [2]}',
    b'{"kind": "evaluation", "step": Infinity, "miou": 2}',
    b'{"kind": "evaluation", "step": NaN, "miou": 2}',
    b"\xff\xfe{",
    bytes(50),
]


@settings(max_examples=60)
@given(rows=ROWS, foreign=st.lists(st.sampled_from(FOREIGN), max_size=4), cut=st.integers(0, 60))
def test_evaluations_survive_torn_and_foreign_lines(
    rows: list[tuple[str, int, float | None]], foreign: list[bytes], cut: int
) -> None:
    good = [json.dumps({"kind": kind, "step": step, "miou": miou}) for kind, step, miou in rows]
    torn = json.dumps({"kind": "evaluation", "step": 99, "miou": 1.0}).encode()
    lines = [*foreign, *(line.encode() for line in good), *foreign, torn[: min(cut, len(torn) - 1)]]
    with tempfile.TemporaryDirectory() as name:
        run = RunDirectory(Path(name))
        run.metrics.write_bytes(b"\n".join(lines))
        found = run.evaluations()
    expected = {step: miou for kind, step, miou in rows if kind == "evaluation"}
    assert found == expected
    best = best_step(found)
    scored = [miou for miou in expected.values() if miou is not None]
    if scored:
        assert best is not None
        assert expected[best] == max(scored)
        assert best == min(step for step, miou in expected.items() if miou == max(scored))
    else:
        assert best is None


def test_a_run_without_metrics_has_no_evaluations(tmp_path: Path) -> None:
    assert RunDirectory(tmp_path).evaluations() == {}
