"""Checkpoints: what is saved is loaded, bit for bit, and what is damaged is never loaded."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agrivision import checkpoint
from agrivision.checkpoint import MANIFEST, latest, load, save, set_aside, tidy
from agrivision.errors import CheckpointError, NotWritable, StorageError
from tests.disks import fill, make_read_only, small_disk

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
)
NAMES = st.text("abcXYZ019_./-", min_size=1, max_size=12)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    seed = draw(st.integers(0, 2**31))
    random = torch.Generator().manual_seed(seed)
    tensor = torch.empty(shape, dtype=torch.float64).uniform_(-300, 300, generator=random)
    tensor = tensor.to(draw(st.sampled_from(DTYPES)))
    if tensor.ndim == 4 and draw(st.booleans()):
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    if tensor.ndim >= 2 and draw(st.booleans()):
        tensor = tensor.transpose(0, 1)
    return tensor


STATES = st.dictionaries(
    st.sampled_from(["model", "optimizer", "progress", "ema.model"]),
    st.dictionaries(NAMES, tensors() | VALUES, max_size=5),
    max_size=4,
)


def same(first: Any, second: Any) -> bool:
    """Equal in type, shape and every bit."""
    if isinstance(first, torch.Tensor):
        return (
            isinstance(second, torch.Tensor)
            and first.dtype == second.dtype
            and first.shape == second.shape
            and raw(first) == raw(second)
        )
    return repr(first) == repr(second)  # tells -0.0 from 0.0 and 1 from True


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def assert_same_states(first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]]) -> None:
    assert first.keys() == second.keys()
    for name, state in first.items():
        assert state.keys() == second[name].keys()
        assert all(same(value, second[name][key]) for key, value in state.items())


def some(step: int) -> dict[str, dict[str, Any]]:
    return {
        "model": {"weight": torch.full((3, 2), float(step)), "count": torch.tensor(step)},
        "progress": {"step": step, "loss": 1 / 3},
    }


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


@settings(max_examples=30)
@given(states=STATES, step=st.integers(0, 10**10), epoch=st.integers(0, 10**6))
def test_what_is_saved_is_loaded(states: dict[str, dict[str, Any]], step: int, epoch: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = save(Path(name) / "checkpoints", states, step=step, epoch=epoch)
        found = load(folder)
        assert (found.step, found.epoch, found.folder) == (step, epoch, folder)
        assert_same_states(found.states, states)
        newest = latest(Path(name) / "checkpoints")
        assert newest is not None
        assert newest.folder == folder
        assert list(folder.parent.iterdir()) == [folder]


def test_values_that_are_not_finite_come_back(tmp_path: Path) -> None:
    values = {"nan": float("nan"), "inf": float("inf"), "tensor": torch.tensor([float("nan"), -0.0])}
    assert_same_states(load(save(tmp_path, {"all": values}, step=1, epoch=0)).states, {"all": values})


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    buffer = torch.arange(12.0)
    state = {"tied": buffer, "again": buffer, "part": buffer[3:7], "view": buffer.view(3, 4)}
    state["spread"] = torch.ones(1).expand(5)
    assert_same_states(load(save(tmp_path, {"all": state}, step=1, epoch=0)).states, {"all": state})


def test_a_checkpoint_is_its_owners_alone(tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoints", some(1), step=1, epoch=0)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.parent.stat().st_mode & 0o777 == 0o700


def test_nothing_there_is_no_error(tmp_path: Path) -> None:
    assert latest(tmp_path / "none") is None
    assert latest(tmp_path) is None


def test_the_newest_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    for step in (10**9, 999_999_999, 5):
        save(tmp_path, some(step), step=step, epoch=0)
    newest = latest(tmp_path)
    assert newest is not None
    assert newest.step == 10**9


def test_a_step_saved_twice_stays_the_first(tmp_path: Path) -> None:
    folder = save(tmp_path, some(1), step=7, epoch=0)
    before = tree(tmp_path)
    assert save(tmp_path, some(1), step=7, epoch=3, attempt=2) == folder
    assert tree(tmp_path) == before


def test_a_step_saved_twice_with_other_bits_is_kept_aside(tmp_path: Path) -> None:
    folder = save(tmp_path, some(1), step=7, epoch=0)
    for number in (2, 3):
        assert save(tmp_path, some(number), step=7, epoch=0) == folder
        assert_same_states(load(folder).states, some(number))
    assert steps(tmp_path) == ["other-step-000000007", "other-step-000000007.1", "step-000000007"]
    for number, name in enumerate(steps(tmp_path)[:2], 1):
        assert_same_states(load(tmp_path / name).states, some(number))


@pytest.mark.parametrize("kind", ["no manifest", "damaged", "a file", "a dangling link"])
def test_what_else_has_the_name_is_kept_aside(tmp_path: Path, kind: str) -> None:
    folder = save(tmp_path / "checkpoints", some(1), step=7, epoch=0)
    if kind == "no manifest":
        (folder / MANIFEST).unlink()
    elif kind == "damaged":
        (folder / "model.safetensors").write_bytes(b"0")
    else:
        folder.rename(tmp_path / "elsewhere")
        folder.touch() if kind == "a file" else folder.symlink_to("nowhere")
    before = tree(tmp_path)
    save(folder.parent, some(2), step=7, epoch=0)
    assert_same_states(load(folder).states, some(2))
    shutil.rmtree(folder)
    folder.with_name("damaged-step-000000007").rename(folder)
    assert tree(tmp_path) == before


def test_what_the_disk_gives_back_otherwise_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, some(1), step=1, epoch=0)
    before = tree(tmp_path)
    sync_tree = checkpoint.sync_tree

    def rot(folder: Path) -> None:
        sync_tree(folder)
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"?")

    monkeypatch.setattr(checkpoint, "sync_tree", rot)
    with pytest.raises(
        StorageError, match=r"does not give back what was written: .*model\.safetensors"
    ):
        save(tmp_path, some(2), step=2, epoch=0)
    assert tree(tmp_path) == before


# Interrupted


class Killed(BaseException):
    pass


MOMENTS = [
    "agrivision.checkpoint._write",
    "pathlib.Path.write_bytes",
    "agrivision.checkpoint.sync_tree",
    "pathlib.Path.rename",
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interruption_leaves_the_old_and_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    save(tmp_path, some(1), step=1, epoch=0)
    before = tree(tmp_path)

    def interrupt(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(moment, interrupt)
        with pytest.raises(Killed):
            save(tmp_path, some(2), step=2, epoch=0)
    assert tree(tmp_path) == before


def save_and_die(folder: Path, moment: str, step: int) -> None:
    """In a process of its own, which is killed at the moment."""

    def die(*_: object) -> None:
        signal.raise_signal(signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(moment, die)
                save(folder, some(step), step=step, epoch=0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.row(7)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_leaves_the_old_and_tidy_removes_the_rest(tmp_path: Path, moment: str) -> None:
    save(tmp_path, some(1), step=1, epoch=0)
    before = tree(tmp_path)
    save_and_die(tmp_path, moment, 2)
    assert len(list(tmp_path.iterdir())) == 2  # the one before, and something hidden
    newest = latest(tmp_path)
    assert newest is not None
    assert newest.step == 1
    tidy(tmp_path, 3, ())
    assert tree(tmp_path) == before
    assert load(save(tmp_path, some(2), step=2, epoch=0)).step == 2


def test_a_kill_after_the_rename_leaves_the_new_one_whole(tmp_path: Path) -> None:
    save_and_die(tmp_path, "agrivision.checkpoint.sync_folder", 2)
    newest = latest(tmp_path)
    assert newest is not None
    assert_same_states(newest.states, some(2))


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_next_attempt_may_have_the_same_process_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    # In a container the first process has the same id at each start.
    monkeypatch.setattr(os, "getpid", lambda: 7)
    save_and_die(tmp_path, moment, 2)
    assert len(list(tmp_path.glob(".step-*.7.part"))) == 1
    assert_same_states(load(save(tmp_path, some(2), step=2, epoch=0)).states, some(2))


# Damaged


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, of the steps 1 and 2; tests that damage them put everything back."""
    folder = tmp_path_factory.mktemp("pair")
    save(folder, some(1), step=1, epoch=0)
    save(folder, some(2), step=2, epoch=1)
    return folder


FILES = [MANIFEST, "model.safetensors", "progress.json"]


def assert_passed_over(pair: Path, path: Path, caplog: pytest.LogCaptureFixture | None = None) -> None:
    with pytest.raises(CheckpointError) as error:
        load(path.parent)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    newest = latest(pair)
    assert newest is not None
    assert_same_states(newest.states, some(1))
    if caplog is not None:
        warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert [str(path) in record.getMessage() for record in warnings] == [True]


@pytest.mark.row(22)
@settings(max_examples=100)
@given(name=st.sampled_from(FILES), position=st.integers(0, 2**20), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found_and_named(pair: Path, name: str, position: int, bit: int) -> None:
    path = pair / "step-000000002" / name
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[position % len(whole)] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        assert_passed_over(pair, path)
    finally:
        path.write_bytes(whole)


@pytest.mark.row(21)
@settings(max_examples=40)
@given(name=st.sampled_from(FILES), length=st.integers(0, 2**20))
def test_a_cut_file_is_found_and_named(pair: Path, name: str, length: int) -> None:
    path = pair / "step-000000002" / name
    whole = path.read_bytes()
    path.write_bytes(whole[: length % len(whole)])
    try:
        assert_passed_over(pair, path)
    finally:
        path.write_bytes(whole)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n{}"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a list": lambda path: path.write_bytes(b"[]"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.row(21)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_makes_a_run_go_back_with_a_warning(
    pair: Path, tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(pair, folder)
    path = folder / "step-000000002" / name
    DAMAGES[damage](path)
    assert_passed_over(folder, path, caplog)


def test_files_swapped_between_checkpoints_are_found(pair: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(pair, folder)
    shutil.copy(
        folder / "step-000000001/model.safetensors", folder / "step-000000002/model.safetensors"
    )
    assert_passed_over(folder, folder / "step-000000002/model.safetensors")


def test_a_manifest_of_another_version_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, some(1), step=1, epoch=0)
    content = json.loads((folder / MANIFEST).read_bytes()) | {"version": 2}
    del content["digest"]
    (folder / MANIFEST).write_text(json.dumps(content | {"digest": checkpoint._digest(content)}))
    with pytest.raises(CheckpointError, match="has format version 2; this program reads 1"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../step-000000001/model.safetensors",
        "/model.safetensors",
        "sub/model.safetensors",
        "..",
        ".hidden.json",
        "model.pt",
        "manifest.json",
        "",
    ],
)
def test_a_manifest_names_plain_files_only(pair: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(pair, folder)
    path = folder / "step-000000002" / MANIFEST
    content = json.loads(path.read_bytes())
    content["files"][name] = content["files"].pop("model.safetensors")
    del content["digest"]
    path.write_text(json.dumps(content | {"digest": checkpoint._digest(content)}))
    assert_passed_over(folder, path)


@pytest.mark.parametrize("kind", ["a link", "a pipe"])
def test_what_is_no_plain_file_is_not_read(pair: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(pair, folder)
    path = folder / "step-000000002" / "model.safetensors"
    path.rename(tmp_path / "elsewhere")
    if kind == "a link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(path)
    assert_passed_over(folder, path)


def test_a_size_is_compared_before_anything_is_read(pair: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(pair, folder)
    path = folder / "step-000000002" / "model.safetensors"
    os.truncate(path, 2**40)  # a hole: reading it would take all memory
    assert_passed_over(folder, path)
    manifest = path.with_name(MANIFEST)
    os.truncate(manifest, 2**40)
    assert_passed_over(folder, manifest)


def test_nothing_whole_is_an_error_and_not_a_new_start(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        folder = save(tmp_path, some(step), step=step, epoch=0)
        DAMAGES["empty"](folder / FILES[step - 1])
    with pytest.raises(CheckpointError, match=r"none of the 3 checkpoints in .* is whole"):
        latest(tmp_path)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    folder = save(tmp_path, some(1), step=1, epoch=0)
    trap = tmp_path / "trap"

    class Trap:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return os.mkdir, (str(trap),)

    content = pickle.dumps(Trap())
    for name in ("model.pt", "optimizer.pkl", "model.bin", "data.pickle"):
        (folder / name).write_bytes(content)
    assert_same_states(load(folder).states, some(1))
    for name in FILES[1:]:
        (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError):
            load(folder)
    # Even one that the manifest vouches for.
    shutil.rmtree(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_encode", lambda name, _: {f"{name}.safetensors": [content]})
        save(tmp_path, some(1), step=1, epoch=0)
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
        load(folder)
    assert not trap.exists()


def test_later_checkpoints_are_set_aside_and_their_steps_saved_again(
    pair: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(pair, folder)
    (folder / "step-000000002" / MANIFEST).write_bytes(b"{}")
    for repeated in (2, 20):
        set_aside(folder, 1)
        whole = ["other-step-000000002"] if repeated == 20 else []  # nothing is removed
        assert steps(folder) == ["damaged-step-000000002", *whole, "step-000000001"]
        save(folder, some(repeated), step=2, epoch=1)
        newest = latest(folder)
        assert newest is not None
        assert_same_states(newest.states, some(repeated))


# Kept and removed


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@given(
    milestones=st.sets(st.integers(1, 7)),
    unreadable=st.sets(st.integers(1, 7)),
    chosen=st.sets(st.integers(1, 7)),
    last=st.integers(1, 8),
)
@settings(max_examples=10)
def test_tidy_keeps_what_it_must_and_no_more(
    milestones: set[int], unreadable: set[int], chosen: set[int], last: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in range(1, 8):
            state = {"progress": {"step": step}}
            save(folder, state, step=step, epoch=0, milestone=step in milestones)
        for step in unreadable:
            (folder / f"step-{step:09d}" / MANIFEST).write_bytes(b"{")
        tidy(folder, last, chosen)
        readable = [step for step in range(1, 8) if step not in unreadable]
        kept = unreadable | chosen | milestones | set(readable[-last:])
        assert steps(folder) == [f"step-{step:09d}" for step in sorted(kept)]


def rot(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def test_tidy_removes_nothing_before_enough_was_read_and_found_whole(tmp_path: Path) -> None:
    folders = [save(tmp_path, some(step), step=step, epoch=0) for step in range(1, 6)]
    for folder in folders[1:]:
        rot(folder)  # their manifests are as they were
    tidy(tmp_path, 2, ())
    assert len(steps(tmp_path)) == 5
    newest = latest(tmp_path)
    assert newest is not None and newest.step == 1


def test_tidy_counts_those_that_are_whole(tmp_path: Path) -> None:
    folders = [save(tmp_path, some(step), step=step, epoch=0) for step in range(1, 6)]
    rot(folders[3])
    tidy(tmp_path, 2, ())
    assert steps(tmp_path) == [folder.name for folder in folders[2:]]


def test_tidy_reads_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 6):
        save(tmp_path, some(step), step=step, epoch=0)
    read: list[str] = []
    verify = checkpoint.verify
    monkeypatch.setattr(
        checkpoint, "verify", lambda folder: (read.append(folder.name), verify(folder))[1]
    )
    seen = {5: True}
    for _ in range(2):
        tidy(tmp_path, 2, (), seen)
    assert read == ["step-000000004"]
    assert seen == {4: True, 5: True}


def test_tidy_removes_leftovers_and_nothing_of_the_users(tmp_path: Path) -> None:
    save(tmp_path, some(1), step=1, epoch=0)
    for name in (".step-000000002.7.part", ".step-000000001.7.gone", ".damaged-step-000000003.7.gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    for name in ("notes", "damaged-step-000000009", ".hidden", "step-1"):
        (tmp_path / name).mkdir()
    tidy(tmp_path, 1, ())
    assert steps(tmp_path) == [".hidden", "damaged-step-000000009", "notes", "step-000000001", "step-1"]


def test_a_checkpoint_that_cannot_be_removed_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save(tmp_path, some(step), step=step, epoch=0)

    def refuse(*_: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", refuse)
    tidy(tmp_path, 1, ())
    assert "busy" in caplog.text
    assert len(steps(tmp_path)) == 2


# Disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as folder:
        yield folder


@pytest.mark.row(20)
@pytest.mark.parametrize("leave", [0, 4096, 16 * 4096, 40 * 4096])
def test_a_full_disk_leaves_the_older_checkpoint_whole(disk: Path, leave: int) -> None:
    folder = disk / "checkpoints"
    save(folder, some(1), step=1, epoch=0)
    fill(disk, leave)
    before = tree(folder)
    big = {"model": {"weight": torch.zeros(50_000)}, "progress": {"step": 2}}
    with pytest.raises(StorageError, match=r"cannot write .*step-000000002: No space left") as error:
        save(folder, big, step=2, epoch=0)
    assert "\n" not in str(error.value)
    assert tree(folder) == before
    newest = latest(folder)
    assert newest is not None
    assert_same_states(newest.states, some(1))
    (disk / "filler").unlink()
    assert load(save(folder, big, step=2, epoch=0)).step == 2


def test_a_read_only_disk_is_named(disk: Path) -> None:
    folder = disk / "checkpoints"
    save(folder, some(1), step=1, epoch=0)
    make_read_only(disk)
    before = tree(disk)
    for act in (
        lambda: save(folder, some(2), step=2, epoch=0),
        lambda: save(disk / "others", some(2), step=2, epoch=0),
        lambda: set_aside(folder, 0),
    ):
        with pytest.raises(NotWritable, match="Read-only file system") as error:
            act()
        assert "\n" not in str(error.value)
    tidy(folder, 1, ())
    assert tree(disk) == before
    newest = latest(folder)
    assert newest is not None
    assert newest.step == 1
