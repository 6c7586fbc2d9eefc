"""Saving behind the training: the same checkpoints, in the same order, and no error is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from agrivision import checkpoint, snapshot
from agrivision.errors import Diverged, ExitCode, NotWritable, StorageError, Superseded
from agrivision.rundir import RunDirectory
from agrivision.snapshot import Snapshot
from agrivision.training import saver as saving
from agrivision.training.patience import DiskPatience
from agrivision.training.saver import Saved, Saver, SaveWatch
from agrivision.training.trainer import Trainer
from tests.disks import fill, make_read_only, small_disk
from tests.heard import hear
from tests.ranks import run
from tests.test_checkpoint import assert_same_states, tree
from tests.training.runs import arguments, assert_same, metrics

PATIENCE = 60.0  # seconds


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)


def some(value: float, size: int = 1000) -> dict[str, dict[str, Any]]:
    weight = torch.full((size // 10, 10), float(value))
    return {"model": {"weight": weight}, "progress": {"value": value, "sums": {"loss": value}}}


class Gate:
    """Holds up each write before its first byte until it is opened."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.reached = 0

    def __call__(self) -> None:
        self.reached += 1
        assert self._open.wait(PATIENCE)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()  # a test that failed leaves no thread behind


def saver_in(folder: Path, **changes: Any) -> Saver:
    return Saver(RunDirectory(folder), **({"keep_last": 10, "allowed": lambda: None} | changes))


def saved_in(folder: Path) -> list[int]:
    return [entry.step for entry in checkpoint.entries(folder / "checkpoints")]


def load(folder: Path, step: int) -> checkpoint.Checkpoint:
    return checkpoint.load(folder / "checkpoints" / f"step-{step:09d}")


# The saver alone


def test_the_file_is_the_one_that_is_written_at_once(tmp_path: Path) -> None:
    states = some(1)
    with saver_in(tmp_path / "behind") as saver:
        saver.prepare(lambda: states)
        saver.save(states, step=7, epoch=2, milestone=True)
    at_once = tmp_path / "at once"
    checkpoint.save(at_once, states, step=7, epoch=2, milestone=True)
    assert tree(tmp_path / "behind" / "checkpoints") == tree(at_once)


def test_training_goes_on_while_it_is_written_and_changes_nothing(tmp_path: Path, gate: Gate) -> None:
    states = some(1)
    with saver_in(tmp_path, flush=gate) as saver:
        saver.save(states, step=1, epoch=0)  # returns, though nothing can be written
        saver.copied()
        states["model"]["weight"].fill_(5)
        states["progress"]["sums"]["loss"] = 5
        assert saved_in(tmp_path) == []
        gate.open()
    assert_same_states(load(tmp_path, 1).states, some(1))


def training_stands(*functions: Callable[..., Any]) -> bool:
    """Whether the main thread waits for another one, and is in these functions."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    waits, codes = frame.f_code.co_filename == threading.__file__, set()
    while frame is not None:
        codes.add(frame.f_code)
        frame = frame.f_back  # type: ignore[assignment]
    return waits and codes >= {function.__code__ for function in functions}


def hold_up_copies(
    act: Callable[[], object],
    *,
    count: int = 1,
    large: int = 0,
    put: Callable[[Any, str, Any], None] = setattr,
) -> None:
    """Do something in the thread of the first copies before a large tensor is copied.

    Args:
        act: what to do.
        count: how many copies it is done for.
        large: bytes from which on a tensor is large.
        put: sets an attribute.
    """
    original, calls = Snapshot.finish, []

    def finish(self: Snapshot) -> Any:
        assert self._left
        calls.append(1)
        if len(calls) <= count:
            act()
        return original(self)

    put(Snapshot, "finish", finish)
    put(snapshot, "_LARGE_BYTES", large)


def test_what_is_saved_is_copied_before_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each copy begins when the training waits for it already."""
    act = partial(wait_for, partial(training_stands, Saver.copied, Snapshot.wait))
    hold_up_copies(act, count=3, put=monkeypatch.setattr)
    states = some(1)
    with saver_in(tmp_path) as saver:
        saver.copied()  # nothing was saved yet
        for step in (1, 2, 3):
            saver.save(states, step=step, epoch=0)
            states["progress"] |= some(step + 1)["progress"]  # at once
            saver.copied()
            states["model"]["weight"].fill_(step + 1)
            saver.copied()  # of what is copied already
    for step in (1, 2, 3):
        assert_same_states(load(tmp_path, step).states, some(step))


def test_the_log_says_how_long_training_stood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    begin, wait = Snapshot.begin, Snapshot.wait

    def take_a_second(self: Snapshot, states: Any) -> None:
        now[0] += 1
        begin(self, states)

    def wait_two(self: Snapshot) -> None:
        wait(self)
        now[0] += 2

    monkeypatch.setattr(saving, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(Snapshot, "begin", take_a_second)
    monkeypatch.setattr(Snapshot, "wait", wait_two)
    hold_up_copies(
        lambda: wait_for(partial(training_stands, wait_two)), count=2, put=monkeypatch.setattr
    )
    caplog.set_level("INFO")
    with saver_in(tmp_path) as saver:
        for step in (1, 2):
            saver.save(some(step), step=step, epoch=0)
            saver.copied()
            saver.wait()
    stood = [row.getMessage() for row in caplog.records if "stood still" in row.getMessage()]
    assert [line.partition(": ")[0] for line in stood] == [
        f"step {step} saved in 3.0 s, training stood still for 3000 ms" for step in (1, 2)
    ]


def test_an_error_of_the_copy_is_raised_by_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise StorageError("the memory is broken")

    hold_up_copies(lambda: None, put=monkeypatch.setattr)
    with saver_in(tmp_path) as saver:
        with monkeypatch.context() as broken:
            broken.setattr(snapshot, "_cut", lambda *_: fail())
            saver.save(some(1), step=1, epoch=0)
            saver.copied()  # nobody waits for ever
            wait_for(lambda: saver.failed)
        with pytest.raises(StorageError, match="memory is broken"):
            saver.save(some(2), step=2, epoch=0)
        assert saved_in(tmp_path) == []
        saver.save(some(3), step=3, epoch=0)
    assert saved_in(tmp_path) == [3]


def test_the_second_save_waits_for_the_first(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, running, most, order = checkpoint.save, [0], [0], []

    def save(*args: Any, step: int, **kwargs: Any) -> Path:
        running[0] += 1
        most[0] = max(most[0], running[0])
        order.append(("begins", step))
        path = original(*args, step=step, **kwargs)
        order.append(("ends", step))
        running[0] -= 1
        return path

    monkeypatch.setattr(checkpoint, "save", save)
    opener = threading.Thread(target=lambda: (wait_for(lambda: gate.reached), gate.open()))
    with saver_in(tmp_path, flush=gate) as saver:
        saver.save(some(1), step=1, epoch=0)
        opener.start()
        for step in (2, 3, 4):
            saver.save(some(step), step=step, epoch=0)
            assert saved_in(tmp_path)[-1] >= step - 1  # the one before has its name by now
    opener.join()
    assert most == [1]
    assert order == [(word, step) for step in (1, 2, 3, 4) for word in ("begins", "ends")]
    for step in (1, 2, 3, 4):
        assert_same_states(load(tmp_path, step).states, some(step))


def test_states_of_another_shape_are_saved_too(tmp_path: Path) -> None:
    with saver_in(tmp_path) as saver:
        saver.prepare(lambda: some(0, 500))
        for step, size in ((1, 1000), (2, 20), (3, 20), (4, 3000)):
            saver.save(some(step, size), step=step, epoch=0)
    for step, size in ((1, 1000), (2, 20), (3, 20), (4, 3000)):
        assert_same_states(load(tmp_path, step).states, some(step, size))


def test_memory_is_allocated_once(tmp_path: Path) -> None:
    asked = []

    def states() -> dict[str, dict[str, Any]]:
        asked.append(1)
        return some(1)

    with saver_in(tmp_path) as saver:
        for _ in range(3):
            saver.prepare(states)
        first = saver._snapshot
        for step in (1, 2):
            saver.save(some(step), step=step, epoch=0)
            assert saver._snapshot is first
    assert asked == [1]


def test_old_checkpoints_go_and_the_best_and_milestones_stay(tmp_path: Path) -> None:
    row = '{"kind": "evaluation", "step": %d, "miou": %f}\n'
    (tmp_path / "metrics.jsonl").write_text(row % (2, 0.9) + row % (3, 0.5))
    told: list[Saved] = []
    with saver_in(tmp_path, keep_last=1, saved=told.append) as saver:
        for step in range(1, 7):
            saver.save(some(step), step=step, epoch=0, milestone=step == 4)
    assert saved_in(tmp_path) == [2, 4, 6]
    assert [saved.step for saved in told] == list(range(1, 7))
    assert all(0 <= saved.stall_seconds <= saved.seconds for saved in told)


def test_a_damaged_best_does_not_cost_the_best_whole_one_after_a_resume(tmp_path: Path) -> None:
    row = '{"kind": "evaluation", "step": %d, "miou": %f}\n'
    (tmp_path / "metrics.jsonl").write_text(row % (1, 0.9) + row % (2, 0.5) + row % (3, 0.4))
    with saver_in(tmp_path) as saver:
        for step in (1, 2):
            saver.save(some(step), step=step, epoch=0)
    file = next((tmp_path / "checkpoints" / "step-000000001").glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with saver_in(tmp_path, keep_last=1, whole=2, attempt=2) as saver:
        for step in (3, 4):
            saver.save(some(step), step=step, epoch=0)
    assert saved_in(tmp_path) == [2, 4]


def test_an_error_is_raised_once_by_the_next_save_which_saves_nothing(tmp_path: Path) -> None:
    disk_is_full = StorageError("cannot write it: No space left on device")
    refusals = [disk_is_full]

    def flush() -> None:
        if refusals:
            raise refusals.pop()

    with saver_in(tmp_path, flush=flush) as saver:
        watch = SaveWatch(None, saver=saver)
        assert not watch.passed()
        saver.save(some(1), step=1, epoch=0)
        wait_for(lambda: saver.failed)
        assert watch.passed()
        with pytest.raises(StorageError) as error:
            saver.save(some(2), step=2, epoch=0)
        assert error.value is disk_is_full
        assert not saver.failed and not watch.passed()
        assert saved_in(tmp_path) == []
        saver.save(some(3), step=3, epoch=0)
    assert saved_in(tmp_path) == [3]


def refuse() -> None:
    raise StorageError("the disk is full")


def test_an_error_at_the_end_is_raised(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match="the disk is full"),
        saver_in(tmp_path, flush=refuse) as saver,
    ):
        saver.save(some(1), step=1, epoch=0)


def save_and_diverge(saver: Saver, *, then: Callable[[], None] = lambda: None) -> None:
    with saver:
        saver.save(some(1), step=1, epoch=0)
        then()
        raise Diverged("the loss is not finite")


def test_the_first_error_counts_and_the_second_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Diverged):
        save_and_diverge(saver_in(tmp_path, flush=refuse))
    assert "the disk is full" in caplog.text


def test_an_error_of_the_training_waits_for_a_good_save(tmp_path: Path, gate: Gate) -> None:
    opener = threading.Thread(target=lambda: (wait_for(lambda: gate.reached), gate.open()))
    with pytest.raises(Diverged):
        save_and_diverge(saver_in(tmp_path, flush=gate), then=opener.start)
    opener.join()
    assert_same_states(load(tmp_path, 1).states, some(1))


# Before others are set aside; before anything is written; before it gets its name.
@pytest.mark.parametrize("looks", [1, 2, 3])
def test_a_fence_that_falls_while_it_is_written(tmp_path: Path, looks: int) -> None:
    asked = []

    def allowed() -> None:
        asked.append(1)
        if len(asked) == looks + 3:  # the first save asks three times
            raise Superseded("it belongs to a later attempt now")

    saver = saver_in(tmp_path, allowed=allowed)
    saver.save(some(1), step=1, epoch=0)
    saver.wait()
    before = tree(tmp_path)
    saver.save(some(2), step=2, epoch=0)
    with pytest.raises(Superseded, match="later attempt"):
        saver.wait()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("refusal", ["full", "read-only"])
def test_a_disk_that_refuses_leaves_the_older_one_whole(
    refusal: str, tmp_path: Path, gate: Gate
) -> None:
    with small_disk(tmp_path / "disk") as disk, saver_in(disk, flush=gate) as saver:
        gate.open()
        saver.save(some(1), step=1, epoch=0)
        saver.wait()
        if refusal == "full":
            fill(disk, 4096)
        else:
            make_read_only(disk)
        before = tree(disk)
        saver.save(some(2, 50_000), step=2, epoch=0)
        words = {"full": "No space left", "read-only": "Read-only file system"}
        with pytest.raises(checkpoint.AgrivisionError, match=words[refusal]) as error:
            saver.wait()
        assert "\n" not in str(error.value)
        assert tree(disk) == before
        assert_same_states(load(disk, 1).states, some(1))


def test_a_process_that_ends_without_waiting_ends_after_the_write(tmp_path: Path) -> None:
    program = (
        "import sys, time, torch; from pathlib import Path;"
        "from agrivision.rundir import RunDirectory; from agrivision.training.saver import Saver;"
        "saver = Saver(RunDirectory(Path(sys.argv[1])), keep_last=1, allowed=lambda: time.sleep(0.3));"
        "saver.save({'m': {'w': torch.ones(9)}}, step=1, epoch=0)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True, timeout=PATIENCE)
    assert torch.equal(load(tmp_path, 1).states["m"]["w"], torch.ones(9))


class Stubborn:
    """A disk that refuses so often."""

    def __init__(self, times: int) -> None:
        self.left, self.tries = times, 0

    def __call__(self) -> None:
        self.tries += 1
        if self.left:
            self.left -= 1
            raise StorageError("cannot write it: No space left on device")


class Clock:
    """Time that passes when somebody waits."""

    now = 0.0

    def read(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        time.sleep(0)  # let the others run


def patience(seconds: float, **changes: Any) -> DiskPatience:
    clock = Clock()
    return DiskPatience(seconds, clock=clock.read, sleep=clock.sleep, **changes)


def test_a_disk_that_refuses_for_a_while_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Stubborn(5)
    with saver_in(tmp_path, flush=disk, patience=patience(900)) as saver:
        saver.save(some(1), step=1, epoch=0)
        saver.wait()
        assert not saver.failed
    assert disk.tries == 6
    assert_same_states(load(tmp_path, 1).states, some(1))
    said = [row.getMessage() for row in caplog.records]
    assert sum("trying again for 15 more minutes" in line for line in said) == 5
    assert said.count("the disk takes what is saved again") == 1


def test_a_disk_that_refuses_for_too_long_is_the_end(tmp_path: Path) -> None:
    disk = Stubborn(10**6)
    saver = saver_in(tmp_path, flush=disk, patience=patience(900))
    saver.save(some(1), step=1, epoch=0)
    with pytest.raises(StorageError, match="No space left"):
        saver.wait()
    assert 20 < disk.tries < 60  # each pause is longer than the one before, up to half a minute


def test_what_is_newer_takes_the_place_of_what_is_refused(tmp_path: Path) -> None:
    disk = Stubborn(10**6)
    waits = DiskPatience(900)  # by the real clock: far longer than this test
    with saver_in(tmp_path, flush=disk, patience=waits) as saver:
        saver.save(some(1), step=1, epoch=0)
        wait_for(lambda: disk.tries)
        saver.save(some(2), step=2, epoch=0)
        wait_for(lambda: disk.tries > 1)
        disk.left = 0
        saver.save(some(3), step=3, epoch=0)
    assert saved_in(tmp_path)[-1] == 3
    assert 1 not in saved_in(tmp_path)
    assert_same_states(load(tmp_path, 3).states, some(3))


def test_patience_counts_from_the_first_refusal_whatever_is_saved(tmp_path: Path) -> None:
    clock = Clock()
    limited = DiskPatience(100, clock=clock.read, sleep=clock.sleep)
    refusal = StorageError("full")
    limited.wait(refusal)
    clock.now = 99.0
    limited.wait(refusal)
    clock.now = 100.5
    with pytest.raises(StorageError, match="full"):
        limited.wait(refusal)
    limited.served()
    limited.wait(refusal)  # a new time of trouble


def test_whoever_is_asked_to_end_tries_once_more(tmp_path: Path) -> None:
    disk, asked = Stubborn(10**6), threading.Event()
    saver = saver_in(tmp_path, flush=disk, patience=DiskPatience(900, asked.is_set))
    saver.save(some(1), step=1, epoch=0)
    wait_for(lambda: disk.tries)
    asked.set()
    saver.save(some(2), step=2, epoch=0)  # what is newer still has its try
    with pytest.raises(StorageError, match="No space left"):
        saver.wait()
    assert disk.tries <= 3
    assert saved_in(tmp_path) == []


def test_what_cannot_pass_is_the_end_at_once(tmp_path: Path) -> None:
    def refuse() -> None:
        raise NotWritable("cannot write it: Read-only file system")

    saver = saver_in(tmp_path, flush=refuse, patience=patience(900))
    saver.save(some(1), step=1, epoch=0)
    with pytest.raises(NotWritable):
        saver.wait()


def test_nothing_is_removed_where_it_is_not_known_what_is_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").mkdir()  # it cannot be read
    with saver_in(tmp_path, keep_last=1) as saver:
        for step in (1, 2):
            saver.save(some(step), step=step, epoch=0)
    assert saved_in(tmp_path) == [1, 2]
    assert "no old checkpoint is removed" in caplog.text


# In a run

PLAIN = {"monitor__tensorboard": "false", "monitor__images": 0, "training__ema_decay": 0}


def hold_up(rank: int, folder: Path, *, step: int, act: Callable[[Path], None]) -> None:
    """Do something in the writing thread of a step's checkpoint before its first byte."""
    original = checkpoint.save

    def save(*args: Any, **kwargs: Any) -> Path:
        if kwargs["step"] == step:
            act(folder)
        return original(*args, **kwargs)

    checkpoint.save = save


def until_trained(folder: Path, step: int) -> None:
    """Wait until the run has trained that far: only possible while this write is in flight."""
    wait_for(lambda: any(row.get("step", 0) >= step for row in rows(folder)))


def rows(folder: Path) -> list[dict[str, Any]]:
    with suppress(FileNotFoundError, ValueError):
        return metrics(folder)
    return []


def stop_later(folder: Path, step: int) -> None:
    until_trained(folder, step)
    os.kill(os.getpid(), signal.SIGTERM)


def die_later(folder: Path, step: int) -> None:
    until_trained(folder, step)
    os.kill(os.getpid(), signal.SIGKILL)


def lose_the_fence(folder: Path, step: int) -> None:
    until_trained(folder, step)
    attempt = folder / "attempt.json"
    attempt.write_text(attempt.read_text().replace('"token": "', '"token": "not '))


def find_the_disk_full(folder: Path, step: int) -> None:
    until_trained(folder, step)
    raise StorageError(f"cannot write {folder}: No space left on device")


OPTIONS = PLAIN | {"training__checkpoint_every_steps": 6, "monitor__log_every_steps": 1}


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole")
    assert run(arguments(dataset, run_dir, **OPTIONS, training__evaluate_every_epochs=0)) == [0]
    return run_dir


LARGE = 600  # bytes: kernels; a forward pass of these networks changes tensors of 64


def copies_behind_steps(rank: int) -> None:
    """The first two copies begin when the step after is about to change the weights, and waits."""
    stands = partial(training_stands, Trainer._finish, Saver.copied, Snapshot.wait)
    hold_up_copies(partial(wait_for, stands), count=2 * (rank == 0), large=LARGE)


VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "two ranks": (2, {"data__batch_size": 8}),
    "sgd, in rows": (1, {"optimizer__name": "sgd", "training__channels_last": "false"}),
    "micro-batches": (1, {"training__micro_batch_size": 2}),
    "invariant": (2, {"training__micro_batch_size": 3, "training__invariant": "true"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_behind_a_step_have_the_bits_from_before_it(
    variant: str, dataset: Path, tmp_path: Path
) -> None:
    ranks, options = VARIANTS[variant]
    options = OPTIONS | {"training__evaluate_every_epochs": 0, "training__ema_decay": 0.9} | options
    for name, hook in (("plain", None), ("behind", copies_behind_steps)):
        command = arguments(dataset, tmp_path / name, **options)
        assert run(command, ranks, hook=hook) == [0] * ranks
    plain, behind = (
        checkpoint.entries(tmp_path / name / "checkpoints") for name in ("plain", "behind")
    )
    assert len(plain) >= 3
    assert [entry.files for entry in behind] == [entry.files for entry in plain]
    assert_same(tmp_path / "behind", tmp_path / "plain")


def kill_during_a_copy(rank: int, number: signal.Signals) -> None:
    def act() -> None:
        os.kill(os.getpid(), number)
        wait_for(partial(training_stands, Trainer._finish, Snapshot.wait))

    hold_up_copies(act, large=LARGE)


def diverge_during_a_copy(rank: int) -> None:
    raised = threading.Event()
    agree, calls = Trainer._agree, []

    def fail(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > 6:
            raised.set()
            raise Diverged("the loss is not finite")
        return agree(*args)

    Trainer._agree = fail
    hold_up_copies(lambda: raised.wait(PATIENCE), large=LARGE)


def evaluate_during_a_copy(rank: int, folder: Path) -> None:
    hold_up_scores(rank, folder, hold_up=lambda act: hold_up_copies(act, large=LARGE))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_while_a_copy_is_in_flight(
    number: signal.Signals, dataset: Path, tmp_path: Path, whole: Path
) -> None:
    command = arguments(dataset, tmp_path, **OPTIONS, training__evaluate_every_epochs=0)
    code = run(command, hook=partial(kill_during_a_copy, number=number))[0]
    if number is signal.SIGTERM:
        assert code == ExitCode.STOPPED
        found = saved_in(tmp_path)
        assert found[0] == 6 and found[-1] in (7, 8)
    else:
        assert code == -signal.SIGKILL
        assert saved_in(tmp_path) == []
    assert run(command) == [0]
    assert_same(tmp_path, whole)


def test_an_error_while_a_copy_is_in_flight_leaves_a_whole_checkpoint(
    dataset: Path, tmp_path: Path, whole: Path
) -> None:
    command = arguments(dataset, tmp_path, **OPTIONS, training__evaluate_every_epochs=0)
    assert run(command, hook=diverge_during_a_copy) == [Diverged.exit_code]
    (left,) = checkpoint.entries(tmp_path / "checkpoints")
    (same,) = (e for e in checkpoint.entries(whole / "checkpoints") if e.step == 6)
    assert (left.step, left.files) == (6, same.files)
    assert run(command) == [0]
    assert_same(tmp_path, whole)


def test_an_evaluation_while_a_copy_is_in_flight(dataset: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"training__epochs": 1, "training__ema_decay": 0.9}
    plain, behind = tmp_path / "plain", tmp_path / "behind"
    assert run(arguments(dataset, plain, **options)) == [0]
    hook = partial(evaluate_during_a_copy, folder=behind)
    assert run(arguments(dataset, behind, **options), hook=hook) == [0]
    assert_same(behind, plain)


@pytest.mark.parametrize("act", [stop_later, die_later])
def test_interrupted_while_a_write_is_in_flight(
    act: Callable[..., None], dataset: Path, tmp_path: Path, whole: Path
) -> None:
    """Step 6 is written while the training goes on to step 8 at least; then the signal comes."""
    command = arguments(dataset, tmp_path, **OPTIONS, training__evaluate_every_epochs=0)
    hook = partial(hold_up, folder=tmp_path, step=6, act=partial(act, step=8))
    code = run(command, hook=hook)[0]
    if act is stop_later:
        assert code == ExitCode.STOPPED
        found = saved_in(tmp_path)
        assert found[0] == 6 and found[-1] >= 8  # both are whole: the stop waited for the first
    else:
        assert code == -signal.SIGKILL
        assert saved_in(tmp_path) == []
    assert run(command) == [0]
    assert_same(tmp_path, whole)


def save_two(rank: int, folder: Path, act: Callable[[Path], None]) -> None:
    """Save after the steps 2 and 4, and never again unless somebody asks for it."""
    from agrivision.training.loop import Loop

    Loop._save_is_due = lambda self, step: step.save or step.number in (2, 4)
    hold_up(rank, folder, step=4, act=act)


@pytest.mark.parametrize(
    ("act", "said"),
    [(lose_the_fence, "belongs to a later attempt"), (find_the_disk_full, "No space left on device")],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_the_writer_meets_ends_all_ranks_soon(
    ranks: int, act: Callable[..., None], said: str, dataset: Path, tmp_path: Path
) -> None:
    changes = {"training__epochs": 200, "training__save_patience_minutes": 0}
    command = arguments(dataset, tmp_path, **OPTIONS, training__evaluate_every_epochs=0, **changes)
    hook = partial(save_two, folder=tmp_path, act=partial(act, step=6))
    endings = hear(command, ranks, hook=hook)
    assert [ending.code for ending in endings] == [ExitCode.FAILED] * ranks
    assert said in endings[0].complaint
    assert all("rank 0 could not save" in ending.complaint for ending in endings[1:])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000002"]
    assert load(tmp_path, 2).step == 2
    assert 6 <= max(row["step"] for row in rows(tmp_path)) < 600  # of 1,200


def count_allocations(rank: int, folder: Path) -> None:
    from agrivision.training import saver

    class Counted(Snapshot):
        def __init__(self, states: Any) -> None:
            super().__init__(states)
            with (folder / "allocations").open("a") as file:
                file.write(f"{rank}\n")

    saver.Snapshot = Counted


@pytest.mark.parametrize("channels_last", ["true", "false"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_allocates_once_and_on_rank_0_only(
    optimizer: str, channels_last: str, dataset: Path, tmp_path: Path
) -> None:
    """Else a save would wait for the memory: what is there after the first step must fit to the end."""
    changes = {"optimizer__name": optimizer, "training__channels_last": channels_last}
    changes |= {"training__checkpoint_every_steps": 2, "training__ema_decay": 0.9}
    hook = partial(count_allocations, folder=tmp_path)
    for epochs in (1, 2):  # from the beginning, and from a checkpoint
        (tmp_path / "allocations").unlink(missing_ok=True)
        options = PLAIN | changes | {"training__epochs": epochs}
        command = arguments(dataset, tmp_path / "run", **options)
        assert run([*command, "--resume_with_changes"], 2, hook=hook) == [0, 0]
        assert (tmp_path / "allocations").read_text() == "0\n"


def test_a_score_is_written_when_its_checkpoint_is(dataset: Path, tmp_path: Path) -> None:
    command = arguments(dataset, tmp_path, **OPTIONS | {"training__epochs": 1})
    hook = partial(evaluate_during_a_write, folder=tmp_path)
    assert run(command, hook=hook) == [0]
    assert saved_in(tmp_path) == [6]
    assert [row["step"] for row in rows(tmp_path) if row["kind"] == "evaluation"] == [6]


def evaluate_during_a_write(rank: int, folder: Path) -> None:
    hold_up_scores(rank, folder, hold_up=lambda act: hold_up(rank, folder, step=6, act=lambda _: act()))


def hold_up_scores(rank: int, folder: Path, *, hold_up: Callable[[Callable[[], object]], None]) -> None:
    """Let a checkpoint wait until it was evaluated; `hold_up` is told how."""
    from agrivision.training import loop as training
    from agrivision.training.record import Record

    evaluated, done = training.evaluate, threading.Event()

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        found = evaluated(*args, **kwargs)
        assert saved_in(folder) == []  # the evaluation did not wait
        done.set()
        return found

    original = Record.evaluated

    def write_row(*args: Any) -> None:
        assert saved_in(folder) == [6]  # its row does
        original(*args)

    def act() -> None:
        assert done.wait(PATIENCE)

    training.evaluate, Record.evaluated = evaluate, write_row
    hold_up(act)
