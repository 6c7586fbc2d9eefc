"""Measurements of a disk: bounded, and they count what was done."""

from __future__ import annotations

import errno
import os
from itertools import count
from pathlib import Path

import pytest

from agrivision.data.schema import Schema
from agrivision.doctor import speed
from agrivision.doctor.speed import read_beginning, sequential_rate, small_files, write_rate
from tests.doctor.folders import tree


def test_a_file_without_a_name_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems have no such files: a named one is removed before it is written."""
    real = os.open

    def refuse(path: Path, flags: int, *more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *more)

    seen = []
    sync = os.fsync
    monkeypatch.setattr(speed.os, "open", refuse)
    monkeypatch.setattr(speed.os, "fsync", lambda file: (seen.append(tree(tmp_path)), sync(file)))
    assert write_rate(tmp_path, 1 << 40, most=1 << 20).amount == 1 << 20
    assert seen == [[]]


def test_rates_count_what_was_done(tmp_path: Path) -> None:
    assert small_files(tmp_path, most=10).amount == 10
    assert tree(tmp_path) == []
    (tmp_path / "a").write_bytes(bytes(100_000))
    (tmp_path / "b").write_bytes(bytes(50_000))
    assert sequential_rate([tmp_path / "a", tmp_path / "b"]).amount == 150_000


def test_each_tile_is_read_once(dataset: Path) -> None:
    tiles = Schema.read(dataset).split("train").tiles
    read: list[int] = []
    rate, number = speed.reading_rate(range(tiles), lambda tile, _: read.append(tile) or 10, seconds=60)
    assert (sorted(read), number, rate.amount) == (list(range(tiles)), tiles, 10 * tiles)


def test_no_more_of_a_file_is_read_than_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "scene.tif"
    path.write_bytes(bytes(3 << 20))
    assert read_beginning(path, float("inf"), most=(2 << 20) + 5) == (2 << 20) + 5
    assert read_beginning(path, float("inf")) == 3 << 20
    assert read_beginning(path, 0.0) == 0


def test_the_clock_is_looked_at_within_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scene.tif"
    path.write_bytes(bytes(5 << 20))
    monkeypatch.setattr(speed.time, "perf_counter", count(10.0).__next__)  # a second a look
    assert read_beginning(path, 12.0) == 2 << 20
