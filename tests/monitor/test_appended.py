"""Rows on disks that refuse, now and then: in the end each stands in the file once, in its order."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agrivision.errors import NotWritable, StorageError
from agrivision.monitor import appended
from agrivision.monitor.appended import Appended
from agrivision.monitor.log import LOGGER_NAME
from tests.disks import fill, small_disk

FULL = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE]


@pytest.fixture(autouse=True)
def _heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(LOGGER_NAME), "propagate", True)


class Disk:
    """Patches the calls that write, so that each fails when it is told to, some after a part."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None  # bytes that it takes until it is full
        self.refuses: dict[str, int] = {}  # error numbers by call
        self._calls: dict[str, Callable[..., Any]] = {}
        for name in ("write", "fsync", "ftruncate"):
            self._calls[name] = getattr(os, name)
            patch.setattr(os, name, getattr(self, f"_{name}"))

    def _refuse(self, call: str) -> None:
        if call in self.refuses:
            raise OSError(self.refuses[call], os.strerror(self.refuses[call]))

    def _write(self, file: int, content: Any) -> int:
        self._refuse("write")
        if self.room is not None:
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            content = memoryview(content)[: self.room]
            self.room -= len(content)
        return int(self._calls["write"](file, content))

    def _fsync(self, file: int) -> None:
        if "fsync" in self.refuses:
            # As on NFS: what was taken since the last one is gone, and the next fsync says nothing.
            number = self.refuses.pop("fsync")
            size = os.fstat(file).st_size
            os.pwrite(file, b"\0" * max(0, size - self.safe), self.safe)
            raise OSError(number, os.strerror(number))
        self._calls["fsync"](file)
        self.safe = os.fstat(file).st_size

    def _ftruncate(self, file: int, size: int) -> None:
        self._refuse("ftruncate")
        self._calls["ftruncate"](file, size)

    safe = 0


PIECES = st.lists(st.integers(1, 40), min_size=1, max_size=4)
EVENTS = st.lists(
    st.tuples(
        PIECES,
        st.sampled_from(["well", "full", "no room to cut", "fsync"]),
        st.integers(0, 60),
        st.sampled_from(FULL),
    ),
    max_size=8,
)


@settings(max_examples=200)
@given(events=EVENTS)
def test_whatever_the_disk_does_each_piece_is_there_once(
    events: list[tuple[list[int], str, int, int]],
) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        disk, path = Disk(patch), Path(name) / "rows"
        file, wanted = Appended(path), b""
        for number, (sizes, mood, room, code) in enumerate(events):
            disk.room = room if mood in ("full", "no room to cut") else None
            disk.refuses = {"ftruncate": code} if mood == "no room to cut" else {}
            for size in sizes:
                piece = bytes([65 + number]) * size + b"\n"
                wanted += piece
                file.append(piece)
                if mood == "full":  # a reader sees whole pieces, always
                    there = path.read_bytes()
                    assert wanted.startswith(there)
                    assert not there or there.endswith(b"\n")
            if mood == "fsync":
                disk.refuses = {"fsync": code}
                with pytest.raises(StorageError):
                    file.flush()
        disk.room, disk.refuses = None, {}
        file.flush()
        assert path.read_bytes() == wanted
        file.close()
        assert path.read_bytes() == wanted


@pytest.mark.parametrize("number", FULL)
def test_it_is_said_once_and_when_it_is_over(
    tmp_path: Path,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk, file = Disk(monkeypatch), Appended(tmp_path / "rows")
    for _ in range(2):
        disk.refuses = {"write": number}
        for _ in range(3):
            file.append(b"row\n")
        disk.refuses = {}
        file.append(b"row\n")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 4
    assert os.strerror(number) in said[0] and "kept in memory" in said[0]
    assert "nothing is missing" in said[1]
    assert (tmp_path / "rows").read_bytes() == b"row\n" * 8


def test_memory_is_bounded_and_the_end_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(appended, "_MOST_BYTES", 100)
    disk, file = Disk(monkeypatch), Appended(tmp_path / "rows")
    disk.room = 0
    for _ in range(10):
        file.append(b"123456789\n")
    with pytest.raises(StorageError, match="No space left"):
        file.append(b"123456789\n")


def test_what_is_kept_for_the_next_flush_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(appended, "_FLUSH_BYTES", 100)
    file = Appended(tmp_path / "rows")
    for _ in range(100):
        file.append(b"123456789\n")
        assert file._kept <= 100
    assert (tmp_path / "rows").read_bytes() == b"123456789\n" * 100


def test_pieces_are_added_while_another_thread_waits_for_a_slow_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, reached, go = Appended(tmp_path / "rows"), threading.Event(), threading.Event()
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        reached.set()
        assert go.wait(60)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    flushing = threading.Thread(target=file.flush)
    file.append(b"one\n")
    flushing.start()
    assert reached.wait(60)
    file.append(b"two\n")
    assert (tmp_path / "rows").read_bytes() == b"one\ntwo\n"
    go.set()
    flushing.join()
    file.close()
    assert (tmp_path / "rows").read_bytes() == b"one\ntwo\n"


def test_a_file_that_is_there_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "rows").touch()
    with pytest.raises(NotWritable, match="File exists"):
        Appended(tmp_path / "rows", new=True)


def test_a_disk_that_was_full_and_is_not_any_more(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        file = Appended(disk / "rows")
        wanted = b""
        for number in range(3):
            fill(disk, 5000)
            for count in range(1000):
                piece = f"{number} {count}\n".encode()
                file.append(piece)
                wanted += piece
            there = (disk / "rows").read_bytes()
            assert there != wanted and wanted.startswith(there) and there.endswith(b"\n")
            with pytest.raises(StorageError, match="No space left"):
                file.flush()
            (disk / "filler").unlink()
        file.close()
        assert (disk / "rows").read_bytes() == wanted
