import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from torch.utils.tensorboard import SummaryWriter

from agrivision.errors import NotWritable
from agrivision.monitor import summaries
from agrivision.monitor.tensorboard import TensorBoard, keep_events


def run(folder: Path, resume_step: int, last_step: int) -> None:
    """Train from the step after `resume_step` to `last_step`, with a picture every fifth step."""
    with TensorBoard(folder, resume_step) as board:
        board.text("configuration", f"from {resume_step}")
        for step in range(resume_step + 1, last_step + 1):
            board.scalars(step, {"loss/total": 1 / step, "train/lr": step * 0.5})
            if step % 5 == 0:
                board.pictures(step, "val/tile", np.full((8, 12, 3), step, np.uint8))


def tear(folder: Path, garbage: bytes = b"") -> None:
    """Cut into the last record of the newest file, as a kill or a full disk does."""
    newest = max(folder.iterdir())
    content = newest.read_bytes()
    newest.write_bytes(content[:-7] + garbage)


def raw(folder: Path, tag: str) -> list[int]:
    """The steps of a tag, read by a reader that knows nothing of restarts."""
    steps = []
    for path in sorted(folder.iterdir()):
        for event in LegacyEventFileLoader(str(path)).Load():
            steps += [event.step for value in event.summary.value if value.tag == tag]
    return steps


def accumulated(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def check(folder: Path, last_step: int) -> None:
    everyone = list(range(1, last_step + 1))
    assert raw(folder, "loss/total") == everyone
    assert raw(folder, "val/tile") == [step for step in everyone if step % 5 == 0]
    events = accumulated(folder)
    assert [scalar.step for scalar in events.Scalars("loss/total")] == everyone
    assert [scalar.value for scalar in events.Scalars("train/lr")] == [step * 0.5 for step in everyone]
    assert [image.step for image in events.Images("val/tile")] == raw(folder, "val/tile")


def test_a_run_without_interruption(tmp_path: Path) -> None:
    run(tmp_path / "tensorboard", 0, 20)
    check(tmp_path / "tensorboard", 20)
    image = accumulated(tmp_path / "tensorboard").Images("val/tile")[0]
    assert (image.height, image.width) == (8, 12)


@pytest.mark.parametrize("garbage", [b"", b"\0" * 40, b"\xff" * 40])
def test_two_kills_and_each_step_once(tmp_path: Path, garbage: bytes) -> None:
    run(tmp_path, 0, 23)
    tear(tmp_path, garbage)
    run(tmp_path, 10, 18)
    tear(tmp_path, garbage)
    run(tmp_path, 12, 31)
    check(tmp_path, 31)


def test_a_torn_end_without_a_step_to_drop(tmp_path: Path) -> None:
    run(tmp_path, 0, 12)
    tear(tmp_path)
    run(tmp_path, 11, 14)
    check(tmp_path, 14)


def test_resumed_twice_at_the_same_step(tmp_path: Path) -> None:
    run(tmp_path, 0, 12)
    run(tmp_path, 10, 13)
    run(tmp_path, 10, 15)
    check(tmp_path, 15)
    assert raw(tmp_path, "configuration/text_summary") == [1, 11]
    assert len(list(tmp_path.iterdir())) == 2


def test_resumed_before_the_first_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, 0, 12)
    with TensorBoard(tmp_path, 0) as board:
        board.scalars(0, {"score/miou": 0.1})
    with TensorBoard(tmp_path, 0) as board:
        board.scalars(0, {"score/miou": 0.1})
    assert raw(tmp_path, "score/miou") == [0]
    assert raw(tmp_path, "loss/total") == []


def test_what_is_made_again_is_removed_first(tmp_path: Path) -> None:
    run(tmp_path, 0, 10)
    with TensorBoard(tmp_path, 10, again=lambda tag: tag.startswith("val/")) as board:
        board.pictures(10, "val/tile", np.full((8, 12, 3), 10, np.uint8))
    check(tmp_path, 10)


def test_resumed_at_the_end(tmp_path: Path) -> None:
    run(tmp_path, 0, 12)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    run(tmp_path, 12, 12)
    check(tmp_path, 12)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_what_is_about_the_run_stands_there_once(tmp_path: Path) -> None:
    config, charts = "config/text_summary", "custom_scalars__config__"
    about = {
        config: summaries.text("config", "first"),
        charts: summaries.layout({"a": {"b": ["c"]}}),
        "end": None,
    }
    for resume_step in (0, 5, 9):
        with TensorBoard(tmp_path, resume_step, about=about) as board:
            for step in range(resume_step + 1, resume_step + 7):
                board.scalars(step, {"end" if step == 9 else "loss/total": 1.0})
    assert raw(tmp_path, config) == raw(tmp_path, charts) == [0]
    assert raw(tmp_path, "end") == []
    assert raw(tmp_path, "loss/total") == [*range(1, 9), *range(10, 16)]
    # The same again leaves every file as it is; something else replaces what it stands for.
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    TensorBoard(tmp_path, 15, about=about).close()
    assert all(path.read_bytes() == content for path, content in before.items())
    about[config] = summaries.text("config", "second")
    TensorBoard(tmp_path, 15, about=about).close()
    assert raw(tmp_path, config) == raw(tmp_path, charts) == [0]
    assert accumulated(tmp_path).Tensors(config)[0].tensor_proto.string_val == [b"second"]


def test_what_an_attempt_on_a_lost_node_still_writes_goes_nowhere(tmp_path: Path) -> None:
    with TensorBoard(tmp_path, 0) as lost:
        for step in range(1, 13):
            lost.scalars(step, {"loss/total": 1.0 / step})
        lost.flush()
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with TensorBoard(tmp_path, 12):
            lost.scalars(13, {"loss/total": -1.0})
            lost.flush()
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def write_until_killed(folder: str) -> None:
    with TensorBoard(Path(folder), 0) as board:
        for step in range(1, 1_000_000):
            board.scalars(step, {"loss/total": 1.0})


@pytest.mark.row(36)
def test_a_real_kill_loses_nothing_that_was_written(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=write_until_killed, args=[str(tmp_path)]
    )
    process.start()
    deadline = time.monotonic() + 30
    while sum(path.stat().st_size for path in tmp_path.iterdir()) < 5000:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    last = max(raw(tmp_path, "loss/total"))
    assert last > 50
    with TensorBoard(tmp_path, last - 3) as board:
        for step in range(last - 2, last + 5):
            board.scalars(step, {"loss/total": 1.0})
    assert raw(tmp_path, "loss/total") == list(range(1, last + 5))


@pytest.mark.row(34)
def test_a_clock_that_is_behind_does_not_hide_the_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, 0, 6)
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    run(tmp_path, 6, 9)
    check(tmp_path, 9)


def test_a_tensorboard_that_runs_forgets_the_removed_steps(tmp_path: Path) -> None:
    run(tmp_path, 0, 12)
    events = accumulated(tmp_path)
    run(tmp_path, 10, 11)
    assert [scalar.step for scalar in events.Reload().Scalars("loss/total")] == list(range(1, 12))


def test_keep_events_reads_files_of_other_writers(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    for step in range(10):
        writer.add_scalar("loss", step, step)
    writer.close()
    assert keep_events(tmp_path, 6) == 3
    assert raw(tmp_path, "loss") == list(range(7))
    assert keep_events(tmp_path, 6) == 0
    assert keep_events(tmp_path, -1) == 7
    assert list(tmp_path.iterdir()) == []


def test_records_are_copied_byte_for_byte(tmp_path: Path) -> None:
    run(tmp_path / "a", 0, 20)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    keep_events(tmp_path / "b", 7)
    (a,), (b,) = (tmp_path / "a").iterdir(), (tmp_path / "b").iterdir()
    assert a.name == b.name
    assert a.read_bytes().startswith(b.read_bytes())
    assert 0 < b.stat().st_size < a.stat().st_size


def test_other_files_and_folders_are_left_alone(tmp_path: Path) -> None:
    run(tmp_path / "sub", 0, 5)
    (tmp_path / "notes.txt").write_text("mine")
    run(tmp_path, 0, 5)
    assert raw(tmp_path / "sub", "loss/total") == [1, 2, 3, 4, 5]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder belongs")
    with pytest.raises(NotWritable, match=r"cannot write .*tensorboard: File exists"):
        TensorBoard(tmp_path / "tensorboard", 0)
