"""`prepare` as a whole: the same bytes whatever happens, and nothing left where it failed."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from agrivision import locks
from agrivision.data.prepare import PrepareOptions, prepare, prepare_part
from agrivision.data.schema import Schema
from agrivision.data.splits import divide
from agrivision.data.workplace import Workplace
from agrivision.errors import Busy, DatasetError, ExitCode, Interrupted, NotWritable, SourceError
from agrivision.part import Part
from tests.data import av, scenes
from tests.data.conftest import tree

SPLITS = {
    "train": av.ids("AAA", 6) + av.ids("BBB", 5),
    "val": av.ids("CCC", 4),
    "test": av.ids("DDD", 1),
}


@pytest.fixture
def source(tmp_path):
    av.write_folder(tmp_path / "source", SPLITS)
    (tmp_path / "source/train/images/rgb" / f"{SPLITS['train'][3]}.jpg").write_bytes(b"x")
    return tmp_path / "source"


class Recorder:
    def __init__(self):
        self.wanted = self.done = 0
        self.problems = []

    def total(self, tiles):
        self.wanted = tiles

    def advance(self, tiles):
        self.done += tiles

    def problem(self, path, what):
        self.problems.append((path, what))


def run(source, out, **options):
    return prepare(source, out, PrepareOptions(**{"workers": 1, "shard_tiles": 3, **options}))


def test_the_bytes_do_not_depend_on_the_workers(tmp_path, source):
    report = Recorder()
    options = PrepareOptions(workers=2, shard_tiles=3)
    summary = prepare(source, tmp_path / "two", options, report)
    assert (report.wanted, report.done) == (16, 16)
    assert report.problems == [(problem.path, problem.what) for problem in summary.problems]
    assert len(report.problems) == 1
    assert summary.lines() == [
        f"15 tiles in {tmp_path / 'two'} (train 10, val 4, test 1)",
        "1 problems in the source: unreadable 1",
    ]
    run(source, tmp_path / "one")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "source", "two"]
    assert Schema.read(tmp_path / "one") == summary.schema


def start(source: Path, out: Path, workers: int, before: str = "") -> subprocess.Popen:
    """`prepare` in a process of its own, slowed down so that it can be caught in the middle."""
    script = textwrap.dedent(f"""
        import time
        from pathlib import Path
        import agrivision.data.prepare as module
        {before}
        class Slow(module.Silence):
            def advance(self, tiles):
                time.sleep(0.3)
        if __name__ == "__main__":
            options = module.PrepareOptions(workers={workers}, shard_tiles=1)
            module.prepare(Path({str(source)!r}), Path({str(out)!r}), options, Slow())
    """)
    path = out.with_name(f"{out.name}.py")
    path.write_text(script)
    return subprocess.Popen([sys.executable, str(path)], stderr=subprocess.PIPE, start_new_session=True)


# As the command does it; a KeyboardInterrupt may be lost in whatever the interpreter is just doing.
LISTENING = (
    "from functools import partial; from agrivision.training.preemption import StopRequest;"
    " request = StopRequest().listen();"
    " module.prepare = partial(module.prepare, stop=lambda: request.made)"
)


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.02)


def children(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(child) for child in path.read_text().split()]


@pytest.mark.parametrize(
    ("number", "workers"),
    [(signal.SIGKILL, 1), (signal.SIGKILL, 2), (signal.SIGTERM, 2), (signal.SIGINT, 2)],
)
def test_killed_in_the_middle_it_goes_on(tmp_path, source, number, workers):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    process = start(source, out, workers, LISTENING if number == signal.SIGINT else "")
    wait_for(lambda: len(list(partial.glob(".prepare/*/*.json"))) >= 3)
    workers_ids = children(process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert errors.count(b"Traceback") <= (number == signal.SIGINT)  # the workers say nothing
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers_ids))
    assert not out.exists()
    with pytest.raises(DatasetError, match="interrupted; run it again"):
        Schema.read(out)
    (partial / "train" / ".00000.tar.1.part").write_bytes(b"half")
    (partial / "stale").mkdir()
    (partial / "stale/00000.tar").write_bytes(b"from another plan")
    finished = [partial / f"train/{note.stem}.tar" for note in partial.glob(".prepare/train/*.json")]
    kept = {path: path.stat().st_mtime_ns for path in finished if path.exists()}
    kept.pop(partial / "train/00000.tar")
    damaged = partial / "train/00000.tar"
    damaged.write_bytes(b"\0" + damaged.read_bytes()[1:-1] + b"\1")
    run(source, out, shard_tiles=1, workers=2)
    run(source, tmp_path / "undisturbed", shard_tiles=1)
    assert tree(out) == tree(tmp_path / "undisturbed")
    assert not partial.exists()
    for path, changed in kept.items():
        assert (out / "train" / path.name).stat().st_mtime_ns == changed


def test_finished_shards_are_used_again_unless_something_changed(tmp_path, source, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(Workplace, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))

    def names() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in (tmp_path / "out.partial").glob("*/*.tar")}

    with pytest.raises(KeyboardInterrupt):
        run(source, out)
    first = names()
    assert len(first) == 7
    with pytest.raises(KeyboardInterrupt):
        run(source, out)
    assert names() == first
    changed = source / "val/images/rgb" / f"{SPLITS['val'][0]}.jpg"
    os.utime(changed, (1, 1))
    with pytest.raises(KeyboardInterrupt):
        run(source, out)
    made = [Path(path).relative_to(tmp_path) for path, time_ in names().items() if first[path] != time_]
    assert made == [Path("out.partial/val/00000.tar")]


@pytest.mark.parametrize("first", [True, False])
def test_shards_with_other_files_are_made_anew(tmp_path, source, first):
    out, asked = tmp_path / "out", iter([False, False, False, True, True, True])
    with pytest.raises(Interrupted):
        prepare(
            source,
            out,
            PrepareOptions(workers=1, shard_tiles=3, raw=first),
            stop=lambda: next(asked, True),
        )
    assert list((tmp_path / "out.partial").glob("*/*.tar"))
    run(source, out, raw=not first)
    run(source, tmp_path / "undisturbed", raw=not first)
    assert tree(out) == tree(tmp_path / "undisturbed")


def test_parts_must_agree_on_the_files(tmp_path, source):
    options = PrepareOptions(workers=1, shard_tiles=3)
    prepare_part(source, tmp_path / "out", options, Part.parse("0/2"))
    raw = dataclasses.replace(options, raw=True)
    with pytest.raises(DatasetError, match="other options"):
        prepare_part(source, tmp_path / "out", raw, Part.parse("1/2"))


def test_two_at_once(tmp_path, source, monkeypatch):
    monkeypatch.setattr(locks, "_PATIENCE_SECONDS", 0.0)
    out = tmp_path / "out"
    with Workplace(out).held(), pytest.raises(Busy, match="another `prepare` is at work"):
        run(source, out)
    run(source, out)
    assert out.is_dir()


def test_it_waits_for_the_one_before(tmp_path, source):
    out = tmp_path / "out"
    options, asked = PrepareOptions(workers=1), []
    with Workplace(out).lock() as lock:
        assert lock.take(alone=True)
        with pytest.raises(Interrupted, match="stopped while another `prepare` is at work"):
            prepare(source, out, options, stop=lambda: True)

        def lets_go():
            if len(asked) == 2:
                lock.free()
            asked.append(1)
            return False

        prepare(source, out, options, stop=lets_go)
    assert out.is_dir()


def test_out_that_exists_is_left_alone(tmp_path, source):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(DatasetError, match="out exists already"):
        run(source, out)
    assert list(out.iterdir()) == []
    assert not (tmp_path / "out.partial").exists()
    mine = tmp_path / "mine.partial"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    with pytest.raises(DatasetError, match="was not made by `prepare`"):
        run(source, tmp_path / "mine")
    assert (mine / "thesis.txt").exists()


def test_a_place_that_cannot_be_written(tmp_path, source):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotWritable, match="cannot write"):
        run(source, tmp_path / "file" / "out")


def test_a_source_that_cannot_be_read(tmp_path, source, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("agrivision.data.sources.layouts.os.scandir", refuse)
    with pytest.raises(SourceError, match=r"cannot read .*labels: Permission denied"):
        run(source, tmp_path / "out")


def test_a_full_disk_is_one_line_and_it_goes_on(tmp_path, source):
    out = tmp_path / "out"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))"
    process = start(source, out, 1, before=limit)
    _, errors = process.communicate(timeout=60)
    assert b"StorageError: cannot write" in errors.splitlines()[-1]
    assert (tmp_path / "out.partial").is_dir()
    assert not list((tmp_path / "out.partial").rglob("*.part"))
    run(source, out)
    run(source, tmp_path / "undisturbed")
    assert tree(out) == tree(tmp_path / "undisturbed")


def test_a_killed_worker_is_one_line(tmp_path, source):
    process = start(source, tmp_path / "out", 2)
    wait_for(lambda: list(tmp_path.glob("out.partial/train/*.tar")))
    # The other child is the one that multiprocessing keeps its books with.
    for child in children(process):
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(child, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert b"AgrivisionError: a worker process was killed" in errors.splitlines()[-1]
    assert run(source, tmp_path / "out").tiles == 15


def test_strict_stops_and_says_which(tmp_path, source):
    for workers in (1, 2):
        with pytest.raises(SourceError, match=f"{SPLITS['train'][3]}.jpg") as stopped:
            run(source, tmp_path / "out", strict=True, workers=workers)
        assert stopped.value.exit_code == ExitCode.BAD_INPUT
    assert not (tmp_path / "out").exists()
    assert run(source, tmp_path / "out").problem_kinds == {"unreadable": 1}


def test_fields_stay_together(tmp_path):
    fields = {f"F{number}": 1 + number % 4 for number in range(12)}
    av.write_folder(tmp_path / "source", {"": [k for f, n in fields.items() for k in av.ids(f, n)]})
    schema = run(tmp_path / "source", tmp_path / "out", val=("F3", "F7")).schema
    assert {name: split.tiles for name, split in schema.splits.items()} == {"train": 22, "val": 8}
    schema = run(tmp_path / "source", tmp_path / "hashed").schema
    assert 6 <= schema.splits["val"].tiles <= 9
    with pytest.raises(SourceError, match="no field or scene 'F99' to validate on: there are F0, F1"):
        run(tmp_path / "source", tmp_path / "other", val=("F99",))
    assert not (tmp_path / "other.partial").exists()


def test_splits_are_the_same_every_time():
    fields = {f"field{number}": 10 for number in range(50)}
    split_of = divide(fields, (), 0.2, {})
    assert split_of == divide(dict(reversed(fields.items())), (), 0.2, {})
    validating = {field for field, split in split_of.items() if split == "val"}
    assert len(validating) == 10
    more = divide(fields | {"another": 10}, (), 0.2, {})
    assert len(validating - {field for field, split in more.items() if split == "val"}) <= 1
    assert set(divide({"a": 1, "b": 100}, (), 0.99, {}).values()) == {"train", "val"}
    assert set(divide({"a": 100, "b": 1}, (), 0.01, {}).values()) == {"train", "val"}
    assert set(divide({"a": 1}, (), 0.5, {}).values()) == {"train"}
    assert set(divide(fields, (), 0, {}).values()) == {"train"}
    assert divide({"a": 1, "b": 1}, ("a.tif",), 0.5, {}) == {"a": "val", "b": "train"}


def test_a_source_with_splits_takes_no_val(tmp_path, source):
    with pytest.raises(SourceError, match=r"own splits \(train, val, test\): leave out --val"):
        run(source, tmp_path / "out", val=("AAA",))


def test_nothing_to_learn_from(tmp_path):
    source = tmp_path / "source"
    scenes.write_source(source, scenes=1, shape=(4, 20, 20))
    scenes.write_raster(source / "labels/s0.tif", scenes.noise(0, (20, 20)) * 0 + 1)
    with pytest.raises(SourceError, match="not one valid pixel"):
        run(source, tmp_path / "out", classes=((5, "x"),))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option",
    [
        {"workers": 0},
        {"tile": 0},
        {"stride": -1},
        {"val_fraction": 1.0},
        {"val_fraction": float("nan")},
    ],
)
def test_options_that_make_no_sense(option):
    (name,) = option
    with pytest.raises(SourceError, match=name):
        PrepareOptions(**option)


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("fields", {"tile": 32}),
        ("fields", {"stride": 7}),
        ("fields", {"classes": ((0, "a"), (1, "b"))}),
        ("fields", {"bands": ("r", "g", "b", "n")}),
        ("fields", {"ignore": 3}),
        ("fields", {"allow_vrt": True}),
        ("fields", {"val_fraction": 0.5}),
        ("scenes", {"edition": "2020"}),
        ("scenes", {"assume_valid": True}),
    ],
)
def test_options_that_do_nothing_are_named(tmp_path, source, kind, option, caplog):
    wanted = f"--{next(iter(option))} does nothing there"
    if kind == "scenes":
        source, option = tmp_path / "scenes-source", {**option, "tile": 16}
        scenes.write_source(source)
    prepare(source, tmp_path / "out", PrepareOptions(workers=1, **option))
    assert [record.message.endswith(wanted) for record in caplog.records] == [True]
