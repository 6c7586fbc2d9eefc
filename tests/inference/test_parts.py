"""Predictions in parts, interrupted and continued: the bytes of one process that nothing disturbed."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from agrivision import locks
from agrivision.errors import BadInput, Busy, ExitCode, Interrupted
from agrivision.inference import tiling
from agrivision.inference.journal import Journal
from agrivision.inference.predict import PredictOptions, PredictSummary, predict
from agrivision.inference.trained import TrainedModel
from agrivision.locks import FileLock
from agrivision.part import Part, never
from tests.inference.small import smooth, trained_model, write_scene

HOW = PredictOptions(batch_size=2, tile=48, margin=16)
FLAGS = ["--batch_size", "2", "--tile", "48", "--margin", "16"]


BLOCK = 96  # pixels: small ones, so that scenes have several


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tiling, "_BLOCK", BLOCK)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of processes that are started: one batch at a time
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenes: one of many windows and several blocks, a small one, one with empty ground."""
    folder = tmp_path_factory.mktemp("farm")
    generator = np.random.default_rng(4)
    write_scene(folder / "a.tif", smooth(generator, 550, 100))
    write_scene(folder / "b.tif", smooth(generator, 20, 30))
    image = smooth(generator, 100, 150)
    image[:, :60] = 0
    write_scene(folder / "c.tif", image, nodata=0)
    return folder


def outputs(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and ".predict" not in path.parts
    }


def times(out: Path) -> dict[Path, int]:
    folders = (out, out / "labels")
    return {
        path: path.stat().st_mtime_ns
        for folder in folders
        for path in folder.glob("*.*")
        if path.suffix in (".tif", ".png") and path.is_file()
    }


class Counter:
    """Counts the images that the network sees."""

    def __init__(self) -> None:
        self.images = 0
        self.batches = 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Counter:
    counter, compute = Counter(), TrainedModel.probabilities

    def counted(self: TrainedModel, images: torch.Tensor, **options: object) -> torch.Tensor:
        counter.images += len(images)
        counter.batches += 1
        return compute(self, images, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainedModel, "probabilities", counted)
    return counter


@pytest.fixture(params=["source", "dataset", "farm", "all"])
def inputs(request: pytest.FixtureRequest) -> list[Path]:
    names = ["source", "farm"] if request.param == "all" else [request.param]
    return [request.getfixturevalue(name) for name in names]


def run(
    trained: TrainedModel, inputs: list[Path], out: Path, part: str = "0/1", **changes: object
) -> PredictSummary:
    stop = changes.pop("stop", never)
    options = dataclasses.replace(HOW, **changes)  # type: ignore[arg-type]
    return predict(trained, inputs, out, options, part=Part.parse(part), stop=stop)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [2, 4])
def test_parts_write_the_bytes_of_one(
    count: int, trained: TrainedModel, inputs: list[Path], tmp_path: Path
) -> None:
    whole = run(trained, inputs, tmp_path / "one")
    summaries = [run(trained, inputs, tmp_path / "out", f"{n}/{count}") for n in range(count)]
    assert outputs(tmp_path / "out") == outputs(tmp_path / "one")
    assert sum(summary.tiles for summary in summaries) == whole.tiles
    assert [map_.name for map_ in summaries[-1].maps] == [map_.name for map_ in whole.maps]
    assert not summaries[-1].unfinished
    assert bool(summaries[0].unfinished) == bool(whole.maps)
    assert summaries[-1].missing == 0
    assert all(summary.missing for summary in summaries[:-1]) == (whole.tiles > 0)


def command(
    trained: TrainedModel, inputs: list[Path], out: Path, *flags: str, before: str = ""
) -> subprocess.Popen:
    paths = [str(path) for path in inputs]
    checkpoint = ["--checkpoint", str(trained.folder)]
    words = ["predict", *checkpoint, *paths, "--out", str(out), *FLAGS, *flags]
    blocks = f"from agrivision.inference import tiling\ntiling._BLOCK = {BLOCK}"
    script = (
        f"import sys\nfrom agrivision.cli import main\n{blocks}\n{before}\nsys.exit(main({words!r}))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_four_processes_at_the_same_time(
    trained: TrainedModel, source: Path, farm: Path, tmp_path: Path
) -> None:
    parts = [
        command(trained, [source, farm], tmp_path / "out", "--part", f"{number}/4")
        for number in range(4)
    ]
    endings = [(*process.communicate(timeout=240), process.returncode) for process in parts]
    assert [code for *_, code in endings] == [0] * 4, endings
    assert any("submission.zip" in out for out, *_ in endings)
    one = command(trained, [source, farm], tmp_path / "one")
    assert (one.communicate(timeout=240), one.returncode)[1] == 0
    assert outputs(tmp_path / "out") == outputs(tmp_path / "one")


# Ends or asks this process to stop when the network sees a certain batch.
DISTURBED = """
import os
from agrivision.inference.trained import TrainedModel
calls, compute = [], TrainedModel.probabilities
def disturbed(self, images, **options):
    calls.append(1)
    if len(calls) == {batch}:
        os.kill(os.getpid(), {number})
    return compute(self, images, **options)
TrainedModel.probabilities = disturbed
"""


@pytest.mark.row(37)
@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (signal.SIGKILL, "source"),
        (signal.SIGKILL, "farm"),
        (signal.SIGTERM, "source"),
        (signal.SIGUSR1, "farm"),
    ],
)
def test_signals(
    number: signal.Signals,
    kind: str,
    trained: TrainedModel,
    seen: Counter,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    inputs = [request.getfixturevalue(kind)]
    run(trained, inputs, tmp_path / "one")
    undisturbed, seen.images, seen.batches = seen.batches, 0, 0
    before = DISTURBED.format(number=int(number), batch=3 if kind == "source" else 7)
    process = command(trained, inputs, tmp_path / "out", before=before)
    _, errors = process.communicate(timeout=120)
    killed = number == signal.SIGKILL
    assert process.returncode == (-number if killed else ExitCode.STOPPED), errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out/submission.zip").exists()
    half = [tmp_path / f"out/.{name}" for name in ("a.1.part.tif", "a.png.1.part")]
    for path in half if kind == "farm" else ():
        path.write_bytes(b"half")
    run(trained, inputs, tmp_path / "out")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "one")
    # Asked to stop, it finishes the third batch; killed, it loses that and what was not yet noted. Of a
    # scene it keeps whole blocks: the first, of nine windows, has five batches.
    kept = undisturbed - seen.batches
    assert kept == 5 if kind == "farm" else kept in (1, 2) if killed else kept == 3


@pytest.mark.parametrize("batches", [0, 1, 4, 6])
def test_stopped_and_continued_nothing_is_done_twice(
    batches: int, trained: TrainedModel, inputs: list[Path], seen: Counter, tmp_path: Path
) -> None:
    run(trained, inputs, tmp_path / "one")
    wanted, seen.images, seen.batches = seen.images, 0, 0
    with pytest.raises(Interrupted):
        run(trained, inputs, tmp_path / "out", stop=lambda: seen.batches >= batches)
    assert seen.batches == batches
    run(trained, inputs, tmp_path / "out")
    begun = 9 if "farm" in inputs[-1].name else 0  # windows of the block in hand
    assert wanted <= seen.images <= wanted + begun
    assert outputs(tmp_path / "out") == outputs(tmp_path / "one")


def test_what_is_finished_is_left_as_it_is(
    trained: TrainedModel, inputs: list[Path], seen: Counter, tmp_path: Path
) -> None:
    first = run(trained, inputs, tmp_path / "out")
    before, seen.images = times(tmp_path / "out"), 0
    assert run(trained, inputs, tmp_path / "out", threads=0) == first
    assert run(trained, inputs, tmp_path / "out", "1/3").missing == 0
    assert seen.images == 0
    assert times(tmp_path / "out") == before


@pytest.mark.parametrize("changes", [{"batch_size": 3}, {"precision": "bf16"}])
def test_other_options_begin_anew(
    changes: dict[str, object],
    trained: TrainedModel,
    source: Path,
    farm: Path,
    seen: Counter,
    tmp_path: Path,
) -> None:
    inputs = [source, farm]
    run(trained, inputs, tmp_path / "one", **changes)
    wanted = seen.images
    run(trained, inputs, tmp_path / "out")
    seen.images = 0
    run(trained, inputs, tmp_path / "out", **changes)
    assert seen.images == wanted
    assert outputs(tmp_path / "out") == outputs(tmp_path / "one")


def test_what_another_checkpoint_left_is_not_taken(
    trained: TrainedModel, source: Path, farm: Path, tmp_path: Path
) -> None:
    other = trained_model(tmp_path / "other", std=(20.0, 21.0, 22.0, 23.0))
    inputs = [source, farm]
    run(trained, inputs, tmp_path / "one")
    run(other, inputs, tmp_path / "two")
    assert outputs(tmp_path / "one") != outputs(tmp_path / "two")
    calls: list[int] = []
    with pytest.raises(Interrupted):  # in the middle of the tiles
        run(other, inputs, tmp_path / "out", stop=lambda: bool(calls.append(1) or len(calls) > 3))
    run(trained, inputs, tmp_path / "out", "1/2")
    run(other, inputs, tmp_path / "out")  # over files of the part of the first
    assert outputs(tmp_path / "out") == outputs(tmp_path / "two")
    run(trained, inputs, tmp_path / "out", "0/2")
    assert run(trained, inputs, tmp_path / "out", "1/2").missing == 0
    assert outputs(tmp_path / "out") == outputs(tmp_path / "one")


def test_files_that_somebody_changed_are_made_again(
    trained: TrainedModel, source: Path, farm: Path, seen: Counter, tmp_path: Path
) -> None:
    inputs, out = [source, farm], tmp_path / "out"
    run(trained, inputs, out)
    wanted = outputs(out)
    for name in ("labels", "."):
        path = sorted((out / name).glob("*.png"))[0]
        path.write_bytes(path.read_bytes()[:-1])
    (out / "c.tif").unlink()
    (out / "presence.csv").unlink()
    seen.batches = 0
    run(trained, inputs, out)
    assert outputs(out) == wanted
    assert 0 < seen.batches < 40
    os.utime(farm / "b.tif")  # it may have changed
    seen.batches = 0
    run(trained, inputs, out)
    assert seen.batches == 1


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "noise"])
def test_a_damaged_journal_costs_batches_only(
    damage: str, trained: TrainedModel, inputs: list[Path], seen: Counter, tmp_path: Path
) -> None:
    after = 7 if len(inputs) == 1 and "farm" in inputs[0].name else 3  # a block, or a batch of tiles
    run(trained, inputs, tmp_path / "one")
    seen.batches = 0
    with pytest.raises(Interrupted):
        run(trained, inputs, tmp_path / "out", stop=lambda: seen.batches >= after)
    journals = [path for path in (tmp_path / "out/.predict").rglob("*") if path.is_file()]
    assert len(journals) == 1 or all(path.suffix == ".block" for path in journals)
    content = journals[0].read_bytes()
    flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    journals[0].write_bytes(
        {"cut": content[:-5], "flip": flipped, "empty": b"", "noise": os.urandom(500)}[damage]
    )
    seen.batches = 0
    run(trained, inputs, tmp_path / "out")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "one")


def test_another_number_of_parts_goes_on(
    trained: TrainedModel, source: Path, seen: Counter, tmp_path: Path
) -> None:
    run(trained, [source], tmp_path / "one")
    run(trained, [source], tmp_path / "out", "1/2")
    done = seen.images
    for number in range(3):
        summary = run(trained, [source], tmp_path / "out", f"{number}/3")
    assert summary.missing == 0
    assert seen.images == 2 * 14
    assert done == 14 + 6
    assert outputs(tmp_path / "out") == outputs(tmp_path / "one")


def test_the_same_part_twice_at_once(
    trained: TrainedModel, source: Path, farm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_PATIENCE_SECONDS", 0.0)
    out = tmp_path / "out"
    calls: list[int] = []

    def again() -> bool:
        if not calls:
            calls.append(1)
            with pytest.raises(Busy, match=r"another process predicts part 1/2 into .*: wait"):
                run(trained, [source], out, "1/2")
        return False

    run(trained, [source], out, "1/2", stop=again)
    assert calls.pop()
    run(trained, [farm], tmp_path / "one")

    def again_scene() -> bool:
        if not calls:
            calls.append(1)
            run(trained, [farm / "a.tif"], out)  # the same blocks, with the same bytes
        return False

    run(trained, [farm], out, stop=again_scene)
    assert calls
    found = outputs(out)
    assert {name: found[name] for name in outputs(tmp_path / "one")} == outputs(tmp_path / "one")


def test_a_part_that_another_process_keeps_may_be_tried_again(
    trained: TrainedModel, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(trained, [source], tmp_path / "one")
    run(trained, [source], out, "0/2")
    impatient = "from agrivision import locks\nlocks._PATIENCE_SECONDS = 0.0"
    with Journal(out / ".predict/labels/1-of-2", "another's", "it"):
        process = command(trained, [source], out, "--part", "1/2", before=impatient)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == ExitCode.FAILED, errors
    assert "agrivision: error: another process predicts part 1/2 into" in errors
    assert "Traceback" not in errors
    assert run(trained, [source], out, "1/2").missing == 0
    assert outputs(out) == outputs(tmp_path / "one")


@pytest.mark.parametrize("remove", [False, True])
def test_a_journal_waits_for_the_one_before(remove: bool, tmp_path: Path) -> None:
    path = tmp_path / "a/journal"
    asked: list[int] = []
    with Journal(path, "one", "it") as earlier:
        earlier.append(b"x")

        def lets_go() -> bool:
            if len(asked) == 2:
                if remove:
                    earlier.remove()
                earlier.__exit__(None, None, None)
            asked.append(1)
            return False

        with Journal(path, "one", "it", lets_go) as journal:
            assert list(journal.records()) == ([] if remove else [b"x"])
            journal.append(b"y")
    assert len(asked) == 3
    with Journal(path, "one", "it") as journal:
        assert list(journal.records()) == ([b"y"] if remove else [b"x", b"y"])


def test_a_map_that_another_process_puts_together_is_not_written_twice(
    trained: TrainedModel, farm: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(trained, [farm / "b.tif"], out)
    note, before = out / ".predict/scenes/b.json", times(out)
    kept = note.read_bytes()
    note.unlink()
    with FileLock(out / ".predict/scenes/b.lock") as earlier:
        assert earlier.take(alone=True)
        asked: list[int] = []

        def finishes() -> bool:
            asked.append(1)
            if len(asked) == 3:  # the only batch is done by then, and it waits for the map
                note.write_bytes(kept)
                earlier.free()
            return False

        summary = run(trained, [farm / "b.tif"], out, stop=finishes)
    assert summary.maps == (out / "b.tif",)
    assert times(out) == before


def test_a_journal_that_waits_hears_that_it_is_to_stop(tmp_path: Path) -> None:
    path, words = tmp_path / "journal", "stopped while another process predicts it"
    with Journal(path, "one", "it"), pytest.raises(Interrupted, match=words):
        Journal(path, "one", "it", lambda: True)


def test_parts_say_what_is_missing(trained: TrainedModel, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (line,) = run(trained, [source], out, "0/2").lines()
    assert line == f"8 tiles in {out / 'labels'}; 6 of other parts are still missing"
    assert not (out / "submission.zip").exists()
    (line,) = run(trained, [source], out, "1/2").lines()
    assert line.startswith(f"14 tiles in {out / 'submission.zip'}")


def test_a_journal_gives_back_what_it_was_given(tmp_path: Path) -> None:
    path, records = tmp_path / "a/b/journal", [b"", b"x", bytes(1000)]
    with Journal(path, "one", "it") as journal:
        for record in records:
            journal.append(record)
    with Journal(path, "one", "it") as journal:
        assert (journal.count, list(journal.records())) == (3, records)
        journal.append(b"y")
        assert list(journal.records()) == [*records, b"y"]
    with Journal(path, "two", "it") as journal:
        assert (journal.count, list(journal.records())) == (0, [])
    assert not (tmp_path / "a").exists()  # nothing was done under it


def test_no_such_part() -> None:
    check: Callable[[], Part] = lambda: Part.parse("2/2")  # noqa: E731
    with pytest.raises(BadInput, match="there is no part 2/2: parts are 0/2 to 1/2"):
        check()
