"""Disks that are full, read-only, slow, damaged or seen late: what a run loses, and what it says."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agrivision import checkpoint
from agrivision.errors import ExitCode
from tests.disks import fill, make_read_only, mount, small_disk
from tests.heard import hear, hear_one
from tests.ranks import Disturbance, run
from tests.training.runs import arguments, assert_same, metrics
from tests.training.test_resume import curves

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    folder, made = tmp_path_factory.mktemp("undisturbed"), {}

    def make(ranks: int) -> Path:
        if ranks not in made:
            made[ranks] = folder / str(ranks)
            assert run(arguments(dataset, made[ranks]), ranks) == [0] * ranks
        return made[ranks]

    return make


def assert_undisturbed(run_dir: Path, reference: Path) -> None:
    assert_same(run_dir, reference)
    assert curves(run_dir / "tensorboard") == curves(reference / "tensorboard")


def log_of(run_dir: Path, rank: int = 0) -> str:
    return (run_dir / "log" / f"rank-{rank}.log").read_text()


# Full, over quota, read-only


def fill_up(rank: int, disk: Path, *, step: int, freed: bool) -> None:
    """Fill a disk after a step; empty it when the disk has refused a save, if at all."""
    from agrivision.monitor.metrics import MetricsLog
    from agrivision.training.patience import DiskPatience
    from agrivision.training.trainer import Trainer

    if rank:
        return
    finish, wait, append = Trainer._finish, DiskPatience.wait, MetricsLog.append

    def pad(self: MetricsLog, row: Any) -> None:
        """The last page of a file has room for many rows, also on a full disk."""
        append(self, row | {"padding": " " * 2000} if "keys" in row else row)

    MetricsLog.append = pad

    def fill_after(self: Trainer, *args: Any) -> float:
        rate = finish(self, *args)
        if self.progress.step == step:
            fill(disk, 0)
        return rate

    def empty_before(self: DiskPatience, *args: Any) -> None:
        if freed:
            (disk / "filler").unlink(missing_ok=True)
        wait(self, *args)

    Trainer._finish, DiskPatience.wait = fill_after, empty_before


PLACES = ["checkpoints", "log", "tensorboard"]


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A run directory, and a place in it that is a small disk of its own."""
    (tmp_path / "run").mkdir(mode=0o700)
    with small_disk(tmp_path / "run" / request.param, "8m") as place:
        yield place


@pytest.mark.row(20)
@pytest.mark.parametrize("disk", PLACES, indirect=True)
def test_a_disk_that_is_full_for_a_while_costs_nothing(
    disk: Path, dataset: Path, undisturbed: Callable[[int], Path]
) -> None:
    hook = partial(fill_up, disk=disk, step=4, freed=True)
    ending = hear_one(arguments(dataset, disk.parent), hook=hook)
    assert ending.code == 0, ending
    said = "\n".join(ending.err)
    assert f"cannot write {disk}" in said and "No space left" in said
    assert "the disk takes what is saved again" in said
    assert "Traceback" not in said
    assert_undisturbed(disk.parent, undisturbed(1))


@pytest.mark.row(20)
@pytest.mark.parametrize("disk", PLACES, indirect=True)
def test_a_disk_that_stays_full_ends_the_run_and_damages_nothing(
    disk: Path, ranks: int, dataset: Path, undisturbed: Callable[[int], Path]
) -> None:
    command = arguments(dataset, disk.parent, training__save_patience_minutes=0.02)
    hook = partial(fill_up, disk=disk, step=7, freed=False)
    endings = hear(command, ranks, hook=hook)
    assert [ending.code for ending in endings] == [ExitCode.FAILED] * ranks
    assert "No space left" in endings[0].complaint
    assert "trying again for" in "\n".join(endings[0].err)
    for entry in checkpoint.entries(disk.parent / "checkpoints"):
        checkpoint.load(entry.folder)
    (disk / "filler").unlink()
    assert run(command, ranks) == [0] * ranks
    assert_undisturbed(disk.parent, undisturbed(ranks))


def name_of(file: int) -> str:
    return str(Path(f"/proc/self/fd/{file}").readlink())


def refuse(rank: int, call: str, number: int, *, times: int, below: str) -> None:
    """Let calls on files below a folder fail so often, once training has begun."""
    from agrivision.training.trainer import Trainer

    original, left, finish, begun = getattr(os, call), [times], Trainer._finish, []

    def fail(*args: Any, **kwargs: Any) -> Any:
        path = name_of(args[0]) if isinstance(args[0], int) else str(args[0])
        if begun and left[0] and below in path:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return original(*args, **kwargs)

    def after(self: Trainer, *args: Any) -> float:
        begun.append(1)
        return finish(self, *args)

    if rank == 0:
        setattr(os, call, fail)
        Trainer._finish = after


@pytest.mark.row(20)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize(
    ("call", "below"),
    [
        ("fsync", "/checkpoints/"),
        ("rename", "/checkpoints/"),
        ("fsync", "metrics.jsonl"),
        ("write", "/tensorboard/"),
        ("write", "/log/"),
    ],
)
def test_whatever_the_disk_refuses_now_and_then(
    call: str,
    below: str,
    number: int,
    dataset: Path,
    tmp_path: Path,
    undisturbed: Callable[[int], Path],
) -> None:
    hook = partial(refuse, call=call, number=number, times=2, below=below)
    ending = hear_one(arguments(dataset, tmp_path), hook=hook)
    assert ending.code == 0, ending
    assert os.strerror(number) in "\n".join(ending.err)
    assert_undisturbed(tmp_path, undisturbed(1))


def remount(rank: int, disk: Path, *, step: int) -> None:
    from agrivision.training.trainer import Trainer

    finish = Trainer._finish

    def after(self: Trainer, *args: Any) -> float:
        rate = finish(self, *args)
        if self.progress.step == step:
            make_read_only(disk)
        return rate

    if rank == 0:
        Trainer._finish = after


@pytest.mark.row(20)
@pytest.mark.parametrize("disk", ["checkpoints"], indirect=True)
def test_a_disk_that_becomes_read_only_is_the_users_to_change(
    disk: Path, ranks: int, dataset: Path, undisturbed: Callable[[int], Path]
) -> None:
    command = arguments(dataset, disk.parent)
    endings = hear(command, ranks, hook=partial(remount, disk=disk, step=7))
    assert endings[0].code == ExitCode.BAD_INPUT
    assert "Read-only file system" in endings[0].complaint
    assert [ending.code for ending in endings[1:]] == [ExitCode.FAILED] * (ranks - 1)
    mount("-o", "remount,rw", str(disk))
    assert run(command, ranks) == [0] * ranks
    assert_undisturbed(disk.parent, undisturbed(ranks))


def slow_down(rank: int, seconds: float) -> None:
    fsync = os.fsync

    def slow(file: int) -> None:
        time.sleep(seconds)
        fsync(file)

    os.fsync = slow


@pytest.mark.row(20)
def test_a_slow_disk_only_takes_longer_and_the_log_says_so(
    dataset: Path, tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    hook = partial(slow_down, seconds=0.05)
    ending = hear_one(arguments(dataset, tmp_path), hook=hook)
    assert ending.code == 0
    assert len([line for line in ending.err if " saved in " in line]) == 6
    assert_undisturbed(tmp_path, undisturbed(1))


# Damaged


def stopped(dataset: Path, run_dir: Path, ranks: int = 1) -> list[str]:
    """A run that was stopped after step 13; the command that goes on."""
    command = arguments(dataset, run_dir)
    stop = Disturbance(signal.SIGTERM, "forward", count=13)
    assert run(command, ranks, disturbance=stop) == [ExitCode.STOPPED] * ranks
    return command


def newest(run_dir: Path) -> Path:
    return checkpoint.folders(run_dir / "checkpoints")[-1]


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 4
    path.write_bytes(whole)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "empty": lambda folder: (folder / "optimizer.safetensors").write_bytes(b""),
    "a file deleted": lambda folder: (folder / "model.safetensors").unlink(),
    "deleted": shutil.rmtree,
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
}


@pytest.mark.row(21)
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_checkpoint_is_damaged_and_the_run_goes_back_one(
    damage: str, dataset: Path, tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    command = stopped(dataset, tmp_path)
    assert newest(tmp_path).name == "step-000000013"
    DAMAGES[damage](newest(tmp_path))
    ending = hear_one(command)
    assert ending.code == 0
    said = "\n".join(ending.err)
    assert "going on from step 12" in said
    if damage != "deleted":
        assert "going back to the checkpoint before it" in said
        assert (tmp_path / "checkpoints" / "damaged-step-000000013").is_dir()
    assert_undisturbed(tmp_path, undisturbed(1))


@pytest.mark.row(22)
def test_one_flipped_bit_is_found_and_the_run_goes_back_one(
    ranks: int, dataset: Path, tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    command = stopped(dataset, tmp_path, ranks)
    flip(newest(tmp_path) / "model.safetensors")
    ending = hear(command, ranks)[0]
    assert ending.code == 0
    assert "its checksum differs; going back" in "\n".join(ending.err)
    assert_undisturbed(tmp_path, undisturbed(ranks))


@pytest.mark.row(23)
@pytest.mark.parametrize("foreign", ["latest", "a folder", "a file", "a dangling link", "renamed"])
def test_there_is_no_pointer_and_what_only_has_the_name_is_passed_over(
    foreign: str, dataset: Path, tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    command = stopped(dataset, tmp_path)
    folder = tmp_path / "checkpoints"
    name = folder / "step-000099999"
    if foreign == "latest":
        (folder / "latest").symlink_to("step-000000777")
    elif foreign == "a folder":
        name.mkdir()
        (name / "notes").write_text("mine")
    elif foreign == "a file":
        name.write_text("mine")
    elif foreign == "a dangling link":
        name.symlink_to("nowhere")
    else:
        shutil.copytree(newest(tmp_path), name)
    before = {path.name for path in folder.iterdir()}
    ending = hear_one(command)
    assert ending.code == 0
    assert "going on from step 13" in "\n".join(ending.err)
    after = {path.name.removeprefix("damaged-") for path in folder.iterdir()}
    assert before <= after  # nothing of anybody's is removed
    assert_undisturbed(tmp_path, undisturbed(1))


# Killed


@pytest.mark.row(7)
@pytest.mark.parametrize("moment", ["saving", "renaming"])
def test_rank_0_is_killed_between_temporary_file_and_rename(
    moment: Any, ranks: int, dataset: Path, tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    command = arguments(dataset, tmp_path)
    count = {"saving": 7, "renaming": 2}[moment]  # of the second checkpoint
    codes = run(command, ranks, disturbance=Disturbance(signal.SIGKILL, moment, count))
    assert codes == [-signal.SIGKILL] + [ExitCode.FAILED] * (ranks - 1)
    assert [entry.step for entry in checkpoint.entries(tmp_path / "checkpoints")] == [5]
    assert run(command, ranks) == [0] * ranks
    assert_undisturbed(tmp_path, undisturbed(ranks))
    assert not list((tmp_path / "checkpoints").glob(".*"))


def die_in_a_flush(rank: int, moment: str) -> None:
    """Kill the process when an event file is flushed for the third time, or half a record is in it."""
    fsync, write, calls = os.fsync, os.write, []

    def about(file: int) -> bool:
        found = "tfevents" in name_of(file)
        calls.extend([1] * found)
        return found and len(calls) == 3

    def kill_in_fsync(file: int) -> None:
        if about(file):
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)

    def kill_in_write(file: int, content: Any) -> int:
        if about(file):
            write(file, bytes(content)[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(file, content)

    if moment == "fsync":
        os.fsync = kill_in_fsync
    else:
        os.write = kill_in_write


@pytest.mark.row(36)
@pytest.mark.parametrize("moment", ["fsync", "write"])
def test_the_writer_of_the_curves_is_killed_in_a_flush(
    moment: str, dataset: Path, tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    command = arguments(dataset, tmp_path)
    for _ in range(2):
        assert run(command, hook=partial(die_in_a_flush, moment=moment)) == [-signal.SIGKILL]
    assert run(command) == [0]
    assert_undisturbed(tmp_path, undisturbed(1))


# Seen late


def see_late(rank: int, path: Path, *, times: int) -> None:
    """Let rank 1 not see what is at a path, or below it, for so many looks."""
    if rank != 1:
        return
    import io

    left = [times]

    def lies(name: Any) -> bool:
        if not isinstance(name, str | os.PathLike):
            return False
        found = os.fspath(name)
        if not left[0] or not (found == str(path) or found.startswith(f"{path}/")):
            return False
        left[0] -= 1
        return True

    def late(original: Callable[..., Any]) -> Callable[..., Any]:
        def look(name: Any, *args: Any, **kwargs: Any) -> Any:
            if lies(name):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(name))
            return original(name, *args, **kwargs)

        return look

    for owner, call in ((os, "stat"), (os, "open"), (os, "listdir"), (os, "scandir"), (io, "open")):
        setattr(owner, call, late(getattr(owner, call)))


LATE = {
    "the run directory": "run",
    "its checkpoints": "run/checkpoints",
    "the newest": "run/checkpoints/step-000000013",
    "its manifest": "run/checkpoints/step-000000013/manifest.json",
    "a state in it": "run/checkpoints/step-000000013/model.safetensors",
    "its logs": "run/log",
    "dataset.json": "dataset/dataset.json",
}


@pytest.mark.row(25)
@pytest.mark.parametrize("what", LATE)
def test_rank_1_sees_late_what_rank_0_sees(
    what: str, dataset: Path, tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    command = stopped(dataset, tmp_path / "run", 2)
    late = tmp_path / LATE[what] if what != "dataset.json" else dataset / "dataset.json"
    assert late.exists()
    assert run(command, 2, hook=partial(see_late, path=late, times=3)) == [0, 0]
    assert_undisturbed(tmp_path / "run", undisturbed(2))


def hurry(rank: int, path: Path) -> None:
    """Rank 1 never sees it, and does not wait for long."""
    from agrivision.training import start

    start.SECONDS = 1.0
    see_late(rank, path, times=10**6)


@pytest.mark.row(25)
def test_what_rank_1_never_sees_ends_both_ranks(
    dataset: Path, tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    command = stopped(dataset, tmp_path, 2)
    endings = hear(command, 2, hook=partial(hurry, path=newest(tmp_path)))
    assert [ending.code for ending in endings] == [ExitCode.FAILED] * 2
    assert "this node cannot" in endings[1].complaint
    assert "see its own line" in endings[0].complaint
    assert run(command, 2) == [0, 0]
    assert_undisturbed(tmp_path, undisturbed(2))


def see_it_later(rank: int, hidden: Path, folder: Path, *, step: int) -> None:
    """Rank 0's node gets to see the newest checkpoint only after a step."""
    from agrivision.training import start
    from agrivision.training.trainer import Trainer

    start._LISTING_SECONDS = 1.0
    finish = Trainer._finish

    def after(self: Trainer, *args: Any) -> float:
        rate = finish(self, *args)
        if self.progress.step == step:
            hidden.rename(folder)
        return rate

    if rank == 0:
        Trainer._finish = after


@pytest.mark.row(25)
@pytest.mark.parametrize("step", [11, 13, 14])
def test_rank_0_sees_the_newest_too_late_and_repeats_its_steps(
    step: int, dataset: Path, tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    """It appears before its step is repeated, at it, or after it: the curves have each step once."""
    command = stopped(dataset, tmp_path / "run")
    folder, hidden = newest(tmp_path / "run"), tmp_path / "hidden"
    folder.rename(hidden)
    twelve = tmp_path / "run" / "checkpoints" / "step-000000012"
    shutil.rmtree(twelve)  # scored: it is waited for
    hook = partial(see_it_later, hidden=hidden, folder=folder, step=step)
    ending = hear_one(command, hook=hook)
    assert ending.code == 0
    assert "it does not come: going on without it" in "\n".join(ending.err)
    assert_undisturbed(tmp_path / "run", undisturbed(1))


@pytest.mark.row(25)
def test_a_checkpoint_that_appears_after_a_kill_is_of_another_line(
    dataset: Path, tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    """The attempt that did not see it has forgotten what was written about its steps."""
    run_dir = tmp_path / "run"
    command = stopped(dataset, run_dir)
    folder, hidden = newest(run_dir), tmp_path / "hidden"
    folder.rename(hidden)
    killed = Disturbance(signal.SIGKILL, "backward done", count=1)
    assert run(command, disturbance=killed) == [-signal.SIGKILL]
    assert max(row["step"] for row in metrics(run_dir)) == 12
    hidden.rename(folder)
    ending = hear_one(command)
    assert ending.code == 0
    said = "\n".join(ending.err)
    assert "did not go on from" in said and "going on from step 12" in said
    assert (run_dir / "checkpoints" / "other-step-000000013").is_dir()
    assert_undisturbed(run_dir, undisturbed(1))


@pytest.mark.row(25)
def test_provenance_that_cannot_be_read_is_kept(dataset: Path, tmp_path: Path) -> None:
    command = stopped(dataset, tmp_path)
    (tmp_path / "provenance.json").write_text("{ torn")
    assert run(command) == [0]
    assert (tmp_path / "damaged-provenance.json").read_text() == "{ torn"
    assert len(json.loads((tmp_path / "provenance.json").read_text())["attempts"]) == 1
