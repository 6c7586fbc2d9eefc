"""The benchmarks run, compare what they say they compare, and print what README.md holds.

Nothing here looks at a speed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from agrivision.data.schema import Schema
from benchmarks import checksums, data, loading, memory, resume
from benchmarks.common import Goal, Median, Report, fresh, interleaved, missing, table
from benchmarks.contestants import CONTESTANTS, OURS
from benchmarks.contestants.samples import BATCH
from benchmarks.data import Data

ROOT = Path(__file__).parents[1]
# Claims that need no peer: they are there wherever the script runs.
CLAIMS = {
    "loading": {"L3"},
    "checksums": {"L5"},
    "prepare": {"L6"},
    "resume": {"L7"},
    "memory": {"L8"},
    "step": {"T1"},
    "ddp": {"T2"},
    "order": {"S1"},
    "maps": {"M1"},
    "watching": {"W1"},
    "gpu": {"G1", "G2", "G4"},
}
WITHOUT_DATA = {"step", "ddp", "order", "maps", "watching", "gpu"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """The data of `--quick`, without the peers' formats."""
    options = argparse.Namespace(
        quick=True, folder=tmp_path_factory.mktemp("benchmarks"), source=None, dataset=None
    )
    return data.make(options, ("truth.json",))


@pytest.mark.faults
@pytest.mark.parametrize("script", CLAIMS)
@pytest.mark.timeout(900)
def test_a_script_runs_and_its_report_is_whole(script: str, small: Data, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", f"benchmarks.{script}", "--quick", "--json", str(out)]
    command += ["--markdown"]
    if script not in WITHOUT_DATA:
        command += ["--folder", str(small.root.parent)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["quick"] and "torch" in report["machine"]
    assert {goal["claim"] for goal in report["goals"]} >= CLAIMS[script]
    assert report["rows"] and all(len(row) == len(report["header"]) for row in report["rows"])
    printed = done.stdout.splitlines()
    assert printed[0] == report["machine"]
    met = [line.split("|")[-2].strip() for line in printed if line.endswith(("yes |", "NO  |", "NO |"))]
    assert met == ["yes" if goal["met"] else "NO" for goal in report["goals"]]
    if script == "loading":
        left_out = [c for c in CONTESTANTS.values() if missing(*c.needs)]
        assert len(report["rows"]) == len(CONTESTANTS) + 1 - len(left_out)
        for contestant in left_out:
            assert any(note.startswith(f"{contestant.title}: left out") for note in report["notes"])


def test_turns_go_back_and_forth_and_the_median_remembers_them() -> None:
    order: list[str] = []
    values = iter([1.0, 10.0, 20.0, 2.0, 9.0, 30.0])

    def turn(name: str) -> float:
        order.append(name)
        return next(values)

    rates = interleaved(3, {"a": lambda: turn("a"), "b": lambda: turn("b")})
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert rates["a"].values == (1.0, 2.0, 9.0) and rates["a"] == 2.0
    assert rates["b"] == 20.0 and rates["b"].spread == 0.5


def test_a_goal_is_met_at_its_limit_and_not_beyond() -> None:
    assert Goal(claim="L1", what="", measured=6.5, at_least=6.5).met
    assert not Goal(claim="L1", what="", measured=6.49, at_least=6.5).met
    assert Goal(claim="L7", what="", measured=0.3, at_most=0.3).met
    assert not Goal(claim="L7", what="", measured=0.31, at_most=0.3).met


def test_a_table_has_numbers_at_the_right_and_texts_at_the_left() -> None:
    lines = table(["loader", "tiles/s"], [["ours", 1234.5], ["theirs", Median([9.0])]]).splitlines()
    assert lines == [
        "| loader | tiles/s |",
        "| ------ | ------: |",
        "| ours   |   1,234 |",
        "| theirs |       9 |",
    ]


def test_markdown_is_only_what_the_page_holds() -> None:
    options = argparse.Namespace(markdown=True, json=None, quick=False)
    report = Report("Loading", options, header=["a"], rows=[["b"]], notes=["a note"])
    report.goal("L1", "what", 2.0, at_least=1.0)
    assert "a note" not in report.text() and "Loading" not in report.text()
    assert "| L1    | what | >= 1 x |      2 x | yes |" in report.text()
    options.markdown = False
    assert "- a note" in report.text() and "## Loading" in report.text()


def test_a_fresh_process_knows_nothing_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.common._NUMBER", None)
    assert fresh(table, ["a"], [["1"]]) == "|   a |\n| --: |\n|   1 |"


def _batch(small: Data) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in next(CONTESTANTS[OURS].batches(small))]


def test_a_batch_of_the_source_passes(small: Data) -> None:
    rgb, nir, labels = _batch(small)
    loading.verify([rgb, nir, labels], small, small.truth())
    joined = torch.cat([rgb, nir], dim=-1)  # as the documented peers deliver it
    loading.verify([joined, labels], small, small.truth())
    loading.verify([joined.permute(0, 3, 1, 2), labels], small, small.truth())


@pytest.mark.parametrize("wrong", ["pixel", "label", "bands", "tile", "count"])
def test_a_peer_that_is_fast_because_wrong_is_noticed(small: Data, wrong: str) -> None:
    rgb, nir, labels = _batch(small)
    if wrong == "pixel":
        rgb[3, 5, 7, 1] += 1
    elif wrong == "label":
        labels[2, 0, 0] ^= 2
    elif wrong == "bands":
        rgb = rgb.flip(-1)
    elif wrong == "tile":
        labels = labels.roll(1, 0)
    else:
        rgb, nir, labels = rgb[:-1], nir[:-1], labels[:-1]
    with pytest.raises(ValueError, match="differ from the source"):
        loading.verify([rgb, nir, labels], small, small.truth())


def test_masks_are_compared_as_what_they_mean(small: Data) -> None:
    from PIL import Image

    keys = small.tile_keys()[:BATCH]
    planes = [[np.asarray(Image.open(path)) for path in small.files(key).values()] for key in keys]
    rgb = torch.from_numpy(np.stack([tile[0] for tile in planes]))
    nir = torch.from_numpy(np.stack([tile[1] for tile in planes]))[..., None]
    masks = torch.from_numpy(np.stack([np.stack(tile[2:]) for tile in planes]))
    loading.verify([rgb, nir, masks], small, small.truth())
    with pytest.raises(ValueError, match="differ from the source"):
        loading.verify([rgb, nir, masks.flip(1)], small, small.truth())


def test_every_single_byte_of_damage_is_found(small: Data, tmp_path: Path) -> None:
    found = checksums.damage(small, 60, tmp_path)
    assert found["checksum"] == found["checksum of an index"] == 100.0
    assert found["Pillow and zstd"] < 100.0  # otherwise there would be nothing to show


def test_a_large_set_reads_like_the_small_one(small: Data, tmp_path: Path) -> None:
    tiles = len(small.reader)
    resume.enlarge(small, tmp_path, 3 * tiles + 1)
    schema = Schema.read(tmp_path)
    large = data.SplitReader(tmp_path, schema, data.SPLIT)
    assert len(large) > 3 * tiles
    assert [bytes(file) for file in large.read(2 * tiles)] == [
        bytes(file) for file in small.reader.read(0)
    ]


def test_the_stream_depends_on_the_place_and_not_on_threads_or_ranks(small: Data) -> None:
    assert resume.stream(small.dataset, 0, 1, 2) == resume.stream(small.dataset, 3, 4, 2)
    assert resume.stream(small.dataset, 1, 1, 2) != resume.stream(small.dataset, 1, 1, 3)


def test_growth_is_the_slope_after_the_first_epoch() -> None:
    assert memory.growth([500.0, 100.0, 101.0, 102.0, 103.0]) == pytest.approx(100 / 101.5)
    assert memory.growth([500.0, 100.0, 100.0, 100.0]) == pytest.approx(0.0, abs=1e-9)
