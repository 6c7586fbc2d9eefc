"""The report: its numbers are those of the rows, and nothing in it is markup from elsewhere."""

import base64
import copy
import json
import re
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest

from agrivision.charts import SERIES, Line
from agrivision.cli import main
from agrivision.config import flatten
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.errors import BadInput
from agrivision.inference.trained import load_run
from agrivision.pages import DASH
from agrivision.report.figures import apart, column_shares, file_names
from agrivision.report.history import read_history
from agrivision.report.page import differences, display_names
from agrivision.report.tiles import draw_tiles
from agrivision.report.words import span_words
from agrivision.report.write import write_report
from tests.report.made import (
    BEGAN,
    CONFIG,
    CONFUSION,
    EVIL,
    Parsed,
    attempt,
    attributes_that_fetch,
    evaluation,
    interrupted_run,
    make_run,
    training,
    whole_evaluation,
)
from tests.training.runs import arguments

NOW = BEGAN + 100_000.0


def reported(out: Path, *runs: Path, tiles: int = 1, charts: Path | None = None) -> Parsed:
    write_report(runs, out, tiles=tiles, charts=charts, now=NOW)
    return Parsed(out.read_bytes())


def changed(**values: object) -> dict[str, object]:
    config = copy.deepcopy(CONFIG)
    for key, value in values.items():
        section, name = key.split("__")
        config[section][name] = value  # type: ignore[index]
    return config


def test_the_numbers_are_those_of_the_rows(tmp_path: Path) -> None:
    parsed = reported(tmp_path / "out.html", interrupted_run(tmp_path / "run"))
    texts = parsed.texts
    assert "Finished · best mIoU 0.600 at step 20 · 40 steps · 4 attempts" in texts
    for name, value in (
        ("Best mIoU", "0.600"),
        ("at step", "20"),
        ("Steps done", "40"),
        ("Epochs done", "4"),
        ("Attempts", "4"),
        ("Time at work", "21 min 40 s"),
        ("GPU hours", "1.4"),  # 1,300 s on four ranks
        ("Images per second", "20"),
    ):
        assert parsed.row(name, 1) == [value]
    best = texts[texts.index("At the best evaluation, step 20") :]
    assert best[1:6] == ["Class", "IoU", "Precision", "Recall", "F1"]
    assert best[6:11] == ["background", "0.875", "0.968", "0.900", "0.933"]
    assert best[11:16] == ["water", "0.467", "0.583", "0.700", "0.636"]
    assert best[16:21] == ["weed_cluster", DASH, DASH, DASH, DASH]
    assert best[21:26] == ["Mean", "0.600", "0.776", "0.800", "0.784"]
    assert "At the last evaluation, step 40" in best
    assert parsed.row("From beginning to end", 1) == ["40 min 0 s"]
    assert parsed.row("Time waiting for data", 1) == ["25.0 %"]
    assert parsed.row("Evaluating", 1) == ["2 evaluations, 4 s"]
    assert parsed.row("Energy", 1) == ["no row tells it"]
    assert [text for text in texts if "The data set is not at nowhere any more" in text] != []
    listing = next(text for text in texts if text.startswith("seed: 0"))
    assert "  lr: 0.001" in listing.splitlines()


def test_three_interruptions_are_a_row_each(tmp_path: Path) -> None:
    parsed = reported(tmp_path / "out.html", interrupted_run(tmp_path / "run"))
    first = parsed.texts.index("How it ended") + 1
    silent = "without a word: killed, or lost with its node"
    rows = [
        ["1", "08:00", "5 min 0 s", "1 to 10", "asked to stop (SIGTERM)"],
        ["2", "08:10", "1 min 40 s", "11 to 20", silent],
        ["3", "08:20", "5 min 0 s", "21 to 30", "rank 2 is gone"],
        ["4", "08:30", "10 min 0 s", "31 to 40", "finished"],
    ]
    for number, (name, clock, span, steps, why) in enumerate(rows):
        cells = parsed.texts[first + 8 * number : first + 8 * number + 8]
        began = f"2027-01-15 {clock} UTC"
        assert cells == [name, began, span, steps, "node1", "4", "NVIDIA H200", why]


def test_energy_and_gpu_figures_are_added_up(tmp_path: Path) -> None:
    gpu = {"utilisation": 0.5, "power_watts": 600.0, "energy_joules": 1.8e6}  # of all together
    rows = [training(s, time=BEGAN + 10.0 * s, gpu=gpu) for s in range(1, 9)]
    run = make_run(tmp_path / "run", rows, attempts=[attempt(0, 0)])
    parsed = reported(tmp_path / "out.html", run, charts=tmp_path / "figures")
    assert parsed.row("Energy of the GPUs", 1) == ["4 kWh, for the steps that were kept"]
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"utilisation.svg", "power_watts.svg", "images_per_second.svg", "loss.svg"} <= names
    assert b"Minutes since" not in (tmp_path / "figures" / "loss.svg").read_bytes()


def test_rates_are_means_over_time(tmp_path: Path) -> None:
    """Three rows of as many steps, one of which took ten times as long."""
    rows = [
        training(10 * n, images_per_second=rate, megapixels_per_second=rate / 10, waiting_share=share)
        for n, (rate, share) in enumerate([(100.0, 0.0), (100.0, 0.0), (10.0, 0.6)], 1)
    ]
    parsed = reported(tmp_path / "out.html", make_run(tmp_path / "run", rows))
    assert parsed.row("Megapixels per second", 1) == ["2.5"]
    assert parsed.row("Time waiting for data", 1) == ["50.0 %"]


def test_charts_of_runs_with_like_names_have_files_of_their_own() -> None:
    water, wood = "\N{CJK UNIFIED IDEOGRAPH-6C34}", "\N{CJK UNIFIED IDEOGRAPH-6728}"
    names = [water, wood, "lr=1/x", "lr 1 x", "a" * 70, "a" * 71]
    found = file_names(names)
    assert list(found) == names and len(set(found.values())) == len(names)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (59.4, "59 s"),
        (61, "1 min 1 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (86399, "1 d 0 h"),
        (172799, "2 d 0 h"),
        (90000, "1 d 1 h"),
    ],
)
def test_a_stretch_of_time_in_its_two_largest_units(seconds: float, words: str) -> None:
    assert span_words(seconds) == words


def test_the_figures_stand_in_the_page_and_beside_it(tmp_path: Path) -> None:
    run = interrupted_run(tmp_path / "run")
    parsed = reported(tmp_path / "out.html", run, charts=tmp_path / "figures")
    names = sorted(path.stem for path in (tmp_path / "figures").iterdir())
    assert names == ["confusion", "gradient_norm", "images_per_second", "iou", "learning_rate", "loss",
                     "waiting_share"]  # fmt: skip
    pictures = parsed.all("img")
    assert len(pictures) == len(names) == len(parsed.all("source"))
    assert all(picture["alt"] and picture["width"] and picture["height"] for picture in pictures)
    for picture in pictures:
        content = base64.b64decode(picture["src"].partition(",")[2])
        assert content.startswith(b"<?xml")


def test_the_matrix_is_divided_by_the_true_class() -> None:
    shares = column_shares(CONFUSION)
    assert shares[:, 0].tolist() == [0.9, 0.05, 0.05]
    assert shares[:, 1].tolist() == [0.3, 0.7, 0.0]
    assert np.isnan(shares[:, 2]).all()


def test_no_line_is_drawn_from_one_attempt_to_the_next() -> None:
    x = np.array([1.0, 2, 3, 10, 11, 30])
    pieces = apart(Line(name="", x=x, y=-x, color=SERIES[0]), [3, 5])
    assert [piece.x.tolist() for piece in pieces] == [[1, 2, 3], [10, 11], [30]]
    assert [piece.y.tolist() for piece in pieces] == [[-1, -2, -3], [-10, -11], [-30]]


def test_two_runs_differ_in_exactly_these_keys(tmp_path: Path) -> None:
    other = changed(optimizer__lr=0.01, data__batch_size=16)
    other["model"] = {"depth": 4}
    first = interrupted_run(tmp_path / "one")
    second = make_run(tmp_path / "two", [training(8), evaluation(8, 0.25)], config=other)
    histories = [read_history(path, NOW) for path in (first, second)]
    assert differences(histories) == ("data.batch_size", "model.depth", "optimizer.lr")
    parsed = reported(tmp_path / "out.html", first, second)
    start = parsed.texts.index("Key")
    assert parsed.texts[start : start + 13] == [
        "Key", "one", "two",
        "data.batch_size", "8", "16",
        "model.depth", "not there", "4",
        "optimizer.lr", "0.001", "0.01",
        "Side by side",
    ]  # fmt: skip
    assert parsed.marked == [
        "batch_size: 8", "lr: 0.001", "batch_size: 16", "lr: 0.01", "depth: 4",
    ]  # fmt: skip
    table = parsed.texts[parsed.texts.index("Images/s") :]
    assert table[2:10] == ["one", "finished", "0.600", "20", "40", "21 min 40 s", "1.4", "20"]
    assert table[11:15] == ["two", "not known", "0.250", "8"]
    alts = [picture["alt"] for picture in parsed.all("img")]
    for quantity in ("Training loss", "mIoU", "Learning rate", "IoU of water"):
        assert f"{quantity} of one and two by step." in alts


def test_runs_that_are_alike_say_so(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "run", [training(8)]) for name in ("a", "b")]
    assert display_names(runs) == ["a/run", "b/run"]
    parsed = reported(tmp_path / "out.html", *runs)
    assert "Nothing: all have the same configuration." in parsed.texts
    assert parsed.marked == []
    with pytest.raises(BadInput, match="given twice"):
        reported(tmp_path / "out.html", runs[0], tmp_path / "a" / ".." / "a" / "run")


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    runs = interrupted_run(tmp_path / "one"), make_run(tmp_path / "two", [training(8)])
    folders = [tmp_path / "first", tmp_path / "second"]
    pages = []
    for folder in folders:
        write_report(runs, tmp_path / "out.html", tiles=1, charts=folder, now=NOW)
        pages.append((tmp_path / "out.html").read_bytes())
    assert pages[0] == pages[1]
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]


def test_no_text_becomes_markup_and_nothing_is_fetched(tmp_path: Path) -> None:
    evil = EVIL.replace("\n", " ").replace("\u202e", "").strip()  # what rows may hold
    shares = {evil: 0.5, "https://example.org/x.png": 0.25}
    row = evaluation(8, 0.375, iou=shares, best={evil: [[evil, 0.5]]}, worst={})
    row |= {"confusion": [[1, 2], [3, 4]], "loss": {evil: 1.0}}
    run = make_run(
        tmp_path / "<b>&run",
        [training(8), row],
        attempts=[attempt(0, 0, host=evil, commit=evil, device=evil, packages={evil: evil})],
        config={"data": {"path": EVIL, EVIL: EVIL}, EVIL: [EVIL]},
    )
    parsed = reported(tmp_path / "out.html", run, charts=tmp_path / "figures")
    assert parsed.all("script") == [] and parsed.all("b") == [] and parsed.all("a") == []
    assert evil in parsed.texts
    assert [
        value for value in attributes_that_fetch(parsed) if not value.startswith("data:image/")
    ] == []
    assert not any("style" in attributes for _, attributes in parsed.elements)
    text = (tmp_path / "out.html").read_text()
    assert "default-src 'none'; img-src data:" in text
    assert [url for url in re.findall(r"(?:url\(|@import)[^)]*", text) if "data:" not in url] == []


def test_the_classes_have_their_shares_of_the_data_set(tmp_path: Path, dataset: Path) -> None:
    schema = Schema.read(dataset)
    iou: dict[str, float | None] = dict.fromkeys(schema.classes, 0.5)
    run = make_run(
        tmp_path / "run",
        [training(8), evaluation(8, 0.5, iou=iou)],
        attempts=[attempt(0, 0, data_fingerprint=schema.fingerprint)],
        config=changed(data__path=str(dataset)),  # type: ignore[arg-type]
    )
    split = schema.split("train")
    parsed = reported(tmp_path / "out.html", run)
    scores = parsed.texts[parsed.texts.index("At the last evaluation, step 8, which is the best") :]
    assert scores[1:5] == ["Class", "IoU", "Pixels", "Tiles"]
    for number, name in enumerate(schema.classes):
        pixels = split.class_pixels[number] / split.pixels
        tiles = split.class_tiles[number] / split.tiles
        cells = scores[5 + 4 * number : 9 + 4 * number]
        assert cells[:2] == [name, "0.500"]
        for cell, share in zip(cells[2:], (pixels, tiles), strict=True):
            if 0.0005 <= share < 1:
                assert cell == f"{100 * share:.1f} %"
    other = make_run(
        tmp_path / "other",
        [training(8), evaluation(8, 0.5)],
        attempts=[attempt(0, 0)],
        config=changed(data__path=str(dataset)),  # type: ignore[arg-type]
    )
    texts = " ".join(reported(tmp_path / "out.html", other).texts)
    assert "is another one than this run's: its fingerprint differs." in texts


def test_tiles_are_drawn_by_the_runs_own_checkpoint(tmp_path: Path, dataset: Path) -> None:
    run = tmp_path / "run"
    assert main(arguments(dataset, run, training__epochs=1, monitor__tensorboard="false")) == 0
    trained = load_run(run)
    reader = SplitReader(dataset, Schema.read(dataset), "val")
    first, second = reader.key(0), reader.key(len(reader) - 1)
    metrics = run / "metrics.jsonl"
    names = trained.description.classes
    row = evaluation(trained.step, 1.0, iou=dict.fromkeys(names, 0.5))
    row |= {"worst": {names[1]: [[first, 0.125], ["gone", 0.25]], names[2]: [[first, 0.25]]},
            "best": {names[1]: [[second, 0.75], [first, 0.5]]}}  # fmt: skip
    metrics.write_text(
        "".join(f"{line}\n" for line in [*metrics.read_text().splitlines(), json.dumps(row)])
    )
    tiles = draw_tiles(read_history(run, NOW), 1)
    assert (tiles.step, tiles.split, tiles.why) == (trained.step, "val", "")
    assert [(one.worst, one.key, one.reasons) for one in tiles.shown] == [
        (True, first, ((names[1], 0.125), (names[2], 0.25))),
        (False, second, ((names[1], 0.75),)),
    ]
    assert "1 of the tiles cannot be read" in draw_tiles(read_history(run, NOW), 2).why
    parsed = reported(tmp_path / "out.html", run)
    assert f"{first}: IoU of {names[1]} 0.125, {names[2]} 0.250" in parsed.texts
    assert sum("jpeg" in picture["src"][:30] for picture in parsed.all("img")) == 2
    shutil.rmtree(run / "checkpoints")
    why = draw_tiles(read_history(run, NOW), 1).why
    assert why.startswith("There is no checkpoint to draw them with: ")
    assert why in reported(tmp_path / "out.html", run).texts


def test_an_older_run_says_what_it_does_not_tell(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [training(8), evaluation(8, None)], config=None)
    texts = reported(tmp_path / "out.html", run).texts
    for line in (
        "No word on how it ended · 8 steps",
        "No evaluation of this run names its best and worst tiles.",
        "There is no config.yaml that can be read.",
        "There is no provenance.json that can be read, so nothing tells of its attempts.",
    ):
        assert line in texts


@pytest.mark.parametrize(
    "content", ["a: *b", "a: &b [1]\nc: *b", "[1]", "\x00", "a: [" * 500, "a: b: c"]
)
def test_a_configuration_that_is_none_is_left_out(tmp_path: Path, content: str) -> None:
    run = make_run(tmp_path / "run", [training(8)], config=None)
    (run / "config.yaml").write_text(content)
    assert read_history(run, NOW).config == {}


def test_the_command_writes_a_page_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = interrupted_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    out = tmp_path / "report.html"
    assert main(["report", str(run), "--out", str(out), "--tiles", "0"]) == 0
    assert "open it in a browser" in capsys.readouterr().out
    assert "Best and worst tiles" not in Parsed(out.read_bytes()).texts
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]
    assert stat.S_IMODE(out.stat().st_mode) & 0o400


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["gone", "--out", "x.html"], "there is no such run directory"),
        (["run", "--out", "x.html", "--tiles", "-1"], "--tiles -1: from 0 to 20"),
        (["run", "--out", "x.html", "--data", "gone"], "no dataset.json in gone"),
        (["run", "--out", "gone/x.html"], "cannot write gone/x.html"),
        (
            ["run", "--out", "x.html", "--figures", "run/metrics.jsonl"],
            "cannot write run/metrics.jsonl",
        ),
        (["run"], "out"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    line: str,
) -> None:
    make_run(tmp_path / "run", [training(8)])
    monkeypatch.chdir(tmp_path)
    assert main(["report", *words]) == 2
    said = capsys.readouterr().err
    assert line in said and said.startswith("agrivision: error: ") and said.count("\n") == 1
    assert not (tmp_path / "x.html").exists()


def test_a_long_run_is_a_small_page(tmp_path: Path) -> None:
    rows = [training(step, time=BEGAN + step) for step in range(1, 20_001)]
    rows += [whole_evaluation(step, 0.5) for step in range(200, 20_001, 200)]
    run = make_run(tmp_path / "run", rows, attempts=[attempt(0, 0)])
    reported(tmp_path / "out.html", run)
    assert (tmp_path / "out.html").stat().st_size < 1_500_000
    history = read_history(run, NOW)
    assert len(history.metrics.training["step"]) == 20_000
    assert sum(bool(one.confusion) for one in history.metrics.evaluations) == 2
    assert flatten(CONFIG) == history.values
