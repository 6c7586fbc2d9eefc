"""Files are replaced whole or not at all, and a disk that refuses is told in one line."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agrivision.errors import AgrivisionError, NotWritable, StorageError
from agrivision.storage import make_private, remove_tree, replacing, storage_error, write_atomically
from tests.disks import fill, make_read_only, small_disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as folder:
        yield folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def one_line(error: pytest.ExceptionInfo[AgrivisionError], path: Path) -> None:
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@settings(max_examples=20)
@given(versions=st.lists(st.binary(max_size=3000), min_size=1, max_size=4))
def test_the_last_version_stands(versions: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for content in versions:
            write_atomically(Path(folder) / "file", content)
            assert files(Path(folder)) == {"file": content}


def test_a_link_where_the_new_version_grows_is_not_followed(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"somebody else's")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / f".file.{os.getpid()}.part").symlink_to(foreign)
    write_atomically(folder / "file", b"new")
    assert foreign.read_bytes() == b"somebody else's"
    assert files(folder) == {"file": b"new"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, Killed])
def test_an_error_inside_keeps_the_old_bytes(tmp_path: Path, kind: type[BaseException]) -> None:
    write_atomically(tmp_path / "file", b"old")

    def half() -> None:
        with replacing(tmp_path / "file") as file:
            file.write(b"new")
            file.flush()
            assert (tmp_path / "file").read_bytes() == b"old"
            raise kind

    with pytest.raises(kind):
        half()
    assert files(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("refused", ["os.fsync", "pathlib.Path.replace"])
def test_a_disk_that_refuses_late_keeps_the_old_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    write_atomically(tmp_path / "file", b"old")

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(refused, refuse)
        with pytest.raises(StorageError, match="Input/output error") as error:
            write_atomically(tmp_path / "file", b"new")
    one_line(error, tmp_path / "file")
    assert files(tmp_path) == {"file": b"old"}


def test_a_full_disk_keeps_the_old_bytes(disk: Path) -> None:
    write_atomically(disk / "file", b"old" * 1000)
    fill(disk, leave=16 * 1024)
    before = files(disk)
    with pytest.raises(StorageError, match="No space left") as error:
        write_atomically(disk / "file", b"new" * 10_000)
    one_line(error, disk / "file")
    assert files(disk) == before
    write_atomically(disk / "file", b"new")
    assert (disk / "file").read_bytes() == b"new"


@pytest.mark.parametrize(
    "act",
    [lambda path: write_atomically(path, b"new"), make_private, remove_tree],
    ids=["write", "make", "remove"],
)
def test_a_read_only_disk_is_the_users_to_change(disk: Path, act: Callable[[Path], None]) -> None:
    (disk / "old").mkdir()
    make_read_only(disk)
    path = disk / ("old" if act is remove_tree else "new")
    with pytest.raises(NotWritable, match="Read-only file system") as error:
        act(path)
    one_line(error, path)
    assert files_below(disk) == ["old"]


def files_below(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*")]


@pytest.mark.parametrize("below", ["missing/file", "file/below", "f" * 250])
def test_a_place_that_cannot_be_is_the_users_to_change(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_bytes(b"a file, no folder")
    path = tmp_path / below
    with pytest.raises(NotWritable) as error:
        write_atomically(path, b"new")
    one_line(error, path)
    assert files(tmp_path) == {"file": b"a file, no folder"}


def test_a_folder_in_the_files_place_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(NotWritable):
        write_atomically(tmp_path / "file", b"new")
    assert files_below(tmp_path) == ["file"]


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_a_private_folder_is_its_owners_alone(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        make_private(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


def test_an_existing_folder_of_ours_becomes_private(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o770)
    (folder / "file").write_text("stays")
    make_private(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "file").read_text() == "stays"


@pytest.mark.parametrize("below", ["file", "file/below"])
def test_a_file_in_the_folders_place_is_the_users_to_change(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotWritable) as error:
        make_private(tmp_path / below)
    one_line(error, tmp_path / below)


def test_a_tree_is_removed_whole(tmp_path: Path) -> None:
    (tmp_path / "tree/deep").mkdir(parents=True)
    (tmp_path / "tree/deep/file").write_bytes(b"x")
    (tmp_path / "beside").touch()
    remove_tree(tmp_path / "tree")
    assert files_below(tmp_path) == ["beside"]


def test_a_tree_half_removed_is_not_seen_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tree").mkdir()

    def kill(*_: object) -> None:
        raise Killed

    monkeypatch.setattr("shutil.rmtree", kill)
    with pytest.raises(Killed):
        remove_tree(tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_a_tree_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotWritable) as error:
        remove_tree(tmp_path / "none")
    one_line(error, tmp_path / "none")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_what_waiting_may_mend_is_no_bad_input(number: int) -> None:
    error = storage_error(Path("x"), OSError(number, os.strerror(number)))
    assert type(error) is StorageError
