"""`prepare` in parts: processes side by side make the bytes that one makes, whatever happens."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agrivision import locks
from agrivision.data.prepare import PartSummary, PrepareOptions, PrepareSummary, prepare, prepare_part
from agrivision.data.sharing import completing
from agrivision.data.workplace import Workplace
from agrivision.errors import BadInput, Busy, DatasetError, ExitCode, Interrupted, SourceError
from agrivision.locks import FileLock
from agrivision.part import Part
from tests.data import av, scenes
from tests.data.conftest import tree

SPLITS = {
    "train": av.ids("AAA", 9) + av.ids("BBB", 5),
    "val": av.ids("CCC", 4),
    "test": av.ids("DDD", 3),
}
SHARDS = 11  # of two tiles


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Agriculture-Vision folder with a damaged tile that validates and one that trains."""
    source = tmp_path_factory.mktemp("av") / "source"
    av.write_folder(source, SPLITS)
    for split, number in (("train", 3), ("val", 2)):
        (source / split / "images/rgb" / f"{SPLITS[split][number]}.jpg").write_bytes(b"x")
    return source


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("scenes") / "source"
    scenes.write_source(source, scenes=4, shape=(4, 70, 90))
    return source


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        assert "Traceback" not in self.err, self.err
        (line,) = [line for line in self.err.splitlines() if line.startswith("agrivision: error: ")]
        return line


def start(source: Path, out: Path, part: str | None, *flags: str, before: str = "") -> subprocess.Popen:
    """The command in a process of its own, with some lines of Python before it."""
    words = ["prepare", str(source), str(out), *(["--part", part] if part else []), *flags]
    script = f"import sys\nfrom agrivision.cli import main\n{before}\nsys.exit(main({words!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(process: subprocess.Popen, timeout: float = 120) -> Ended:
    out, err = process.communicate(timeout=timeout)
    return Ended(process.returncode, out, err)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "took too long"
        time.sleep(0.02)


SMALL = ("--workers", "1", "--shard_tiles", "2")
# Waits before each shard but the first until there is a file to go on.
HELD_BACK = """
import os, time
import agrivision.data.pool as pool
made, make = [], pool.make_shard
def held_back(maker, job):
    if made:
        open({gate!r} + "." + str(os.getpid()), "w").close()
    while made and not os.path.exists({gate!r}):
        time.sleep(0.02)
    made.append(make(maker, job))
    return made[-1]
pool.make_shard = held_back
"""


def notes(out: Path) -> list[Path]:
    return sorted(out.with_name(f"{out.name}.partial").glob(".prepare/*/*.json"))


def whole(source: Path, out: Path, **options: object) -> PrepareSummary:
    return prepare(source, out, PrepareOptions(**{"workers": 1, "shard_tiles": 2, **options}))


def in_parts(
    source: Path, out: Path, number: int, of: int, **options: object
) -> PrepareSummary | PartSummary:
    chosen = PrepareOptions(**{"workers": 1, "shard_tiles": 2, **options})
    return prepare_part(source, out, chosen, Part(number=number, of=of))


@pytest.mark.parametrize("kind", ["fields", "farm"])
def test_four_processes_at_the_same_time_write_the_bytes_of_one(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source, out = request.getfixturevalue(kind), tmp_path / "out"
    tile = ("--tile", "32")
    processes = [start(source, out, f"{number}/4", *SMALL, *tile) for number in range(4)]
    endings = [end(process) for process in processes]
    assert [ending.code for ending in endings] == [0] * 4, endings
    one = end(start(source, tmp_path / "one", None, *SMALL, *tile))
    assert tree(out) == tree(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out"]
    assert not [path for path in out.rglob("*") if path.name == ".prepare"]
    # Exactly one has put it together, and it counts what all have left out.
    wanted = one.out.replace(str(tmp_path / "one"), str(out))
    summaries = [ending.out for ending in endings if not ending.out.startswith("part ")]
    assert summaries == [wanted]
    if kind == "fields":
        assert "2 problems in the source: unreadable 2" in wanted


def test_a_folder_that_another_part_makes_this_moment(fields: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    assert isinstance(in_parts(fields, tmp_path / "out", 0, 2), PartSummary)
    assert isinstance(in_parts(fields, tmp_path / "out", 1, 2), PrepareSummary)


def test_parts_that_come_one_after_the_other(fields: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number, missing in ((2, 8), (0, 5), (3, 3)):
        summary = in_parts(fields, out, number, 4)
        assert isinstance(summary, PartSummary)
        assert (summary.made, summary.missing) == (3 if number < 3 else 2, missing)
        assert f"{missing} of other parts are still missing" in summary.lines()[0]
        assert not out.exists()
    last = in_parts(fields, out, 1, 4)
    one = whole(fields, tmp_path / "one")
    assert isinstance(last, PrepareSummary)
    assert dataclasses.replace(last, out=one.out) == one
    assert one.problem_kinds == {"unreadable": 2}
    assert tree(out) == tree(tmp_path / "one")
    before = tree(out)
    again = in_parts(fields, out, 2, 4)
    assert again.lines() == [f"part 2/4: {out} is finished"]
    assert tree(out) == before
    assert not out.with_name("out.partial").exists()


def test_a_part_killed_in_the_middle_and_started_again(fields: Path, tmp_path: Path) -> None:
    out, gate = tmp_path / "out", tmp_path / "gate"
    before = HELD_BACK.format(gate=str(gate))
    processes = [start(fields, out, f"{number}/3", *SMALL, before=before) for number in range(3)]
    wait_for(lambda: len(notes(out)) == 3)  # each has made its first shard
    processes[1].kill()
    assert end(processes[1]).code == -signal.SIGKILL
    (tmp_path / "out.partial/train/.00004.tar.1.part").write_bytes(b"half")
    kept = {note: note.stat().st_mtime_ns for note in notes(out)}
    gate.touch()
    others = [end(processes[number]) for number in (0, 2)]
    assert [(ending.code, ending.out[:5]) for ending in others] == [(0, "part ")] * 2, others
    assert {note: note.stat().st_mtime_ns for note in kept} == kept
    assert not out.exists()
    last = end(start(fields, out, "1/3", *SMALL))
    assert last.code == 0
    assert "2 problems in the source" in last.out
    whole(fields, tmp_path / "one")
    assert tree(out) == tree(tmp_path / "one")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("workers", [1, 2])
def test_asked_to_stop_it_leaves_with_85_and_goes_on(
    number: signal.Signals,
    workers: int,
    fields: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, gate = tmp_path / "out", tmp_path / "gate"
    # In the workers too: each holds its second shard in hand until the first process wants to stop.
    hook = (
        HELD_BACK.format(gate=str(gate))
        + f"""
interrupted = pool._interrupted
def noticed():
    open({str(gate)!r}, "w").close()
    return interrupted()
pool._interrupted = noticed
"""
    )
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(hook)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hook"))
    flags = ("--workers", str(workers), "--shard_tiles", "1")
    process = start(fields, out, None, *flags)
    # One that is asked between two shards has nothing in hand.
    wait_for(lambda: len(list(tmp_path.glob("gate.*"))) == workers)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, children)):  # Slurm signals every process of a step
        os.kill(pid, number)
    if workers == 1:  # it is the one that holds back
        gate.touch()
    ending = end(process)
    assert ending.code == ExitCode.STOPPED, ending
    assert "the same command goes on" in ending.err
    assert "Traceback" not in ending.err
    assert not out.exists()
    assert workers < len(notes(out)) < 21  # what was in hand is finished
    monkeypatch.delenv("PYTHONPATH")
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    assert end(start(fields, out, None, *flags)).code == 0
    whole(fields, tmp_path / "one", shard_tiles=1)
    assert tree(out) == tree(tmp_path / "one")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who finds a lock taken does not wait for it."""
    monkeypatch.setattr(locks, "_PATIENCE_SECONDS", 0.0)


@pytest.mark.usefixtures("impatient")
def test_the_same_part_twice_at_once_and_other_company(fields: Path, tmp_path: Path) -> None:
    out, gate = tmp_path / "out", tmp_path / "gate"
    process = start(fields, out, "0/2", *SMALL, before=HELD_BACK.format(gate=str(gate)))
    wait_for(lambda: notes(out))
    with pytest.raises(Busy, match=r"another process makes part 0/2 of .*: wait for it"):
        in_parts(fields, out, 0, 2)
    with pytest.raises(DatasetError, match="another source or with other options"):
        in_parts(fields, out, 1, 2, tile=128)
    with pytest.raises(DatasetError, match="in 2 parts, not in 3"):
        in_parts(fields, out, 1, 3)
    with pytest.raises(Busy, match="another `prepare` is at work"):
        whole(fields, out)
    assert isinstance(in_parts(fields, out, 1, 2, workers=2), PartSummary)
    gate.touch()
    assert end(process).code == 0
    whole(fields, tmp_path / "one")
    assert tree(out) == tree(tmp_path / "one")


def test_a_part_that_another_process_keeps_may_be_tried_again(fields: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    in_parts(fields, out, 0, 2)
    before = "from agrivision import locks\nlocks._PATIENCE_SECONDS = 0.0"
    with FileLock(Workplace(out).own("part-1-of-2.lock")) as lock:
        assert lock.take(alone=True)
        ending = end(start(fields, out, "1/2", *SMALL, before=before))
    assert ending.code == ExitCode.FAILED, ending
    assert "another process makes part 1/2" in ending.complaint
    assert isinstance(in_parts(fields, out, 1, 2), PrepareSummary)
    whole(fields, tmp_path / "one")
    assert tree(out) == tree(tmp_path / "one")


@pytest.mark.parametrize(("name", "what"), [("part-1-of-2.lock", "part 1/2"), ("lock", "`prepare`")])
def test_a_part_waits_for_whoever_is_there(name: str, what: str, fields: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    in_parts(fields, out, 0, 2)
    chosen, part = PrepareOptions(workers=1, shard_tiles=2), Part(number=1, of=2)
    asked: list[int] = []
    with FileLock(Workplace(out).own(name)) as lock:
        assert lock.take(alone=True)
        with pytest.raises(Interrupted, match=f"stopped while another .*{what}.*goes on"):
            prepare_part(fields, out, chosen, part, stop=lambda: True)

        def lets_go() -> bool:
            if len(asked) == 2:
                lock.free()
            asked.append(1)
            return False

        assert isinstance(prepare_part(fields, out, chosen, part, stop=lets_go), PrepareSummary)
    whole(fields, tmp_path / "one")
    assert tree(out) == tree(tmp_path / "one")


def test_started_again_while_the_first_one_finishes(fields: Path, tmp_path: Path) -> None:
    out, gate = tmp_path / "out", tmp_path / "gate"
    process = start(fields, out, "0/1", *SMALL, before=HELD_BACK.format(gate=str(gate)))
    wait_for(lambda: notes(out))

    def goes_on() -> bool:
        gate.touch()
        return False

    chosen = PrepareOptions(workers=1, shard_tiles=2)
    again = prepare_part(fields, out, chosen, Part(number=0, of=1), stop=goes_on)
    assert again.lines() == [f"part 0/1: {out} is finished"]
    assert end(process).code == 0
    assert not out.with_name("out.partial").exists()
    whole(fields, tmp_path / "one")
    assert tree(out) == tree(tmp_path / "one")


@pytest.mark.usefixtures("impatient")
def test_a_part_and_a_whole_do_not_mix(fields: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Workplace(out).held(), pytest.raises(Busy, match="another `prepare` is at work"):
        in_parts(fields, out, 0, 2)
    in_parts(fields, out, 0, 2)
    with pytest.raises(DatasetError, match=r"out\.partial is being made .*remove it to begin anew"):
        in_parts(fields, out, 1, 2, tile=128)
    assert len(notes(out)) == 6
    whole(fields, out, shard_tiles=3)  # as ever: it takes what fits, here nothing
    whole(fields, tmp_path / "one", shard_tiles=3)
    assert tree(out) == tree(tmp_path / "one")


def test_another_number_of_parts_goes_on_with_the_shards(fields: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    in_parts(fields, out, 1, 2)
    kept = {note: note.stat().st_mtime_ns for note in notes(out)}
    assert len(kept) == 5
    summaries = [in_parts(fields, out, number, 3) for number in (0, 1)]
    assert all(isinstance(summary, PartSummary) for summary in summaries)
    assert {note: note.stat().st_mtime_ns for note in kept} == kept
    assert isinstance(in_parts(fields, out, 2, 3), PrepareSummary)
    whole(fields, tmp_path / "one")
    assert tree(out) == tree(tmp_path / "one")


def test_more_parts_than_shards(fields: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    chosen = {"shard_tiles": 100}
    assert in_parts(fields, out, 7, 9, **chosen).lines()[0].startswith("part 7/9: its 0 shards")
    for number in (0, 1):
        assert isinstance(in_parts(fields, out, number, 9, **chosen), PartSummary)
    assert isinstance(in_parts(fields, out, 2, 9, **chosen), PrepareSummary)
    assert in_parts(fields, out, 3, 9, **chosen).lines() == [f"part 3/9: {out} is finished"]


def test_two_last_parts_race(fields: Path, tmp_path: Path) -> None:
    out, gate = tmp_path / "out", tmp_path / "gate"
    # Both have made all of their shards before either looks whether all are there.
    before = f"""
import os, time
from agrivision.data.sharing import Sharing
ended = Sharing.ended
def together(self):
    open({str(gate)!r} + str(os.getpid()), "w").close()
    while len([name for name in os.listdir({str(tmp_path)!r}) if name.startswith("gate")]) < 2:
        time.sleep(0.01)
    return ended(self)
Sharing.ended = together
"""
    processes = [start(fields, out, f"{number}/2", *SMALL, before=before) for number in range(2)]
    endings = sorted((end(process) for process in processes), key=lambda ending: ending.out)
    assert [ending.code for ending in endings] == [0, 0], endings
    assert endings[0].out.startswith("19 tiles in")
    assert endings[1].out.startswith("part ")
    whole(fields, tmp_path / "one")
    assert tree(out) == tree(tmp_path / "one")


def test_the_last_one_killed_while_it_puts_the_data_set_together(fields: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    in_parts(fields, out, 0, 2)
    dies = "import os\nfrom agrivision.data.workplace import Workplace\n"
    dies += "Workplace.finish = lambda *_: os.kill(os.getpid(), 9)\n"
    assert end(start(fields, out, "1/2", *SMALL, before=dies)).code == -signal.SIGKILL
    assert not out.exists()
    assert isinstance(in_parts(fields, out, 0, 2), PrepareSummary)  # any part will do
    whole(fields, tmp_path / "one")
    assert tree(out) == tree(tmp_path / "one")


def test_killed_just_after_the_data_set_got_its_name(fields: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dies = "import os\nfrom agrivision.data.workplace import Workplace\n"
    dies += "Workplace.sweep = lambda *_: os.kill(os.getpid(), 9)\n"
    assert end(start(fields, out, "0/1", *SMALL, before=dies)).code == -signal.SIGKILL
    assert in_parts(fields, out, 0, 1).lines() == [f"part 0/1: {out} is finished"]
    whole(fields, tmp_path / "one")
    assert tree(out) == tree(tmp_path / "one")


def test_what_others_made_is_looked_at(fields: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    in_parts(fields, out, 0, 2)
    shard = tmp_path / "out.partial/train/00002.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    in_parts(fields, out, 1, 2)
    whole(fields, tmp_path / "one")
    assert tree(out) == tree(tmp_path / "one")


def test_an_out_that_is_something_else_is_refused(fields: Path, farm: Path, tmp_path: Path) -> None:
    for name, source, options in (
        ("shards", fields, {"shard_tiles": 3}),
        ("source", farm, {"tile": 32}),
    ):
        whole(source, tmp_path / name, **options)
        before = tree(tmp_path / name)
        with pytest.raises(DatasetError, match="exists already: remove it"):
            in_parts(fields, tmp_path / name, 0, 2)
        assert tree(tmp_path / name) == before
        assert not (tmp_path / f"{name}.partial").exists()
    whole(farm, tmp_path / "ignoring", tile=32, ignore=1)
    with pytest.raises(DatasetError, match="exists already"):
        in_parts(farm, tmp_path / "ignoring", 0, 2, tile=32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="exists already"):
        in_parts(fields, tmp_path / "empty", 0, 2)


def test_strict_parts_name_the_tile(fields: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number in range(2):
        in_parts(fields, out, number, 3)
    with pytest.raises(SourceError, match=SPLITS["train"][3]):  # in shard 1, made before by another
        in_parts(fields, out, 2, 3, strict=True)
    assert not out.exists()
    assert isinstance(in_parts(fields, out, 2, 3), PrepareSummary)


def test_a_file_system_without_locks(
    fields: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    out = tmp_path / "out"
    in_parts(fields, out, 0, 2)
    assert isinstance(in_parts(fields, out, 0, 2), PartSummary)
    assert isinstance(in_parts(fields, out, 1, 2), PrepareSummary)
    assert isinstance(in_parts(fields, out, 1, 2), PartSummary)
    monkeypatch.undo()
    whole(fields, tmp_path / "one")
    assert tree(out) == tree(tmp_path / "one")


def test_asked_to_stop_while_others_are_in_the_way(fields: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    in_parts(fields, out, 0, 2)
    with Workplace(out).lock() as lock, Workplace(out).own("work").open("rb") as work:
        assert lock.take(alone=False)
        fcntl.flock(work, fcntl.LOCK_EX)
        options = PrepareOptions(workers=1, shard_tiles=2)
        with pytest.raises(Interrupted, match="waiting for another part"):
            prepare_part(fields, out, options, Part(number=1, of=2), stop=lambda: True)


lines = st.lists(st.tuples(st.sampled_from("+-"), st.integers(0, 3)), max_size=12)


@given(lines)
def test_exactly_one_line_completes_the_log(log: list[tuple[str, int]]) -> None:
    for count in range(1, len(log) + 1):
        text = [f"{mark}{number}" for mark, number in log[:count]]
        ended = {n for n in range(3) if f"+{n}" in text and last(text, n) == "+"}
        by = completing(text, {0, 1, 2})
        assert (by is not None) == (ended == {0, 1, 2})
        before = completing(text[:-1], {0, 1, 2})
        _, number = log[count - 1]
        assert by in (None, before if before is not None else number)
    assert completing(["+0", "half a li", "+1", "", "+2"], {0, 1, 2}) == 2
    assert completing(["+0", "+1", "+2", "+0"], {0, 1, 2}) == 2


def last(text: list[str], number: int) -> str:
    return [line[0] for line in text if line[1:] == str(number)][-1]


@pytest.mark.parametrize("text", ["4/4", "-1/4", "1", "1/0", "a/b", "1/4/5", " 1/4", "1.0/4", ""])
def test_parts_that_make_no_sense(text: str) -> None:
    with pytest.raises(BadInput, match="part"):
        Part.parse(text)
    assert str(Part.parse("3/4")) == "3/4"
