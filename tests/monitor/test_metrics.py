import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agrivision.errors import NotWritable, StorageError
from agrivision.monitor.metrics import MetricsLog, keep_steps


def write(path: Path, steps: range) -> None:
    with MetricsLog(path) as log:
        for step in steps:
            log.append({"step": step, "loss": 1 / step})


def read(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_rows_are_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"step": 1, "loss": float("nan"), "iou": {"weed": np.float32("inf"), "skip": 0.5}})
        log.append({"step": np.int64(2), "keys": ["å", "b"], "lr": (np.float32(0.5), None)})
        log.flush()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    rows = [json.loads(line, parse_constant=refuse) for line in path.read_text("utf-8").splitlines()]
    assert rows == [
        {"step": 1, "loss": None, "iou": {"weed": None, "skip": 0.5}},
        {"step": 2, "keys": ["å", "b"], "lr": [0.5, None]},
    ]


def test_a_row_is_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"step": 1})
        assert read(path) == [1]


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    write(whole, range(1, 21))
    write(resumed, range(1, 14))
    with resumed.open("ab") as file:
        file.write(b'{"step": 14, "lo')
    assert keep_steps(resumed, 10) == 4
    write(resumed, range(11, 18))
    assert keep_steps(resumed, 15) == 2
    write(resumed, range(16, 21))
    assert resumed.read_bytes() == whole.read_bytes()


def test_nothing_to_drop_is_no_rewrite(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 5))
    before = path.stat()
    assert keep_steps(path, 4) == 0
    after = path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert keep_steps(tmp_path / "metrics.jsonl", 4) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "torn", [b'{"step": 3', b'{"step": 3}', b"\0\0\0\0\n", b"[3]\n", b'{"epoch": 1}\n', b"\xff\xfe\n"]
)
def test_what_is_no_whole_row_goes(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    assert keep_steps(path, 100) == 1
    assert read(path) == [1, 2]


@given(steps=st.lists(st.integers(0, 9)), last=st.integers(-1, 10))
def test_exactly_the_later_rows_go(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], last: int
) -> None:
    path = tmp_path_factory.mktemp("rows") / "samples-0.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    kept = [step for step in steps if step <= last]
    assert keep_steps(path, last) == len(steps) - len(kept)
    assert read(path) == kept


def test_a_file_larger_than_the_buffers(tmp_path: Path) -> None:
    path = tmp_path / "samples-0.jsonl"
    row = '{{"step": {}, "keys": "' + "k" * 1000 + '"}}\n'
    path.write_text("".join(row.format(step) for step in range(3000)))
    assert keep_steps(path, 2500) == 499
    assert read(path) == list(range(2501))


def test_a_disk_that_is_full_to_the_end_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    log = MetricsLog(path)
    log.append({"step": 1})  # kept
    with pytest.raises(StorageError, match="No space left"):
        log.close()


def test_the_first_error_counts_and_the_second_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    log = MetricsLog(path)
    log.append({"step": 1})
    log.__exit__(KeyError, KeyError(), None)  # lets the block's own error through
    assert "No space left" in caplog.text


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(NotWritable, match=r"cannot write .*metrics.jsonl"):
        MetricsLog(tmp_path / "missing" / "metrics.jsonl")
