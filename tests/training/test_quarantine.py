"""Damaged tiles: out from their first occurrence, on any number of ranks, in each attempt."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agrivision import checkpoint
from agrivision.data import loader, shards
from agrivision.data.augment import Augment
from agrivision.data.decode import Pixels, decode_record
from agrivision.data.labels import compress
from agrivision.data.normalise import Normaliser
from agrivision.data.order import Order
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.errors import ExitCode
from agrivision.inference.trained import load_run
from agrivision.model.losses import LabelSetLoss, class_weights
from agrivision.options import read_config
from tests.data.test_repair import cut_jpeg, one_band, write_again
from tests.heard import hear
from tests.ranks import Disturbance, run
from tests.training.runs import arguments, assert_same, last_bits, metrics, samples
from tests.training.test_trainer import GRADIENTS, PLAIN, keep_gradients

# 33 tiles train: up to 8 of them may be damaged; 10 validate: up to 2.
SOME = {"data__max_damaged_share": 0.25}
SHORT = PLAIN | SOME | {"training__epochs": 2, "training__checkpoint_every_steps": 3}


def flip(folder: Path, split: str, *tiles: int) -> None:
    """Change a byte of each tile; the same again makes it whole."""
    reader = SplitReader(folder, Schema.read(folder), split)
    for tile in tiles:
        shard, row = reader.locate(tile)
        place = int(shard.index["offsets"][row][0]) + 30
        with shard.path.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 0x10]))


@pytest.fixture(scope="module")
def damaged(dataset: Path, tmp_path_factory: pytest.TempPathFactory):
    """Copies of the data set in which some training tiles are damaged."""
    folder = tmp_path_factory.mktemp("damaged")

    @cache
    def make(*tiles: int) -> Path:
        copy = Path(shutil.copytree(dataset, folder / "-".join(map(str, tiles))))
        flip(copy, "train", *tiles)
        return copy

    return make


@pytest.fixture
def mine(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "mine"))


def keys(folder: Path, *tiles: int, split: str = "train") -> set[str]:
    reader = SplitReader(folder, Schema.read(folder), split)
    return {reader.key(tile) for tile in tiles}


def rows(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "quarantine.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def saved(run_dir: Path) -> list[dict[str, Any]]:
    """The list in the last checkpoint."""
    newest = checkpoint.latest(run_dir / "checkpoints")
    assert newest is not None
    found: list[dict[str, Any]] = newest.states["progress"]["quarantine"]
    return found


def assert_out(run_dir: Path, folder: Path, dataset: Path, *tiles: int, epochs: int = 2) -> None:
    """These tiles, and no other, were never counted; each step is that of the undamaged data set."""
    out = keys(dataset, *tiles)
    assert {row["key"] for row in rows(run_dir)} == out
    reader = SplitReader(dataset, Schema.read(dataset), "train")
    config = read_config(run_dir / "config.yaml")
    order = Order(size=len(reader), batch_size=config.data.batch_size, seed=config.seed)
    found, cursor, step = samples(run_dir), 0, 0
    while cursor < epochs * len(reader):
        batch, step = order.batch(cursor), step + 1
        wanted = [reader.key(tile) for tile in order.tiles(batch)[: batch.count].tolist()]
        assert found[batch.epoch, step] == [key for key in wanted if key not in out]
        cursor = batch.next_cursor
    assert len(found) == step


# Ranks

LOST = (2, 3, 11, 20, 30)


@pytest.fixture(scope="module")
def gradients(damaged, tmp_path_factory: pytest.TempPathFactory):
    """Runs over damaged tiles that kept their gradients, by ranks, norm and micro-batch."""
    folder = tmp_path_factory.mktemp("gradients")

    @cache
    def make(ranks: int, norm: str, micro: int | str) -> Path:
        run_dir = folder / f"{ranks}-{norm}-{micro}"
        run_dir.mkdir()
        changes = SOME | {"model__norm": norm, "training__micro_batch_size": micro}
        command = arguments(damaged(*LOST), run_dir, **(GRADIENTS | changes))
        assert run(command, ranks, hook=partial(keep_gradients, run_dir)) == [0] * ranks
        return run_dir

    return make


@pytest.mark.parametrize(
    ("ranks", "norm", "micro"),
    [(2, "none", "null"), (3, "group", "null"), (1, "none", 2), (2, "group", 1)],
)
def test_gradients_are_those_of_one_rank(
    ranks: int, norm: str, micro: int | str, gradients, dataset: Path
) -> None:
    alone, many = gradients(1, norm, "null"), gradients(ranks, norm, micro)
    assert rows(alone) == rows(many) == saved(alone) == saved(many)
    assert_out(many, many, dataset, *LOST, epochs=1)
    for step in range(5):
        wanted = np.load(alone / f"gradients-{step}-0.npz")
        for rank in range(ranks):
            found = np.load(many / f"gradients-{step}-{rank}.npz")
            for name in wanted:
                size = np.abs(wanted[name]).max()
                np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-6 * size)


def test_a_damaged_tile_has_no_weight_and_the_others_keep_theirs(gradients, dataset: Path) -> None:
    """By plain autograd: the sum over the tiles that count, over the number that the batch has.

    In the damaged tiles' places are here the tiles as they were.
    """
    run_dir = gradients(1, "none", "null")
    config, schema = read_config(run_dir / "config.yaml"), Schema.read(dataset)
    reader = SplitReader(dataset, schema, "train")
    order, cursor, seen = Order(size=len(reader), batch_size=7, seed=config.seed), 0, set()
    augment = Augment(
        config=config.augment,
        normaliser=Normaliser.of(schema, config.data.normalisation),
        crop=config.data.crop,
        seed=config.seed,
    )
    newest = checkpoint.latest(run_dir / "checkpoints")
    assert newest is not None
    states = newest.states
    for step in range(5):
        batch = order.batch(cursor)
        cursor = batch.next_cursor
        if step == 0:
            continue  # biases are zero then, and a pixel of zeros is on the edge of a ReLU
        tiles = order.tiles(batch).tolist()
        counts = [slot < batch.count and tile not in LOST for slot, tile in enumerate(tiles)]
        seen.add(sum(counts))
        pixels = Pixels.allocate(schema, len(tiles))
        for slot, tile in enumerate(tiles):
            decode_record(reader.read(tile), schema, pixels, slot)
        images, labels = augment(pixels.planes, pixels.labels, 0, tiles)
        model = load_run(run_dir, "cpu").module.train().double()
        model.load_state_dict(states["model"])  # in double precision, which `load_run` rounds
        weights = class_weights(reader.split.class_pixels, "sqrt", config.loss.max_class_weight)
        losses = LabelSetLoss(weights, config.loss)(model(images.double()), labels)
        (losses.total[counts].sum() / batch.count).backward()
        found = np.load(run_dir / f"gradients-{step}-0.npz")
        for name, parameter in model.named_parameters():
            size = parameter.grad.abs().max().item()
            wanted = parameter.grad.numpy()
            np.testing.assert_allclose(found[name], wanted, rtol=0, atol=1e-6 * size + 1e-12)
    assert len(seen) > 1


INVARIANT = SHORT | {"training__invariant": "true", "training__micro_batch_size": 2}


def test_in_the_invariant_mode_the_bits_are_those_of_one_rank(
    damaged, dataset: Path, tmp_path: Path
) -> None:
    """With BatchNorm, whose statistics see what stands in a damaged tile's place."""
    for ranks in (1, 2, 3):
        command = arguments(damaged(*LOST), tmp_path / str(ranks), **INVARIANT)
        assert run(command, ranks) == [0] * ranks
    for ranks in (2, 3):
        assert_same(tmp_path / str(ranks), tmp_path / "1")
        assert rows(tmp_path / str(ranks)) == rows(tmp_path / "1")
    assert_out(tmp_path / "3", damaged(*LOST), dataset, *LOST)


# Kinds of damage


def cut(folder: Path) -> None:
    path = folder / "train/00001.tar"
    os.truncate(path, path.stat().st_size // 2)


def lose(folder: Path) -> None:
    (folder / "train/00001.tar").unlink()


def lose_index(folder: Path) -> None:
    (folder / "train/00001.index.npy").write_bytes(b"")


def harm_first(folder: Path, harm: Callable[[dict[str, bytes]], None]) -> None:
    write_again(folder, "train", 1, lambda row, files: harm(files) if row == 0 else None)


@pytest.mark.row(24)
@pytest.mark.parametrize(
    ("harm", "lost", "said"),
    [
        (cut, 7, "train/00001.tar has "),
        (lose, 7, "cannot open train/00001.tar: No such file"),
        (lose_index, 7, "train/00001.index.npy is damaged"),
        (partial(flip, split="train"), 1, "train/00001.tar is damaged: its checksum differs"),
        (partial(harm_first, harm=cut_jpeg), 1, "train/00001.tar: rgb.jpg: not a whole JPEG"),
        (partial(harm_first, harm=one_band), 1, "rgb.jpg: 64 x 64 pixels with 1 band where"),
    ],
    ids=["cut", "gone", "index", "flipped", "undecodable", "bands"],
)
def test_each_damage_is_named_and_counted(
    harm: Any, lost: int, said: str, mine: Path, dataset: Path, tmp_path: Path
) -> None:
    if isinstance(harm, partial) and harm.func is flip:
        flip(mine, "train", 7)
    else:
        harm(mine)
    endings = hear(arguments(mine, tmp_path / "run", **SHORT), 2)
    assert [ending.code for ending in endings] == [0, 0], endings
    tiles = range(7, 7 + lost)
    found = rows(tmp_path / "run")
    assert {row["tile"] for row in found} == set(tiles)
    assert all(said in row["why"] and row["shard"] == "train/00001.tar" for row in found)
    assert found == saved(tmp_path / "run")
    lines = [line for line in endings[0].err if "is left out from step" in line]
    assert len(lines) == lost
    for row, line in zip(found, lines, strict=True):
        name = row["key"] or f"number {row['tile']} of train"
        assert f"tile {name} is left out from step {row['step']} on: {row['why']}" in line
    assert not any("left out from step" in line for line in endings[1].err)
    if harm is not lose_index:
        assert_out(tmp_path / "run", mine, dataset, *tiles)
    last = [row for row in metrics(tmp_path / "run") if row["kind"] == "training"][-1]
    assert last["quarantined"] == lost


# Attempts


@pytest.mark.row(24)
def test_resumed_the_decision_is_the_same_whatever_the_disk_says_then(
    damaged, mine: Path, dataset: Path, tmp_path: Path
) -> None:
    """The tiles are whole again when the run goes on, and it does not look."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(arguments(damaged(*LOST), whole, **SHORT), 2) == [0, 0]
    flip(mine, "train", *LOST)
    command = arguments(mine, broken, **SHORT)
    stop = Disturbance(signal.SIGTERM, "forward", count=6)  # the sixth of twelve steps
    assert run(command, 2, disturbance=stop) == [ExitCode.STOPPED] * 2
    known = rows(broken)
    assert known == saved(broken) and known
    assert len(known) == len(LOST)  # an epoch has six steps
    flip(mine, "train", *LOST)
    (broken / "quarantine.jsonl").write_text("something else")
    assert run(command, 2) == [0, 0]
    assert_same(broken, whole)
    assert rows(broken) == rows(whole) == known


def test_killed_before_a_save_it_finds_them_again(damaged, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(arguments(damaged(*LOST), whole, **SHORT)) == [0]
    command = arguments(damaged(*LOST), broken, **SHORT)
    kill = Disturbance(signal.SIGKILL, "forward", count=6)
    assert run(command, disturbance=kill) == [-signal.SIGKILL]
    assert run(command) == [0]
    assert_same(broken, whole)
    assert rows(broken) == rows(whole)


def test_whoever_resumes_with_changes_reads_them_again(
    mine: Path, dataset: Path, tmp_path: Path
) -> None:
    flip(mine, "train", *LOST)
    command = arguments(mine, tmp_path / "run", **SHORT)
    first = [*command, "--training.max_steps", "6"]
    assert run(first) == [0]
    assert len(rows(tmp_path / "run")) == len(LOST)
    flip(mine, "train", *LOST)
    assert run([*command, "--training.max_steps", "null", "--resume_with_changes"]) == [0]
    assert rows(tmp_path / "run") == []
    second = [key for (epoch, _), some in samples(tmp_path / "run").items() if epoch for key in some]
    assert len(second) == len(SplitReader(dataset, Schema.read(dataset), "train"))


# Too many


@pytest.mark.row(24)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_over_the_threshold_all_ranks_save_and_stop(
    ranks: int, damaged, mine: Path, tmp_path: Path
) -> None:
    """What made it stop is not held against the data: repaired, the run is that of the first damage."""
    order = Order(size=33, batch_size=6, seed=0)
    places = [order.tiles(order.batch(cursor)).tolist() for cursor in range(0, 33, 6)]
    first, second = places[1][0], places[3][5]
    # Three ranks add up floats in an order that a resumed run may change, but for the invariant mode.
    one = (INVARIANT if ranks == 3 else SHORT) | {"data__max_damaged_share": 0.04}  # of 33: 1
    flip(mine, "train", first, second)
    run_dir = tmp_path / "run"
    command = arguments(mine, run_dir, **one)
    endings = hear(command, ranks)
    assert [ending.code for ending in endings] == [ExitCode.BAD_INPUT] * ranks, endings
    (name,) = keys(mine, second)
    for ending in endings:
        assert f"2 of 33 tiles of {mine}/train cannot be read, at most 1 may be" in ending.complaint
        assert f"tile {name}: " in ending.complaint and f"{mine}/train/0000" in ending.complaint
        assert f"`agrivision inspect {mine} --verify`" in ending.complaint
        assert f"`agrivision prepare SOURCE {mine} --repair`" in ending.complaint
    assert {row["tile"] for row in saved(run_dir)} == {row["tile"] for row in rows(run_dir)} == {first}
    assert max(step for _, step in samples(run_dir)) == 3
    endings = hear(command, ranks)  # nothing was repaired: it says the same at once
    assert [ending.code for ending in endings] == [ExitCode.BAD_INPUT] * ranks, endings
    assert max(step for _, step in samples(run_dir)) == 3
    flip(mine, "train", second)
    assert run(command, ranks) == [0] * ranks
    reference = tmp_path / "reference"
    assert run(arguments(damaged(first), reference, **one), ranks) == [0] * ranks
    assert_same(run_dir, reference)


# What passes


def refuse(rank: int, *, on: int, times: int | None, after: int, number: int = errno.EIO) -> None:
    """The disk refuses to read, some times in a row for each record or, with None, for good."""
    loader._PAUSES = (0.0, 0.0, 0.0)
    if rank != on:
        return
    original, calls, refused = os.preadv, [0], {}

    def preadv(descriptor: int, pieces: Any, place: int) -> int:
        calls[0] += 1
        if calls[0] > after:
            what = (os.fstat(descriptor).st_ino, place)
            refused[what] = refused.get(what, 0) + 1
            if times is None or refused[what] <= times:
                raise OSError(number, os.strerror(number))
        return original(descriptor, pieces, place)

    shards.os = _Os(preadv)


class _Os:
    """The module with another function."""

    def __init__(self, preadv: Any) -> None:
        self.preadv = preadv

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_what_passes_leaves_no_trace(number: int, dataset: Path, tmp_path: Path) -> None:
    plain, shaken = tmp_path / "plain", tmp_path / "shaken"
    assert run(arguments(dataset, plain, **SHORT), 2) == [0, 0]
    hook = partial(refuse, on=1, times=3, after=20, number=number)
    assert run(arguments(dataset, shaken, **SHORT), 2, hook=hook) == [0, 0]
    assert_same(shaken, plain)
    assert not (shaken / "quarantine.jsonl").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_is_gone_damages_no_tile(ranks: int, dataset: Path, tmp_path: Path) -> None:
    """The attempt ends with the code that lets it be tried again, and the next loses nothing."""
    plain, shaken = tmp_path / "plain", tmp_path / "shaken"
    assert run(arguments(dataset, plain, **SHORT), ranks) == [0] * ranks
    command = arguments(dataset, shaken, **SHORT)
    hook = partial(refuse, on=ranks - 1, times=None, after=12)
    endings = hear(command, ranks, hook=hook)
    assert [ending.code for ending in endings] == [ExitCode.FAILED] * ranks, endings
    for ending in endings:
        assert f"rank {ranks - 1} can read none of its tiles" in ending.complaint
        assert "Input/output error" in ending.complaint
    assert saved(shaken) == rows(shaken) == []
    assert run(command, ranks) == [0] * ranks
    assert_same(shaken, plain)


# Validation


def test_the_score_is_exact_over_what_could_be_read(mine: Path, dataset: Path, tmp_path: Path) -> None:
    flip(mine, "val", 4)
    found = {}
    for ranks in (1, 2):
        run_dir = tmp_path / str(ranks)
        command = arguments(mine, run_dir, **INVARIANT, evaluation__batch_size=2)
        endings = hear(command, ranks)
        assert [ending.code for ending in endings] == [0] * ranks, endings
        scored = [row for row in metrics(run_dir) if row["kind"] == "evaluation"]
        assert [row["left_out"] for row in scored] == [1, 1]
        (name,) = keys(mine, 4, split="val")
        lines = [line for line in endings[0].err if f"tile {name} is left out of the score" in line]
        assert len(lines) == 1 and "val/0000" in lines[0]
        found[ranks] = scored
        assert not (run_dir / "quarantine.jsonl").exists()
    assert found[1] == found[2]
    whole = tmp_path / "all"
    assert run(arguments(dataset, whole, **INVARIANT)) == [0]
    assert [row for row in metrics(whole) if row["kind"] == "training"] == [
        row for row in metrics(tmp_path / "1") if row["kind"] == "training"
    ]
    # What was left out is what a copy without a valid pixel in that tile gives.
    blank = Path(shutil.copytree(dataset, tmp_path / "blank"))
    _blank(blank, 4)
    assert run(arguments(blank, tmp_path / "blanked", **INVARIANT)) == [0]
    scored = [row for row in metrics(tmp_path / "blanked") if row["kind"] == "evaluation"]
    assert [(row["miou"], row["iou"]) for row in scored] == [
        (row["miou"], row["iou"]) for row in found[1]
    ]


def _blank(folder: Path, tile: int) -> None:
    schema = Schema.read(folder)
    reader = SplitReader(folder, schema, "val")
    shard, wanted = reader.locate(tile)
    number = int(shard.path.stem)
    empty = compress(np.zeros((schema.tile, schema.tile), np.uint16))

    def change(row: int, files: dict[str, bytes]) -> None:
        if row == wanted:
            files["labels.zst"] = empty

    write_again(folder, "val", number, change)


@pytest.mark.row(24)
def test_too_many_in_the_validation_split_end_all_ranks(mine: Path, tmp_path: Path) -> None:
    flip(mine, "val", 0, 4, 7)
    endings = hear(arguments(mine, tmp_path / "run", **SHORT), 2)
    assert [ending.code for ending in endings] == [ExitCode.BAD_INPUT] * 2, endings
    for ending in endings:
        assert f"3 of 10 tiles of {mine}/val cannot be read, at most 2 may be" in ending.complaint
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.step == 6  # the first epoch is saved


def test_the_command_that_scores_takes_nothing_damaged(
    mine: Path, dataset: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert run(arguments(dataset, run_dir, **SHORT)) == [0]
    flip(mine, "val", 4)
    endings = hear(["evaluate", "--checkpoint", run_dir, "--data", mine], 2)
    assert [ending.code for ending in endings] == [ExitCode.BAD_INPUT] * 2
    assert all(f"1 of 10 tiles of {mine}/val cannot be read: tile" in e.complaint for e in endings)


def test_two_runs_differ_where_the_damage_does(damaged, tmp_path: Path) -> None:
    """What the equalities above compare is not the same whatever is damaged."""
    for name, tiles in (("some", LOST), ("other", LOST[:-1])):
        assert run(arguments(damaged(*tiles), tmp_path / name, **INVARIANT)) == [0]
    assert last_bits(tmp_path / "some") != last_bits(tmp_path / "other")
