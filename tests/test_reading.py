from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from agrivision import reading
from agrivision.data.schema import Schema
from agrivision.data.sources.source import Flaw, content_of
from agrivision.doctor.pace import pace_of
from agrivision.errors import BadInput, DatasetError
from agrivision.inference.exported import load_exported
from agrivision.ownership import read_own
from agrivision.reading import open_plain, plain_descriptor, read_plain
from agrivision.report.history import read_history
from agrivision.rundir import RunDirectory
from launch.status import plan_of
from tests.fuzz.worker import open_files
from tests.report.made import interrupted_run


def test_a_file_and_what_a_link_leads_to_are_read(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"12345")
    link.symlink_to(path)
    for each in (path, str(path), link):
        assert read_plain(each, 5) == b"12345"
    with open_plain(path, follow=False) as file:
        assert file.read() == b"12345"
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        open_plain(link, follow=False)
    with pytest.raises(ValueError, match="it has 5 bytes where 4 are the most"):
        read_plain(path, 4)
    with pytest.raises(FileNotFoundError):
        read_plain(tmp_path / "nothing", 5)


def test_a_large_file_is_read_in_more_than_one_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    whole = os.read
    monkeypatch.setattr(reading.os, "read", lambda file, size: whole(file, min(size, 2)))
    assert read_plain(tmp_path / "file", 5) == b"12345"


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_all_else_is_refused_at_once_and_closed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "it"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    wanted = "Is a directory" if kind == "folder" else "it is no plain file"
    before = open_files()
    for take in (plain_descriptor, open_plain, lambda path: read_plain(path, 1 << 20)):
        with pytest.raises(OSError, match=wanted):
            take(path)
    assert open_files() == before


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "data set": ("dataset.json", lambda path: Schema.read(path.parent)),
    "source": ("tile.jpg", content_of),
    "site": ("site.yaml", read_own),
    "exported": ("a.safetensors", lambda path: load_exported(path, "safetensors", "cpu")),
    "rows": ("metrics.jsonl", lambda path: RunDirectory(path.parent).evaluations()),
    "report": ("metrics.jsonl", lambda path: read_history(path.parent, 0.0)),
}


@pytest.mark.parametrize("reader", READERS)
def test_nobody_waits_for_a_pipe(tmp_path: Path, reader: str) -> None:
    name, read = READERS[reader]
    os.mkfifo(tmp_path / name)
    with pytest.raises((DatasetError, Flaw, OSError, BadInput), match="it is no plain file"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["config.yaml", "provenance.json", "log/rank-0.log"])
def test_a_run_is_reported_without_what_is_a_pipe(tmp_path: Path, name: str) -> None:
    run = interrupted_run(tmp_path / "run")
    steps = read_history(run, 0.0).metrics.last_step
    (run / name).unlink(missing_ok=True)
    (run / name).parent.mkdir(exist_ok=True)
    os.mkfifo(run / name)
    assert read_history(run, 0.0).metrics.last_step == steps > 0
    assert not pace_of(run, None).known or name != "config.yaml"
    assert name != "config.yaml" or plan_of(run / name) is None
