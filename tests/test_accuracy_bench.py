"""The bench of accuracy: everybody is scored by the same count, nothing is run twice, tables add up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from agrivision.config import flatten
from agrivision.data.loader import evaluation_batches
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.errors import ConfigurationError
from agrivision.evaluation.score import score_folder
from agrivision.inference.trained import load_run
from agrivision.model.unet import UNet
from agrivision.world import World
from benchmarks.accuracy import bench, ours, tables
from benchmarks.accuracy.__main__ import _names, main
from benchmarks.accuracy.bench import PLAIN_RECIPE, RECOMMENDED, Job, plan, run
from benchmarks.accuracy.contestants import OURS, PEERS, PLAIN
from benchmarks.accuracy.ingredients import INGREDIENTS
from benchmarks.accuracy.outcome import score
from benchmarks.accuracy.plain import Normalise
from benchmarks.accuracy.results import Results, Row, key
from benchmarks.accuracy.task import Budget, Task
from benchmarks.accuracy.tiles import IGNORED, Crops, Tiles, first_label, read
from benchmarks.common import missing

RECIPES = Path(ours.__file__).parent


@pytest.fixture
def task(dataset: Path) -> Task:
    budget = Budget(steps=3, batch=4, crop=48, base_channels=4, depth=3)
    return Task(
        name="fields",
        dataset=dataset,
        budget=budget,
        plain=RECIPES / "plain.yaml",
        recommended=RECIPES / "fields.yaml",
    )


def test_every_ingredient_can_be_named_on_the_command_line() -> None:
    for name in INGREDIENTS:
        assert _names(name) == (name,)


def test_the_score_is_that_of_the_same_predictions_as_pngs(task: Task, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, normalise = UNet(4, 9, base_channels=4, depth=2).eval(), Normalise(task)

    def predict(pixels: torch.Tensor) -> torch.Tensor:
        return network(normalise(pixels)).argmax(1)

    reader = SplitReader(task.dataset, task.schema, "val")
    for batch in evaluation_batches(reader, World(), batch_size=3, threads=0):
        with torch.inference_mode():
            found = predict(batch.pixels.images()).to(torch.uint8).numpy()
        for tile, ids in zip(batch.tiles, found, strict=True):
            Image.fromarray(ids).save(tmp_path / f"{reader.key(tile)}.png")
    expected = score_folder(tmp_path, task.dataset, "val")
    assert expected.miou is not None and expected.miou > 0
    assert score(predict, task.dataset, "val") == expected


def test_ours_and_the_peers_are_scored_alike(task: Task, tmp_path: Path) -> None:
    settings = ours.settings(ours.resolved(task, task.plain))
    folder, steps, seconds = ours.train(task, 0, settings, tmp_path)
    assert steps == 3 and seconds > 0
    trained = load_run(folder, "cpu")
    assert trained.step == 3 and trained.description.model.base_channels == 4
    found = score(lambda p: trained.probabilities(p).argmax(1), task.dataset, "val")
    assert ours.evaluated(folder, task) == {"miou": found.miou, "iou": found.iou}


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_trains_and_the_seed_decides_what_it_learns(name: str, task: Task) -> None:
    if lacking := missing(*PEERS[name].needs):
        pytest.skip(f"not installed: {', '.join(lacking)}")
    outcome = PEERS[name].train(task, 0)
    assert outcome.iou.keys() == set(task.schema.classes) and 0 <= outcome.miou < 1
    assert outcome.parameters > 1000 and outcome.gflops > 0
    assert outcome.steps == 3  # the student's too, of two whole tiles instead of four crops
    again = PEERS[name].train(task, 0)
    assert (again.miou, again.iou) == (outcome.miou, outcome.iou)


def test_a_budget_is_a_number_of_pixels() -> None:
    budget = Budget(steps=100, batch=8, crop=64, base_channels=8, depth=4)
    assert budget.steps_of(8, 64) == 100
    assert budget.steps_of(2, 128) == 100
    assert budget.steps_of(16, 64) == 50
    assert budget.steps_of(8, 512) == 1  # at least one


def test_a_pixel_of_several_labels_has_the_first_and_others_do_not_count() -> None:
    valid = 1 << 15
    bits = torch.tensor([valid | 1, valid | 0b110, valid | 0b100, valid, 0b10, valid | 0b1000])
    assert first_label(bits.int(), 3).tolist() == [0, 1, 2, IGNORED, IGNORED, IGNORED]


def test_crops_move_pixels_and_labels_alike_and_reach_everywhere() -> None:
    torch.manual_seed(0)
    targets = torch.arange(36, dtype=torch.uint8).reshape(1, 6, 6)
    crops = Crops(Tiles(pixels=targets[:, None], targets=targets), 4)
    seen = [crops[0] for _ in range(200)]
    assert all((one["image"][0].long() == one["mask"]).all() for one in seen)
    assert {tuple(one["mask"].shape) for one in seen} == {(4, 4)}
    assert len({tuple(one["mask"].flatten().tolist()) for one in seen}) == 9 * 4


def test_a_split_in_memory_is_the_split(task: Task) -> None:
    tiles = read(task.dataset, "val")
    split = task.schema.split("val", labelled=True)
    assert tiles.pixels.shape == (split.tiles, 4, 64, 64) and tiles.pixels.dtype == torch.uint8
    assert int((tiles.targets != IGNORED).sum()) == split.pixels
    mean = Normalise(task)(read(task.dataset, "train").pixels.float()).mean()
    assert abs(float(mean)) < 0.2  # statistics are over valid pixels


def test_the_plain_recipe_is_the_plain_loop(task: Task) -> None:
    values = flatten(ours.resolved(task, task.plain).to_dict())
    assert values["optimizer.name"] == "adamw" and values["optimizer.lr"] == 1e-3
    assert values["optimizer.weight_decay"] == 0.01 and values["optimizer.clip_norm"] is None
    assert values["schedule.name"] == "constant" and values["schedule.warmup"] == 0
    assert values["loss.dice_weight"] == 0 and values["loss.class_weights"] == "none"
    assert not values["augment.rotate90"] and values["augment.flip"]
    assert not values["training.ema_decay"] and not values["training.tail_average"]


@pytest.mark.parametrize("recipe", ["fields.yaml", "naip.yaml"])
def test_every_line_of_a_recipe_is_an_ingredient_that_can_be_left_out(task: Task, recipe: str) -> None:
    task = replace(task, recommended=RECIPES / recipe)
    values = [flatten(ours.resolved(task, file).to_dict()) for file in (task.plain, task.recommended)]
    differ = {name for name in values[0] if values[0][name] != values[1][name]}
    had = [on for on in INGREDIENTS.values() if bench.is_in(on, values[1], values[0])]
    assert differ <= {name for on in had for name in on}


def test_a_contestant_that_there_is_not_is_named(task: Task) -> None:
    with pytest.raises(ConfigurationError, match=r"there is no 'smq' to take part: there are .*smp"):
        plan(task, ("peers",), [0], only=["smp", "smq"])


def test_the_plan_switches_each_ingredient_on_and_off(task: Task) -> None:
    jobs = plan(task, bench.PARTS, [0, 1])
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)
    first = [job for job in jobs if job.seed == 0]
    assert len(jobs) == 2 * len(first) == 2 * (2 + len(PEERS) + 2 * len(INGREDIENTS))
    by = {(job.recipe, job.change): job for job in first}
    plain, recommended = by[PLAIN_RECIPE, ""], by[RECOMMENDED, ""]
    assert recommended.settings["optimizer.lr"] == 1e-2
    dice = by[PLAIN_RECIPE, "+ Dice"]
    assert "loss.dice_weight" in plain.settings and "loss.dice_weight" not in dice.settings
    assert dice.base == plain.settings
    assert by[RECOMMENDED, "- Dice"].settings == {**recommended.settings, "loss.dice_weight": 0.0}
    focal = by[RECOMMENDED, "+ focal"]
    assert focal.settings == {**recommended.settings, "loss.focal_gamma": 2.0}


def test_all_runs_have_the_budget_and_nothing_of_the_machine(task: Task) -> None:
    for job in plan(task, ("on",), [0]):
        assert job.settings["data.batch_size"] == 4 and job.settings["data.crop"] == 48
        assert job.settings["model.base_channels"] == 4 and job.settings["model.depth"] == 3
        assert not {"seed", "data.path", "data.threads", "training.max_steps"} & job.settings.keys()


def test_a_misspelt_ingredient_is_one_line(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "INGREDIENTS", {"wrong": {"loss.dise_weight": 1.0}})
    with pytest.raises(ConfigurationError, match="dise_weight"):
        plan(task, ("on",), [0])


def _found(miou: float, **more: Any) -> Row:
    iou = {"background": 0.9, "water": 2 * miou - 0.9}
    sizes = {"steps": 3, "seconds": 60.0, "parameters": 490_000, "gflops": 0.1}
    return {"miou": miou, "iou": iou, **sizes, "symmetric": None, "machine": "one", **more}


def test_what_is_there_is_not_run_again(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    fails = {PLAIN}

    def result(_: Task, row: Row) -> Row:
        ran.append(row["contestant"] + row["change"] + str(row["seed"]))
        if row["contestant"] in fails:
            raise RuntimeError("killed")
        return _found(0.5)

    monkeypatch.setattr(bench, "_result", result)
    results = Results(tmp_path / "results.jsonl")
    jobs = plan(task, ("peers", "on"), [0, 1], only=[PLAIN, "Dice"])
    assert run(task, jobs, results, together=1) == 2  # both seeds of the one that fails
    assert sorted(ran) == sorted(
        f"{name}{seed}" for seed in (0, 1) for name in (OURS, OURS, f"{OURS}+ Dice", PLAIN)
    )
    ran.clear()
    fails.clear()
    assert run(task, jobs, results, together=2) == 0
    assert sorted(ran) == [f"{PLAIN}0", f"{PLAIN}1"]
    ran.clear()
    assert run(task, jobs, results, together=2) == 0 and ran == []
    # A run that is known under another name is taken over.
    same = [replace(job, change="+ the same") for job in jobs if job.change]
    assert run(task, same, results, together=1) == 0 and ran == []
    assert [row["change"] for row in results.rows()][-2:] == ["+ the same"] * 2
    # And another budget is another run.
    larger = replace(task, budget=replace(task.budget, steps=4))
    assert run(larger, jobs, results, together=1) == 0 and len(ran) == len(jobs)


def test_a_recipe_that_is_as_it_was_before_counts_again(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_result", lambda _, row: _found(row["settings"]["optimizer.lr"]))
    results = Results(tmp_path / "results.jsonl")

    def with_rate(rate: float) -> Job:
        settings = {"optimizer.lr": rate}
        return Job(contestant=OURS, recipe=RECOMMENDED, settings=settings, base=settings)

    for rate in (0.25, 0.5, 0.25):
        run(task, [with_rate(rate)], results, together=1)
    assert [row["miou"] for row in results.rows()] == [0.25, 0.5, 0.25]


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    results = Results(tmp_path / "new" / "results.jsonl")
    assert results.rows() == []
    results.add({"one": 1})
    with results.path.open("a") as file:
        file.write('{"tw')
    results.add({"three": 3})
    assert results.rows() == [{"one": 1}, {"three": 3}]


def _row(contestant: str, seed: int, miou: float, **more: Any) -> Row:
    budget = Budget(steps=3, batch=4, crop=32, base_channels=4, depth=2).to_dict()
    known = {"task": "fields", "data": "ab", "budget": budget, "contestant": contestant, "seed": seed}
    rest = {"recipe": "", "change": "", "settings": {}, "base": {}}
    return {**known, **rest, **_found(miou), **more}


def test_the_tables_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now, before = {"optimizer.lr": 3e-3}, {"optimizer.lr": 1e-2}
    recipe = {"recipe": RECOMMENDED, "base": now}
    turned = {"symmetric": {"miou": 0.65, "iou": {"background": 0.9, "water": 0.4}}}
    rows = [
        # Another recipe of that name, which has been given up.
        _row(OURS, 0, 0.95, recipe=RECOMMENDED, settings=before, base=before),
        _row(OURS, 0, 0.96, recipe=RECOMMENDED, settings=before, base=before, change="+ old"),
        _row(PLAIN, 0, 0.50),
        _row(PLAIN, 1, 0.52),
        _row(OURS, 0, 0.60, **recipe, settings=now, **turned),
        _row(OURS, 1, 0.64, **recipe, settings=now),
        _row(OURS, 0, 0.58, **recipe, settings={"a": 1}, change="- Dice"),
        _row(OURS, 1, 0.60, **recipe, settings={"a": 1}, change="- Dice"),
        _row(OURS, 0, 0.59, **recipe, settings={"b": 1}, change="+ focal"),
        _row(OURS, 1, 0.65, **recipe, settings={"b": 1}, change="+ focal"),
    ]
    results = Results(tmp_path / "results.jsonl")
    for row in rows:
        results.add(row)
    assert main(["table", "--results", str(results.path)]) == 0
    text = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert text.startswith("### fields: 3 steps of 4 crops of 32 x 32, UNet of 4 channels\n")
    by = {line[0]: line[1:] for line in lines if len(line) == 9}
    assert by["**agrivision, recommended recipe**"][:4] == ["62.0 ± 2.8", "60.0, 64.0", "34.0", ""]
    assert by[PEERS[PLAIN].title][:4] == ["51.0 ± 1.4", "50.0, 52.0", "12.0", "+11.0 ± 1.0"]
    assert by[PEERS[PLAIN].title][4:] == ["0.49", "0.10", "3", "60"]
    classes = {line[0]: line[1:] for line in lines if len(line) == 3}
    assert classes["IoU, %"] == ["background", "water"]
    assert classes[PEERS[PLAIN].title] == ["90.0", "12.0"]
    changes = [line for line in lines if len(line) == 6]
    assert [line[0] for line in changes[2:]] == [
        "**recommended recipe**",
        "+ all eight positions of a tile, averaged (prediction alone)",
        "+ focal",
        "- Dice",
    ]
    assert changes[3][3:5] == ["+5.0", "1 of 1"]
    assert changes[4][3:5] == ["+0.0 ± 1.0", "1 of 2"]
    assert changes[5][3:5] == ["-3.0 ± 1.0", "0 of 2"]


def test_tables_of_nothing() -> None:
    assert tables.tables([]) == "no results yet\n"


def test_a_run_is_known_by_what_decides_its_result() -> None:
    row = _row(OURS, 0, 0.5)
    assert key(row) == key(row | {"miou": 0.7, "change": "+ x", "machine": "two"})
    for name, other in {"seed": 1, "data": "cd", "settings": {"a": 1}, "contestant": PLAIN}.items():
        assert key(row) != key(row | {name: other})


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_the_whole_bench_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--folder", str(tmp_path)]
    words = ["run", "--quick", *where, "--seeds", "0", "--only", f"{','.join(PEERS)},Dice"]
    assert main(words) == 0
    rows = Results(tmp_path / "accuracy.jsonl").rows()
    there = [name for name, peer in PEERS.items() if not missing(*peer.needs)]
    assert sorted(row["contestant"] for row in rows) == sorted([OURS] * 4 + there)
    assert {row["data"] for row in rows} == {Schema.read(tmp_path / "synthetic-48x64").fingerprint}
    assert main(words) == 0
    assert Results(tmp_path / "accuracy.jsonl").rows() == rows
    assert main(["table", *where]) == 0
    assert "- Dice" in capsys.readouterr().out


def test_seconds_are_a_budget_too(task: Task) -> None:
    """A loop that is given no time takes one step; the key says so."""
    hasty = replace(task, budget=replace(task.budget, seconds=0.001))
    assert PEERS[PLAIN].train(hasty, 0).steps == 1
    assert json.loads(key(Job(contestant=PLAIN).row(hasty)))["budget"]["steps"] is None
