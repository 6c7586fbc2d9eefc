"""What somebody else owns, or may write, decides nothing here."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from agrivision import ownership, rendezvous
from agrivision.cli import main
from agrivision.data.schema import Schema
from agrivision.data.staging import stage
from agrivision.errors import BadInput, Untrusted
from agrivision.inference.trained import load_run
from agrivision.locks import FileLock
from agrivision.ownership import read_own, require_own, require_own_entries
from agrivision.rundir import RunDirectory
from agrivision.storage import make_private
from agrivision.world import World
from launch import batch, control, entry, poll
from launch.freeze import freeze_train
from launch.jobdir import JobDirectory, JobSpec, guard
from launch.resources import build, find_site, read_site
from launch.submit import Setting, script
from tests.inference.small import smooth, write_scene
from tests.others import STRANGER, as_root, as_stranger, give_away
from tests.ranks import run
from tests.training.runs import arguments

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted(ROOT.joinpath("slurm").glob("*.sbatch")), ROOT / "benchmarks" / "bench.sbatch"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own."""
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "AGRIVISION_SITE", "AGRIVISION_SITE_SH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert main(short(dataset, run)) == 0
    return run


def short(dataset: Path, run: Path) -> list[str]:
    return arguments(dataset, run, training__max_steps=2, monitor__images=0)


@pytest.fixture
def other(trained: Path, tmp_path: Path) -> Path:
    """The same run, of somebody else, who lets everybody in."""
    run = tmp_path / "other"
    subprocess.run(["cp", "-r", str(trained), str(run)], check=True)
    for path in (run, *run.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
        give_away(path)
    return run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "error: " in each]
    return line


@as_root
def test_somebody_elses_run_is_not_gone_on_with(
    other: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(other)
    assert main(short(dataset, other)) == 2
    line = complaint(capsys)
    assert f"{other} belongs to user {STRANGER}" in line and "chown" in line
    assert content(other) == before


@as_root
def test_somebody_elses_run_can_be_read(other: Path) -> None:
    """Nothing in a checkpoint is run, so a colleague's may be evaluated and predicted with."""
    assert load_run(other).step == 2


@as_root
@pytest.mark.parametrize(
    "name", ["attempt.json", "config.yaml", "metrics.jsonl", "checkpoints", "log/rank-0.log"]
)
def test_nor_what_is_theirs_in_a_run_of_mine(
    trained: Path, dataset: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", str(trained), str(run)], check=True)
    give_away(run / name)
    assert main(short(dataset, run)) == 2
    assert f"{run / name} belongs to user {STRANGER}" in complaint(capsys)
    os.chown(run / name, os.geteuid(), -1)
    assert main(short(dataset, run)) == 0


@as_root
def test_nor_a_link_that_they_have_planted(tmp_path: Path) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    for folder in (run, mine):
        make_private(folder)
    for planted, target in ((run / "tensorboard", mine), (run / "metrics.jsonl", tmp_path / "nowhere")):
        planted.symlink_to(target)
        give_away(planted)
        with pytest.raises(Untrusted, match=f"{planted} belongs to"), RunDirectory(run).held(world()):
            pass
        planted.unlink()
    (tmp_path / "link").symlink_to(mine)
    require_own(tmp_path / "link")
    give_away(tmp_path / "link")
    with pytest.raises(Untrusted, match="link belongs to"):
        make_private(tmp_path / "link")


def world() -> World:
    return World.from_environment({})


def test_a_folder_that_was_open_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(0o777)
    with RunDirectory(folder).held(world()):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077])
def test_a_run_is_private_whatever_the_mask(dataset: Path, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with RunDirectory(tmp_path / "project" / "run").held(world()):
            pass
        job, run_dir, _ = freeze_train(short(dataset, tmp_path / "project" / "job")[1:])
    finally:
        os.umask(before)
    for folder in (tmp_path / "project" / "run", run_dir, job.path):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    project = stat.S_IMODE((tmp_path / "project").stat().st_mode)
    assert project == 0o777 & ~mask  # stays as open as the user's mask makes folders


@pytest.mark.parametrize(
    ("mode", "good"), [(0o600, True), (0o644, True), (0o664, False), (0o646, False)]
)
def test_what_others_may_write_is_refused(tmp_path: Path, mode: int, good: bool) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    file.chmod(mode)
    if good:
        assert read_own(file) == b"x"
        require_own(file)
    else:
        for look in (read_own, require_own):
            with pytest.raises(Untrusted, match=f"chmod go-w {file}"):
                look(file)


def test_what_vanishes_meanwhile_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_own(tmp_path / "missing")
    monkeypatch.setattr(Path, "iterdir", lambda self: iter([self / "gone"]))
    require_own_entries(tmp_path, depth=2)


@as_root
def test_what_is_roots_is_good_for_all(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    file = tmp_path / "site.yaml"
    file.write_text("partition: gpu\n")
    status = file.stat()  # which others cannot ask for: pytest's own folders are closed
    assert as_stranger(lambda: ownership._require(file, status)) == ""
    file.chmod(0o666)
    writable = file.stat()
    assert as_stranger(lambda: ownership._require(file, writable)) == "Untrusted"


# What is run, or obeyed, when a job is requeued, resumed or cancelled.


@pytest.fixture
def job(tmp_path: Path) -> Iterator[JobDirectory]:
    """A frozen job, whose code would leave a mark."""
    found = JobDirectory.of_run(tmp_path / "frozen")
    make_private(found.path.parent)
    found.make()
    (found.code / "launch").mkdir(parents=True)
    (found.code / "launch" / "batch.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    found.write_spec(JobSpec(command=("evaluate",), python=("python3",)))
    found.submitted("17", "sbatch")
    yield found
    assert not (tmp_path / "mark").exists()


@as_root
@pytest.mark.parametrize("name", [".", "code", "job.json", "submissions.jsonl"])
def test_a_job_of_somebody_else_is_not_run(job: JobDirectory, name: str, tmp_path: Path) -> None:
    words = ["train", "--run_dir", str(job.path.parent)]
    environment = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "1"}
    assert entry.frozen(words, environment) == (str(job.path), str(job.spec_file))
    job.require_own()
    give_away(job.path / name)
    if name != "submissions.jsonl":
        assert entry.frozen(words, environment) == ("", "")
    with pytest.raises(Untrusted, match=f"belongs to user {STRANGER}"):
        batch.run(job)
    assert batch.main(["run", str(job.spec_file)]) == 2


@as_root
def test_a_waiting_job_runs_nothing_of_what_took_its_place(job: JobDirectory, tmp_path: Path) -> None:
    """Its script looks before Python does: that would begin with a sitecustomize.py in the code."""
    setting = Setting(resources=build({}), setup=(), python=("python",))
    array, link = tmp_path / "array", tmp_path / "link"
    array.mkdir(mode=0o700)
    (array / "code").symlink_to(job.code)
    link.symlink_to(job.path)
    for folder, code in ((job.path, job.code), (array, array / "code"), (link, link / "code")):
        lines = "\n".join(guard(folder, code))
        text = script(folder, code, "name", setting)
        assert text.index(lines) < text.index("export PYTHONPATH")
        look = partial(subprocess.run, ["bash", "-c", lines], capture_output=True, text=True)
        assert look(check=True).stderr == ""
        for spoil in (give_away, lambda path: path.chmod(0o770), lambda path: path.rename(f"{path}-")):
            spoil(job.path)
            done = look(check=False)
            assert done.returncode == 2 and "is not yours alone any more" in done.stderr
            if not job.path.exists():
                Path(f"{job.path}-").rename(job.path)
            os.chown(job.path, os.geteuid(), -1)
            job.path.chmod(0o700)
    give_away(link)
    assert look(check=False).returncode == 2


@as_root
def test_what_somebody_left_is_not_locked_nor_taken_for_done(
    trained: Path, fields: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    maps, made = tmp_path / "maps", tmp_path / "made"
    scene = write_scene(tmp_path / "scene.tif", smooth(np.random.default_rng(0), 64, 64))
    predict = ["predict", "--checkpoint", str(trained), "--out", str(maps)]
    for folder, words in (
        (maps / ".predict" / "labels", [*predict, str(dataset)]),
        (maps / ".predict" / "scenes" / "scene", [*predict, str(scene)]),
        (tmp_path / "made.partial" / ".prepare", ["prepare", str(fields), str(made)]),
    ):
        folder.mkdir(parents=True)
        for planted in (folder / "x", folder):
            planted.mkdir(exist_ok=True)
            give_away(planted)
            assert main(words) == 2
            assert f"{planted} belongs to user {STRANGER}" in complaint(capsys)
            os.chown(planted, os.geteuid(), -1)
    give_away(maps / ".predict")  # a colleague's scenes are no matter of this one
    assert main([*predict, str(scene)]) == 0


@as_root
def test_a_lock_is_a_file_of_ones_own(tmp_path: Path) -> None:
    mine, lock = tmp_path / "mine", tmp_path / "lock"
    mine.write_text("mine")
    lock.symlink_to(mine)
    with pytest.raises(Untrusted, match=f"{lock} is a link"):
        FileLock(lock)
    lock.unlink()
    lock.touch()
    give_away(lock)
    with pytest.raises(Untrusted, match=f"{lock} belongs to user {STRANGER}"):
        FileLock(lock)
    assert mine.read_text() == "mine"


@as_root
def test_what_somebodys_link_leads_to_is_left_as_it_is(tmp_path: Path) -> None:
    mine, link = tmp_path / "mine", tmp_path / "link"
    mine.mkdir(mode=0o755)
    mine.chmod(0o755)
    link.symlink_to(mine)
    give_away(link)
    with pytest.raises(Untrusted, match="link belongs to"):
        make_private(link)
    assert stat.S_IMODE(mine.stat().st_mode) == 0o755


def open_mask(_: int) -> None:
    os.umask(0o002)


def test_ranks_meet_whatever_the_mask(trained: Path, dataset: Path) -> None:
    words = ["evaluate", "--checkpoint", str(trained), "--data", str(dataset)]
    assert run(words, 2, hook=open_mask) == [0, 0]


def test_nor_one_that_others_may_write(job: JobDirectory) -> None:
    job.path.chmod(0o770)
    environment = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "1"}
    assert entry.frozen(["train", "--run_dir", str(job.path.parent)], environment) == ("", "")
    with pytest.raises(Untrusted, match="chmod go-w"):
        batch.run(job)


@as_root
def test_a_sweeps_shared_code_is_looked_at(job: JobDirectory, tmp_path: Path) -> None:
    shared = tmp_path / "sweep" / "launch"
    make_private(shared)
    job.code.rename(shared / "code")
    job.code.symlink_to(shared / "code")
    job.require_own()
    give_away(shared / "code")
    with pytest.raises(Untrusted, match=str(shared / "code")):
        job.require_own()


@as_root
def test_jobs_of_somebody_else_are_left_alone(
    job: JobDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its list may name any job of mine."""
    asked: list[object] = []
    monkeypatch.setattr("launch.slurm.require", lambda: None)
    monkeypatch.setattr("launch.slurm.queue", lambda jobs: asked.append(list(jobs)) or {})
    mine = JobDirectory.of_run(tmp_path / "mine")
    mine.make()
    mine.write_spec(JobSpec(command=("train",), python=("python3",)))
    mine.submitted("4", "sbatch")
    give_away(job.path)
    for act in (control.cancel, control.resume):
        with pytest.raises(BadInput, match=f"{job.path} belongs to user {STRANGER}"):
            act([str(job.path.parent)])
    assert asked == []
    control.cancel([str(job.path.parent), str(mine.path.parent)])
    assert asked == [["4"]]
    assert "left alone" in capsys.readouterr().out


@as_root
def test_nothing_is_submitted_from_somebody_elses_folder(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir(mode=0o777)
    give_away(run)
    with pytest.raises(Untrusted, match=f"{run} belongs to user {STRANGER}"):
        freeze_train(short(dataset, run)[1:])
    assert list(run.iterdir()) == []


# What a shell reads.


@as_root
def test_a_profile_of_somebody_else_is_refused(home: Path) -> None:
    file = home / ".config" / "agrivision" / "site.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("setup: [touch mark]\n")
    assert find_site(None).setup == ("touch mark",)
    give_away(file)
    for look in (lambda: find_site(None), lambda: read_site(file)):
        with pytest.raises(Untrusted, match=f"{file} belongs to user {STRANGER}"):
            look()
    os.chown(file, os.geteuid(), -1)
    file.chmod(0o666)
    with pytest.raises(Untrusted, match="chmod go-w"):
        read_site(file)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("place", ["home", "named", "linked"])
def test_a_script_sources_what_is_mine_alone(
    script: Path, place: str, home: Path, tmp_path: Path
) -> None:
    file = home / ".config" / "agrivision" / "site.sh"
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").symlink_to("/bin/true")  # where the script itself calls it
    path = f"{programs}:{os.environ['PATH']}"
    environment = {"HOME": str(home), "PATH": path, "AGRIVISION_BATCH_PYTHON": "true"}
    if place != "home":
        file = tmp_path / "a site's.sh"
        environment["AGRIVISION_SITE_SH"] = str(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    target = tmp_path / "target.sh" if place == "linked" else file
    target.write_text(f'echo sourced > "{tmp_path}/mark"\n')
    if place == "linked":
        file.symlink_to(target)

    def run() -> tuple[int, bool, str]:
        mark = tmp_path / "mark"
        mark.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", str(script), "order"],  # the name of a benchmark, for those
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, mark.exists(), done.stderr

    for mode in (0o600, 0o644, 0o444):
        target.chmod(mode)
        assert run()[:2] == (0, True), oct(mode)
    for mode in (0o620, 0o602, 0o666):
        target.chmod(mode)
        code, sourced, said = run()
        assert (code, sourced) == (2, False), oct(mode)
        assert said == f"launch: error: {file} is not yours alone: make a copy, and chmod go-w it\n"
    target.chmod(0o644)
    if os.geteuid() == 0:
        give_away(target)
        assert run()[:2] == (2, False)


def test_all_scripts_were_tried() -> None:
    names = {"train", "prepare", "evaluate", "predict", "tensorboard", "bench"}
    assert {path.stem for path in SCRIPTS} >= names


# What stands in folders that everybody may write.


@as_root
@pytest.mark.parametrize("planted", ["lock", "folder", "link"])
def test_a_name_that_was_taken_in_a_shared_folder_is_not_used(
    dataset: Path, tmp_path: Path, planted: str, caplog: pytest.LogCaptureFixture
) -> None:
    schema = Schema.read(dataset)
    shared, mine = tmp_path / "tmp", tmp_path / "mine"
    shared.mkdir()
    shared.chmod(0o1777)
    make_private(mine)
    name = f"agrivision-{schema.fingerprint}"
    path = shared / (f".{name}.lock" if planted == "lock" else name)
    if planted == "folder":
        path.mkdir()
        path.chmod(0o777)
    elif planted == "link":
        path.symlink_to(mine)
    else:
        path.write_text("the disk is full")
        path.chmod(0o666)
    give_away(path)
    assert stage(dataset, schema, ["train"], str(shared)) is None
    assert "is not a f" in caplog.text and "of this user" in caplog.text
    assert list(mine.iterdir()) == []
    path.unlink() if planted != "folder" else path.rmdir()
    assert stage(dataset, schema, ["train"], str(shared)) == shared / name


@as_root
def test_where_rank_0_listens_is_said_by_rank_0(tmp_path: Path) -> None:
    file = tmp_path / ".rendezvous-1.json"
    file.write_text(json.dumps({"addresses": ["127.0.0.1"], "port": 1, "token": "x"}))
    give_away(file)
    here = World(rank=1, size=2, local_rank=1, local_size=2)
    wait = rendezvous._Wait(here, lambda: False)
    with pytest.raises(Untrusted, match=f"{file} belongs to user {STRANGER}"):
        rendezvous._join(here, file, wait)


@as_root
def test_an_answer_of_slurm_that_somebody_left_is_not_believed(tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    clock = lambda: 1000.0  # noqa: E731
    first = poll.poll(0.0, ask=dict, clock=clock, environment=environment)
    assert first.age == 0.0
    (file,) = (tmp_path / "cache" / "agrivision").iterdir()
    asked: list[int] = []
    ask = lambda: asked.append(1) or {}  # noqa: E731
    poll.poll(0.0, ask=ask, clock=clock, environment=environment)
    assert asked == []
    give_away(file)
    poll.poll(0.0, ask=ask, clock=clock, environment=environment)
    assert asked == [1]
