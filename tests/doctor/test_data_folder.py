"""Folders of data that are slow, damaged or empty: each is named, and nothing is left behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from agrivision.doctor.data_folder import examine_data
from agrivision.doctor.finding import Verdict
from tests.doctor.folders import tree
from tests.doctor.said import about, worse


def test_a_data_set_is_read(dataset: Path) -> None:
    before = tree(dataset)
    found = list(examine_data(dataset, gpus=1, shared=False))
    assert "at random places" in about(found, "tiles a second").what
    assert about(found, "shard after shard").verdict == Verdict.GOOD
    assert tree(dataset) == before


def damage(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[:] = bytes(byte ^ 1 for byte in content)
    shard.write_bytes(content)


def cut(shard: Path) -> None:
    os.truncate(shard, 1000)


@pytest.mark.parametrize("harm", [damage, cut, Path.unlink])
def test_a_damaged_data_set_is_named(
    harm: Callable[[Path], None], dataset: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    for shard in (copy / "train").glob("*.tar"):
        harm(shard)
    found = [each for each in examine_data(copy, gpus=1, shared=False) if each.verdict == Verdict.BAD]
    assert len(found) == 1
    assert "train/" in found[0].what


def test_small_files_are_read(fields: Path) -> None:
    found = list(examine_data(fields, gpus=1, shared=False))
    assert "tiles of 13 files each" in about(found, "files a second").what


def test_a_data_folder_that_is_empty_or_not_there_is_named(tmp_path: Path) -> None:
    assert about(examine_data(tmp_path, gpus=1, shared=False), "no files").verdict == Verdict.CAREFUL
    assert worse(examine_data(tmp_path / "none", gpus=1, shared=False)) == [
        ("bad", "there is no such folder")
    ]


def test_where_a_copy_would_go(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    assert str(tmp_path) in about(examine_data(dataset, gpus=1, shared=False), "data.stage").what
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "gone"))
    found = about(examine_data(dataset, gpus=1, shared=False), "data.stage")
    assert found.verdict == Verdict.CAREFUL


def test_of_large_files_the_beginning_is_read(tmp_path: Path) -> None:
    """A tebibyte each, of holes: read as a whole, one of them is more than any memory."""
    for name in ["a.tif", "b.tif"]:
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 1 << 40)
    found = list(examine_data(tmp_path, gpus=1, shared=False))
    assert about(found, "large files").verdict == Verdict.GOOD
    assert not [each.what for each in found if "files a second" in each.what]
