"""The loop: gradients do not depend on the ranks, bad losses change nothing, saves come when due."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import cache, partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from agrivision import checkpoint
from agrivision.data.augment import Augment
from agrivision.data.decode import Pixels, decode_record
from agrivision.data.normalise import Normaliser
from agrivision.data.order import Order
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.errors import ExitCode
from agrivision.inference.trained import load_run
from agrivision.model.losses import LabelSetLoss, class_weights
from agrivision.options import read_config
from agrivision.training import trainer
from agrivision.training.trainer import Trainer
from tests.heard import hear, hear_one
from tests.ranks import Disturbance, Moment, run
from tests.training.runs import arguments, assert_same, last_bits, metrics, samples

PLAIN = {"training__ema_decay": 0, "monitor__tensorboard": "false", "monitor__images": 0}

# 33 tiles in batches of 7, which neither two nor three ranks divide; the fifth batch has 5 that count.
GRADIENTS = PLAIN | {
    "data__batch_size": 7,
    "model__dropout": 0,
    "seed": 2,
    "optimizer__name": "sgd",
    "optimizer__lr": 1e-12,  # the weights stay what they are, so that every step can be compared
    "optimizer__clip_norm": "null",
    "monitor__log_every_steps": 1,
    "training__epochs": 1,
    "training__checkpoint_every_steps": 100,
}


def keep_gradients(folder: Path, rank: int) -> None:
    """Write the gradients of each step, as they are when all ranks have added theirs.

    The network is in float64, the loss is not. In float32 a sum in another order now and then tips a
    pixel over an edge of a ReLU or a pool, which moves an entry by some thousandths and would hide a
    wrong weight as small as that.
    """
    original, begin, change = Trainer._finish, Trainer.__init__, Normaliser.__call__

    def begin_in_double(
        self: Trainer, config: Any, model: torch.nn.Module, *args: Any, **kw: Any
    ) -> None:
        begin(self, config, model.double(), *args, **kw)

    def change_in_double(self: Normaliser, *args: Any, **kw: Any) -> torch.Tensor:
        return change(self, *args, **kw).double()

    Trainer.__init__, Normaliser.__call__ = begin_in_double, change_in_double

    def finish(self: Trainer, *args: Any) -> Any:
        gradients = {name: p.grad.numpy() for name, p in self.model.named_parameters()}
        np.savez(folder / f"gradients-{self.progress.step}-{rank}.npz", **gradients)
        return original(self, *args)

    Trainer._finish = finish


@pytest.fixture(scope="module")
def gradients(dataset: Path, tmp_path_factory: pytest.TempPathFactory):
    """Runs that kept their gradients, by ranks, norm and micro-batch."""
    folder = tmp_path_factory.mktemp("gradients")

    @cache
    def make(ranks: int, norm: str, micro: int | str) -> Path:
        run_dir = folder / f"{ranks}-{norm}-{micro}"
        run_dir.mkdir()
        changes = {"model__norm": norm, "training__micro_batch_size": micro}
        command = arguments(dataset, run_dir, **(GRADIENTS | changes))
        assert run(command, ranks, hook=partial(keep_gradients, run_dir)) == [0] * ranks
        return run_dir

    return make


@pytest.mark.parametrize(
    ("ranks", "norm", "micro"),
    [
        (2, "none", "null"),
        (3, "none", "null"),
        (3, "group", "null"),
        (1, "none", 1),
        (1, "none", 3),
        (1, "none", 100),
        (2, "none", 3),  # one rank has two micro-batches, the other one
        (2, "group", 1),
    ],
)
def test_gradients_and_losses_are_those_of_one_rank(
    ranks: int, norm: str, micro: int | str, gradients
) -> None:
    alone, many = gradients(1, norm, "null"), gradients(ranks, norm, micro)
    for step in range(5):
        wanted = np.load(alone / f"gradients-{step}-0.npz")
        for rank in range(ranks):
            found = np.load(many / f"gradients-{step}-{rank}.npz")
            assert set(found) == set(wanted)
            for name in wanted:
                size = np.abs(wanted[name]).max()
                assert size > 0 or "bias" in name
                np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-6 * size)
    logged = [[row for row in metrics(run) if row["kind"] == "training"] for run in (alone, many)]
    assert [len(rows) for rows in logged] == [5, 5]
    for theirs, mine in zip(*logged, strict=True):
        for name in ("total", "cross_entropy", "dice", "gradient_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-5)


def test_samples_that_fill_up_a_batch_have_no_weight(dataset: Path, gradients) -> None:
    """The last batch's gradient is that of the mean loss of its five samples, by plain autograd."""
    run_dir = gradients(1, "none", "null")
    config, schema = read_config(run_dir / "config.yaml"), Schema.read(dataset)
    reader = SplitReader(dataset, schema, "train")
    order = Order(size=len(reader), batch_size=7, seed=config.seed)
    batch = order.batch(28)
    assert batch.count == 5
    tiles = order.tiles(batch)[:5].tolist()
    pixels = Pixels.allocate(schema, 5)
    for slot, tile in enumerate(tiles):
        decode_record(reader.read(tile), schema, pixels, slot)
    augment = Augment(
        config=config.augment,
        normaliser=Normaliser.of(schema, config.data.normalisation),
        crop=config.data.crop,
        seed=config.seed,
    )
    images, labels = augment(pixels.planes, pixels.labels, 0, tiles)
    model = load_run(run_dir, "cpu").module.train()
    weights = class_weights(reader.split.class_pixels, "sqrt", config.loss.max_class_weight)
    LabelSetLoss(weights, config.loss)(model(images), labels).total.mean().backward()
    found = np.load(run_dir / "gradients-4-0.npz")
    for name, parameter in model.named_parameters():
        size = parameter.grad.abs().max().item()
        np.testing.assert_allclose(found[name], parameter.grad.numpy(), rtol=0, atol=2e-5 * size + 1e-8)


def spoil(rank: int, *, bad: tuple[int, ...], folder: Path, on: int) -> None:
    """The loss of one rank is not a number in some steps; the state before and after them is kept."""
    if rank == on:
        original = trainer.LabelSetLoss.forward

        def forward(self: Any, logits: torch.Tensor, labels: torch.Tensor) -> Any:
            if step() in bad:
                logits = logits * torch.nan
            return original(self, logits, labels)

        trainer.LabelSetLoss.forward = forward
    accumulate = Trainer._accumulate
    current: list[Trainer] = []

    def step() -> int:
        return current[0].progress.step + 1 if current else 0  # buckets are arranged before any step

    def keep(self: Trainer, name: str) -> None:
        torch.save(self.model.state_dict(), folder / f"{name}-{rank}.pt")

    def accumulate_and_keep(self: Trainer, *args: Any) -> torch.Tensor:
        current[:] = [self]
        keep(self, f"before-{self.progress.step + 1}")
        return accumulate(self, *args)

    Trainer._accumulate = accumulate_and_keep


@pytest.mark.row(26)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_is_not_finite_on_one_rank_changes_nothing(
    ranks: int, dataset: Path, tmp_path: Path
) -> None:
    changes = PLAIN | {"training__epochs": 1, "training__ema_decay": 0.9, "training__max_steps": 5}
    hook = partial(spoil, bad=(3, 4), folder=tmp_path, on=ranks - 1)
    endings = hear(arguments(dataset, tmp_path / "run", **changes), ranks, hook=hook)
    assert [ending.code for ending in endings] == [0] * ranks
    said = [line for line in endings[0].err if "the loss was not finite in" in line]
    for line, step in zip(said, (3, 4), strict=True):  # the third step ends an interval of the log
        assert f"1 of the steps up to {step}: they are skipped" in line
    for rank in range(ranks):
        states = [torch.load(tmp_path / f"before-{step}-{rank}.pt") for step in (2, 3, 4, 5)]
        for name, value in states[1].items():
            if name.endswith("num_batches_tracked"):
                continue  # nothing is computed from it
            assert torch.equal(value, states[2][name]), name  # step 3 did nothing
            assert torch.equal(value, states[3][name]), name  # nor did step 4
            assert not torch.equal(value, states[0][name]), name  # step 2 did
    progress = checkpoint.load(checkpoint.folders(tmp_path / "run" / "checkpoints")[-1])
    state = progress.states["progress"]
    assert (state["step"], state["skipped"], state["in_a_row"]) == (5, 2, 0)
    assert len(samples(tmp_path / "run")) == 5


@pytest.mark.row(26)
def test_too_many_bad_losses_in_a_row_end_all_ranks(dataset: Path, tmp_path: Path) -> None:
    changes = PLAIN | {"training__max_nonfinite_steps": 3, "training__checkpoint_every_steps": 2}
    hook = partial(spoil, bad=(2, 4, 5, 6, 7), folder=tmp_path, on=1)
    endings = hear(arguments(dataset, tmp_path / "run", **changes), 2, hook=hook)
    assert [ending.code for ending in endings] == [ExitCode.HOPELESS] * 2
    assert all(
        "step 6" in ending.complaint and "optimizer.lr" in ending.complaint for ending in endings
    )
    assert last_bits(tmp_path / "run")[0] == 4  # the last one that was saved is still there, and whole
    checkpoint.load(checkpoint.folders(tmp_path / "run" / "checkpoints")[-1])


@pytest.mark.parametrize(
    ("moment", "count", "victim"),
    [
        ("forward", 1, 0),
        ("forward", 2, 1),
        ("forward", 4, 0),
        ("backward done", 3, 1),
        ("step done", 3, 0),
        ("saving", 1, 0),
        ("evaluating", 1, 1),
    ],
)
def test_a_rank_that_is_lost_costs_the_others_one_line(
    moment: Moment, count: int, victim: int, dataset: Path, tmp_path: Path
) -> None:
    kill = Disturbance(signal.SIGKILL, moment, count=count, rank=victim)
    command = arguments(dataset, tmp_path, **PLAIN, evaluation__batch_size=2)
    endings = hear(command, 2, disturbance=kill)
    assert endings[victim].code == -signal.SIGKILL
    survivor = endings[1 - victim]
    assert survivor.code == ExitCode.FAILED
    assert survivor.complaint.startswith("lost the other ranks")


def run_out_of_memory(rank: int) -> None:
    def backward(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")

    Trainer._backward = backward


def test_a_gpu_without_enough_memory_is_hopeless(dataset: Path, tmp_path: Path) -> None:
    ending = hear_one(arguments(dataset, tmp_path, **PLAIN), hook=run_out_of_memory)
    assert ending.code == ExitCode.HOPELESS
    assert "out of GPU memory" in ending.complaint


def steps_saved(run_dir: Path) -> list[int]:
    return [entry.step for entry in checkpoint.entries(run_dir / "checkpoints")]


def make_the_clock_run(rank: int) -> None:
    """Each time the loop asks the clock a minute has passed."""
    minutes, begin = count(1), time.monotonic()
    trainer.time = SimpleNamespace(monotonic=lambda: begin + 60 * next(minutes))


@pytest.mark.parametrize("ranks", [1, 2])
def test_saves_when_the_minutes_have_passed(ranks: int, dataset: Path, tmp_path: Path) -> None:
    changes = PLAIN | {
        "training__epochs": 1,
        "training__checkpoint_every_steps": "null",
        "training__checkpoint_every_minutes": 1.5,
    }
    assert run(arguments(dataset, tmp_path, **changes), ranks, hook=make_the_clock_run) == [0] * ranks
    assert steps_saved(tmp_path) == [2, 4, 6]


UNSCORED = {"evaluate_every_epochs": 0}


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"checkpoint_every_steps": "null"}, [6, 12, 18]),
        ({"checkpoint_every_steps": "null", "checkpoint_every_epochs": 2} | UNSCORED, [12, 18]),
        ({"checkpoint_every_steps": "null", "checkpoint_every_epochs": 0} | UNSCORED, [18]),
        ({"checkpoint_every_steps": 4, "checkpoint_every_epochs": 0} | UNSCORED, [4, 8, 12, 16, 18]),
        # What is scored is saved, whatever else is due.
        ({"checkpoint_every_steps": "null", "checkpoint_every_epochs": 0}, [6, 12, 18]),
        ({"checkpoint_every_steps": 4, "keep_last": 2, "evaluate_every_epochs": 0}, [16, 18]),
        ({"keep_last": 1, "keep_every": 2, "evaluate_every_epochs": 0}, [12, 18]),
        ({"max_steps": 7}, [5, 6, 7]),
        ({"max_steps": 1}, [1]),
    ],
    ids=str,
)
def test_saves_what_is_due_and_keeps_what_is_wanted(
    changes: dict[str, object], kept: list[int], dataset: Path, tmp_path: Path
) -> None:
    options = {f"training__{key}": value for key, value in changes.items()}
    assert run(arguments(dataset, tmp_path, **(PLAIN | options))) == [0]
    assert steps_saved(tmp_path) == kept
    evaluated = [row["step"] for row in metrics(tmp_path) if row["kind"] == "evaluation"]
    assert evaluated[-1] == kept[-1]  # the end is always scored


def score_as_told(rank: int) -> None:
    """The first evaluation finds the best score, the later ones find worse."""
    from agrivision.rundir import RunDirectory

    original = RunDirectory.evaluations

    def evaluations(self: RunDirectory) -> dict[int, float | None]:
        return {step: 1 / step for step in original(self)}

    RunDirectory.evaluations = evaluations


def test_the_best_checkpoint_is_kept(dataset: Path, tmp_path: Path) -> None:
    command = arguments(dataset, tmp_path, **PLAIN, training__keep_last=1)
    assert run(command, hook=score_as_told) == [0]
    assert steps_saved(tmp_path) == [6, 18]


@pytest.mark.parametrize(
    "changes",
    [{"model__convolution": "valid", "data__crop": 44}, {"training__precision": "bf16"}],
    ids=["valid", "bf16"],
)
def test_other_networks_learn_and_resume(
    changes: dict[str, object], dataset: Path, tmp_path: Path
) -> None:
    options = PLAIN | {"training__epochs": 4, "optimizer__lr": 0.01, "model__dropout": 0} | changes
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(arguments(dataset, whole, **options)) == [0]
    command = arguments(dataset, broken, **options)
    stop = Disturbance(signal.SIGTERM, "forward", count=8)
    assert run(command, disturbance=stop) == [ExitCode.STOPPED]
    assert run(command) == [0]
    assert_same(broken, whole)
    losses = [
        json.loads(line).get("total") for line in (whole / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < losses[0]


def save_slowly(rank: int, lead: str) -> None:
    """As in a Slurm step that asked to be warned `lead` seconds before its end, on a slow disk."""
    os.environ |= {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "AGRIVISION_SIGNAL_SECONDS": lead}
    encode = checkpoint._encode

    def slow(*args: Any) -> Any:
        time.sleep(0.2)
        return encode(*args)

    checkpoint._encode = slow


@pytest.mark.parametrize(("lead", "said"), [("1", 1), ("900", 0), ("0", 0)])
def test_a_warning_that_comes_too_late_to_save_is_said_once(
    lead: str, said: int, dataset: Path, tmp_path: Path
) -> None:
    # Five states at a fifth of a second each: a save takes a second, and half as much is added.
    changes = {**PLAIN, "training__checkpoint_every_steps": 2, "training__ema_decay": 0.9}
    hook = partial(save_slowly, lead=lead)
    ending = hear_one(arguments(dataset, tmp_path / "run", **changes), hook=hook)
    assert ending.code == 0
    lines = [line for line in ending.err if "ask for --signal=USR1@" in line]
    assert len(lines) == said
    assert all("warned 1 s before its time limit" in line for line in lines)
