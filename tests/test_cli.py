"""What the command line promises: one line that says what is wrong, the right exit code, no damage."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import yaml

from agrivision import __version__, checkpoint, cli
from agrivision.data.prepare import PrepareOptions, prepare
from agrivision.data.schema import Schema
from agrivision.data.sources.synthetic import synthesize
from agrivision.errors import ExitCode
from tests.heard import hear, hear_one, refusal
from tests.ranks import run
from tests.training.runs import arguments, assert_same, last_bits, samples

COMMANDS = sorted(cli._COMMANDS)
BRIEF = {
    "training__epochs": 2,
    "training__checkpoint_every_steps": 2,
    "training__ema_decay": 0,
    "monitor__tensorboard": "false",
    "monitor__images": 0,
}


def brief(dataset: Path, run_dir: Path, **overrides: object) -> list[str]:
    """A run of twelve steps that saves after every other one."""
    return arguments(dataset, run_dir, **(BRIEF | overrides))


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files but those into which every attempt writes: the log, and who holds the directory."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".log" and path.name != "attempt.json"
    }


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    assert run(brief(dataset, run_dir)) == [0]
    return run_dir


@pytest.fixture
def mine(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "mine"))


@pytest.fixture
def other_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of the challenge's first edition, which has fewer classes."""
    folder = tmp_path_factory.mktemp("other")
    synthesize(folder / "fields", tiles=12, size=64, seed=1)
    prepare(folder / "fields", folder / "dataset", PrepareOptions(workers=1, edition="2020"))
    return folder / "dataset"


def test_help_of_each_command() -> None:
    usage = hear_one(["--help"])
    assert usage.code == 0
    for command in COMMANDS:
        assert any(line.split()[:1] == [command] for line in usage.out)
        ending = hear_one([command, "--help"])
        assert (ending.code, ending.err) == (0, [])
        assert ending.out[0].startswith(f"usage: agrivision {command}")
    assert hear_one([]).out == usage.out


def test_python_m_agrivision_is_agrivision() -> None:
    ways = [[sys.executable, "-m", "agrivision"], [str(Path(sys.executable).with_name("agrivision"))]]
    for arguments_, code, stream in [
        (["--version"], 0, "stdout"),
        (["--help"], 0, "stdout"),
        (["trian"], 2, "stderr"),
    ]:
        done = [
            subprocess.run([*way, *arguments_], capture_output=True, text=True, check=False)
            for way in ways
        ]
        assert [one.returncode for one in done] == [code, code]
        assert getattr(done[0], stream) == getattr(done[1], stream) != ""
        if arguments_ == ["--version"]:
            assert done[0].stdout == f"agrivision {__version__}\n"


def test_an_unknown_command_is_answered_with_the_commands() -> None:
    line = refusal(["trian", "--run_dir", "x"])
    assert "'trian'" in line
    assert all(command in line for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_and_unknown_arguments_are_one_line(command: str) -> None:
    if command not in ("doctor", "models"):  # which need none
        assert refusal([command])
    words = ["bash"] if command == "completion" else ["a", "b"]
    assert "flag_of_nobody" in refusal([command, *words, "--flag_of_nobody", "1"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__pth": "x"}, ["data.pth", "data.path", "data.batch_size"]),
        ({"data__crop": "wide"}, ["data.crop", "'wide'", "a whole number"]),
        ({"config": "nowhere.yaml"}, ["nowhere.yaml"]),
        ({"data__path": "nowhere"}, ["nowhere", "no such folder"]),
        ({"data__path": ""}, ["data.path"]),
        ({"data__val_split": "test"}, ["'test'", "labels"]),
        ({"data__train_split": "trian"}, ["'trian'", "train, val"]),
        ({"data__crop": 65}, ["data.crop is 65", "64"]),
        ({"data__crop": 30, "model__depth": 4}, ["data.crop is 30", "32 x 32"]),
        ({"data__crop": 32, "model__depth": 2, "model__convolution": "valid"}, ["data.crop is 32"]),
        ({"training__sync_batchnorm": "true"}, ["training.sync_batchnorm"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_configuration_that_cannot_run_writes_nothing(
    changes: dict[str, object], said: list[str], dataset: Path, tmp_path: Path
) -> None:
    line = refusal(brief(dataset, tmp_path / "run", **changes))
    assert all(words in line for words in said), line
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_data_set_is_named(fields: Path, dataset: Path, tmp_path: Path) -> None:
    assert "agrivision prepare" in refusal(brief(fields, tmp_path / "run"))
    assert "dataset.json" in refusal(brief(dataset / "dataset.json", tmp_path / "run"))
    (tmp_path / "out.partial").mkdir()  # what an interrupted `prepare` leaves
    line = refusal(brief(tmp_path / "out", tmp_path / "run"))
    assert "interrupted" in line
    assert "run it again" in line
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_a_batch_smaller_than_the_ranks_is_refused_on_each(dataset: Path, tmp_path: Path) -> None:
    endings = hear(brief(dataset, tmp_path / "run", data__batch_size=1), ranks=2)
    assert [ending.code for ending in endings] == [ExitCode.BAD_INPUT] * 2
    assert all("data.batch_size is 1" in ending.complaint for ending in endings)
    assert not (tmp_path / "run").exists()


def test_other_values_are_refused_and_named(dataset: Path, finished: Path) -> None:
    before = snapshot(finished)
    line = refusal(brief(dataset, finished, optimizer__lr=0.5, seed=3))
    for words in (str(finished), "optimizer.lr was 0.001 and is 0.5", "seed was 0 and is 3"):
        assert words in line
    assert "--resume_with_changes" in line
    assert snapshot(finished) == before


def test_free_values_may_change(dataset: Path, mine: Path) -> None:
    bits = last_bits(mine)
    command = brief(dataset, mine, data__threads=0, monitor__log_every_steps=1, training__keep_last=99)
    assert run(command) == [0]
    assert last_bits(mine) == bits


def test_a_run_goes_on_with_changes_where_that_is_said(dataset: Path, mine: Path) -> None:
    changed = brief(dataset, mine, training__epochs=3, optimizer__lr=0.01)
    assert "training.epochs was 2 and is 3" in refusal(changed)
    ending = hear_one([*changed, "--resume_with_changes"])
    assert ending.code == 0
    assert any("training.epochs was 2 and is 3" in line for line in ending.err)
    assert last_bits(mine)[0] == 18
    assert yaml.safe_load((mine / "config.yaml").read_text())["optimizer"]["lr"] == 0.01
    assert run(changed) == [0]  # from now on these are the run's own values


@pytest.mark.parametrize(("before", "after"), [("sgd", "adamw"), ("adamw", "sgd")])
def test_another_optimiser_begins_anew(before: str, after: str, dataset: Path, tmp_path: Path) -> None:
    command = brief(dataset, tmp_path, optimizer__name=before, training__max_steps=2)
    assert run(command) == [0]
    command = brief(dataset, tmp_path, optimizer__name=after, training__max_steps=4)
    ending = hear_one([*command, "--resume_with_changes"])
    assert (ending.code, last_bits(tmp_path)[0]) == (0, 4), ending
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None
    kinds = {name.partition("/")[0] for name in newest.states["optimizer"]}
    assert kinds == ({"momentum_buffer"} if after == "sgd" else {"step", "exp_avg", "exp_avg_sq"})


def test_another_data_set_is_refused_and_named(other_classes: Path, mine: Path) -> None:
    before = snapshot(mine)
    command = brief(other_classes, mine)
    line = refusal(command)
    assert str(other_classes) in line
    assert Schema.read(other_classes).fingerprint[:12] in line
    line = refusal([*command, "--resume_with_changes"])
    assert "another model" in line
    assert "torch.Size" in line
    assert snapshot(mine) == before


def test_another_data_set_at_the_same_path_is_noticed(
    dataset: Path, other_classes: Path, tmp_path: Path
) -> None:
    here, run_dir = tmp_path / "data", tmp_path / "run"
    here.symlink_to(dataset)
    assert run(brief(here, run_dir, training__max_steps=1)) == [0]
    here.unlink()
    here.symlink_to(other_classes)
    assert "fingerprint" in refusal(brief(here, run_dir, training__max_steps=1))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_directory_in_use_is_left_alone(ranks: int, dataset: Path, finished: Path) -> None:
    before = snapshot(finished)
    with (finished / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        endings = hear(brief(dataset, finished), ranks)
    assert [ending.code for ending in endings] == [ExitCode.BAD_INPUT] * ranks
    assert all("in use by another run" in ending.complaint for ending in endings)
    assert snapshot(finished) == before


def test_a_run_directory_that_is_a_file(dataset: Path, tmp_path: Path) -> None:
    place = tmp_path / "run"
    place.write_text("precious")
    assert str(place) in refusal(brief(dataset, place))
    assert str(place) in refusal(brief(dataset, place / "below"))
    assert place.read_text() == "precious"


@pytest.mark.parametrize("content", ["seed: [1, 2\nmodel:\n  - {", "no keys at all", "", "\0\0\0"])
def test_a_damaged_configuration_in_the_run_directory(content: str, dataset: Path, mine: Path) -> None:
    (mine / "config.yaml").write_text(content)
    assert "config.yaml" in refusal(["train", "--run_dir", mine])
    given = mine.with_name("given.yaml")
    given.write_text("seed: 0\n")
    assert "config.yaml" in refusal([*brief(dataset, mine), "--config", given])
    assert (mine / "config.yaml").read_text() == content


def flip_a_bit(file: Path, place: int = -100) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)


def test_a_flipped_bit_in_the_newest_checkpoint_costs_some_steps_only(
    dataset: Path, finished: Path, mine: Path
) -> None:
    newest = checkpoint.entries(mine / "checkpoints")[-1].folder
    flip_a_bit(newest / "model.safetensors")
    ending = hear_one(brief(dataset, mine))
    assert ending.code == 0, ending
    said = [line for line in ending.err if "model.safetensors is damaged" in line]
    assert len(said) == 1
    assert "going back" in said[0]
    assert_same(mine, finished)


def test_all_checkpoints_damaged(dataset: Path, mine: Path) -> None:
    for number, entry in enumerate(checkpoint.entries(mine / "checkpoints")):
        if number % 2:
            flip_a_bit(entry.folder / "manifest.json")
        else:
            (entry.folder / "optimizer.safetensors").unlink()
    before = snapshot(mine)
    endings = hear(brief(dataset, mine), ranks=2)
    assert [ending.code for ending in endings] == [ExitCode.BAD_INPUT] * 2
    assert all("none of the 6 checkpoints" in ending.complaint for ending in endings)
    assert snapshot(mine) == before


@pytest.fixture
def broken(dataset: Path, tmp_path: Path) -> Path:
    """A copy of the data set, to be damaged."""
    return Path(shutil.copytree(dataset, tmp_path / "broken"))


ONE_EPOCH = {"training__epochs": 1, "training__checkpoint_every_steps": 100}


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory):
    """Runs over one epoch of the data set before it was damaged, by ranks."""
    folder = tmp_path_factory.mktemp("whole")

    @cache
    def make(ranks: int) -> Path:
        run_dir = folder / str(ranks)
        assert run(brief(dataset, run_dir, **ONE_EPOCH), ranks) == [0] * ranks
        return run_dir

    return make


@pytest.mark.parametrize(
    ("damage", "split", "ranks"),
    [
        ("bit", "train", 1),
        ("bit", "train", 2),
        ("bit", "val", 2),
        ("cut", "train", 2),
        ("cut", "val", 1),
    ],
)
def test_a_damaged_shard_is_named_and_nothing_is_lost(
    damage: str, split: str, ranks: int, broken: Path, whole, dataset: Path, tmp_path: Path
) -> None:
    # The first batches need neither the last shard nor the first tile of the second.
    shard = broken / split / ("00004.tar" if (damage, split) == ("cut", "train") else "00001.tar")
    if damage == "bit":
        flip_a_bit(shard, 700)  # in the first of its tiles
    else:
        os.truncate(shard, shard.stat().st_size // 2)
    run_dir = tmp_path / "run"
    command = brief(broken, run_dir, **ONE_EPOCH)
    endings = hear(command, ranks)
    assert [ending.code for ending in endings] == [ExitCode.BAD_INPUT] * ranks, endings
    lines = [ending.complaint for ending in endings]
    named = [line for line in lines if str(shard) in line]
    assert named
    assert all("another rank" in line for line in lines if line not in named)
    if damage == "bit":
        assert all("tile" in line and "checksum" in line for line in named)
    # Every step that was done is saved, and once the shard is copied again the run goes on from there.
    saved = checkpoint.latest(run_dir / "checkpoints")
    assert saved is not None
    assert saved.step == max(step for _, step in samples(run_dir))
    shutil.copy(dataset / split / shard.name, shard)
    assert run(command, ranks) == [0] * ranks
    assert_same(run_dir, whole(ranks))


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    """A small file system of its own."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def test_a_read_only_run_directory(dataset: Path, finished: Path, tmp_path: Path) -> None:
    place = tmp_path / "small"
    with mounted(place, "8m"):
        shutil.copytree(finished, place / "run")
        remount(place, "ro")
        before = snapshot(place)
        for run_dir in (place / "run", place / "new"):
            endings = hear(brief(dataset, run_dir), ranks=2)
            assert [ending.code for ending in endings] == [ExitCode.BAD_INPUT] * 2, endings
            assert all("Read-only file system" in ending.complaint for ending in endings)
        scores = ["--data", dataset, "--json", place / "scores.json"]
        line = refusal(["evaluate", "--checkpoint", place / "run", *scores])
        assert "scores.json" in line
        assert "Read-only" in line
        assert snapshot(place) == before


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_loses_nothing(ranks: int, dataset: Path, finished: Path, tmp_path: Path) -> None:
    place = tmp_path / "small"
    with mounted(place, "1m"):
        (place / "ballast").write_bytes(bytes(740_000))
        command = [*brief(dataset, place / "run"), "--training.save_patience_minutes", "0"]
        endings = hear(command, ranks)
        assert [ending.code for ending in endings] == [ExitCode.FAILED] * ranks, endings
        assert "No space left on device" in endings[0].complaint
        assert all(ending.complaint for ending in endings)
        saved = checkpoint.latest(place / "run" / "checkpoints")
        assert saved is not None
        assert 0 < saved.step < 12
        remount(place, "size=8m")
        assert run(command, ranks) == [0] * ranks
        if ranks == 1:
            assert_same(place / "run", finished)


def listens(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal, as the kernel tells it."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (caught,) = (line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_a_signal_in_the_first_moments_is_heard(dataset: Path, tmp_path: Path) -> None:
    """While the commands are still being imported; Slurm may preempt a job at any time."""
    command = [sys.executable, "-m", "agrivision", *brief(dataset, tmp_path / "run")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not listens(process.pid, signal.SIGUSR1):
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGUSR1)
        _, said = process.communicate(timeout=120)
    assert process.returncode == ExitCode.STOPPED, said
    assert "stopped at step 1 (SIGUSR1)" in said


def test_what_the_processor_has_no_memory_for_is_hopeless(dataset: Path, tmp_path: Path) -> None:
    """torch's allocator says so in a RuntimeError; here of a kernel of 36 TB."""
    command = [*brief(dataset, tmp_path / "run"), "--model.base_channels", "1000000"]
    assert refusal(command, ExitCode.HOPELESS).startswith("out of memory: use smaller batches")
