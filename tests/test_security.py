"""What SECURITY.md promises of files from elsewhere, of programs that are started, and of secrets."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from agrivision import checkpoint
from agrivision.cli import main
from agrivision.config import ModelConfig
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.errors import AgrivisionError
from agrivision.inference.trained import load_run
from agrivision.model.build import build_model
from tests.payload import Payload, as_torch, watched
from tests.training.runs import arguments

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("agrivision/**/*.py"), *ROOT.glob("launch/**/*.py")])


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    with watched(tmp_path / "mark") as found:
        yield found


def as_pickle(mark: Path) -> bytes:
    return pickle.dumps({"weight": Payload(mark)})


def as_old_torch(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": Payload(mark)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def as_numpy(mark: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload(mark)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def as_yaml(mark: Path) -> bytes:
    return f"!!python/object/apply:os.mkdir [{json.dumps(str(mark))}]\n".encode()


FORMS = [as_pickle, as_torch, as_old_torch, as_numpy, as_yaml]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert main(short(dataset, run)) == 0
    return run


def short(dataset: Path, run: Path, **more: object) -> list[str]:
    return arguments(dataset, run, training__max_steps=2, monitor__images=0, **more)


def forge(folder: Path, name: str, content: bytes) -> None:
    """Put a file into a checkpoint, with the checksum and the digest that it needs."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["digest"]
    manifest["files"][name] = {
        "bytes": len(content),
        "xxh3_128": xxhash.xxh3_128_hexdigest(content),
    }
    digest = xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"digest": digest}))


def refused(act: Callable[[], object]) -> str:
    """The line of an error that users meet."""
    with pytest.raises(AgrivisionError) as error:
        act()
    line = str(error.value)
    assert line and "\n" not in line
    return line


def files_of(run: Path) -> list[str]:
    (folder,) = (run / "checkpoints").glob("step-*")
    return sorted(path.name for path in folder.iterdir())


def test_every_file_of_a_checkpoint_is_of_two_kinds(trained: Path) -> None:
    names = files_of(trained)
    assert {"manifest.json", "model.safetensors", "description.json"} <= set(names)
    assert {Path(name).suffix for name in names} == {".json", ".safetensors"}


@forms
def test_a_checkpoint_is_never_unpickled(
    form: Callable[[Path], bytes], trained: Path, tmp_path: Path, mark: Path
) -> None:
    """Every name that is read, and names that another program's checkpoints have."""
    for name in [
        *files_of(trained),
        "model.pt",
        "model.pkl",
        "state.bin",
        "extra.safetensors",
        "extra.json",
    ]:
        run = tmp_path / name / "run"
        run.parent.mkdir()
        subprocess.run(["cp", "-r", str(trained), str(run)], check=True)
        (folder,) = (run / "checkpoints").glob("step-*")
        if name == "manifest.json":
            (folder / name).write_bytes(form(mark))
        else:
            forge(folder, name, form(mark))
        line = refused(lambda folder=folder: load_run(folder))
        assert name in line or "manifest.json" in line
        refused(lambda folder=folder: checkpoint.load(folder))
        refused(lambda run=run: load_run(run))  # there is no whole one


@forms
def test_a_forged_checkpoint_ends_a_resume_in_one_line(
    form: Callable[[Path], bytes],
    trained: Path,
    dataset: Path,
    tmp_path: Path,
    mark: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", str(trained), str(run)], check=True)
    (folder,) = (run / "checkpoints").glob("step-*")
    forge(folder, "optimizer.safetensors", form(mark))
    assert main(short(dataset, run)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "checkpoints" in line


@forms
@pytest.mark.parametrize(
    "name", ["model.pt", "model.pth", "model.ckpt", "model.safetensors", "manifest.json"]
)
def test_a_file_that_is_no_checkpoint(
    form: Callable[[Path], bytes],
    name: str,
    tmp_path: Path,
    mark: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / name
    file.write_bytes(form(mark))
    for command in (
        ["predict", str(tmp_path), "--out", str(tmp_path / "out")],
        ["evaluate", "--data", "x"],
    ):
        assert main([*command, "--checkpoint", str(file)]) == 2
        assert capsys.readouterr().err.count("error: ") == 1


@forms
def test_weights_of_an_encoder_are_never_unpickled(
    form: Callable[[Path], bytes], tmp_path: Path, mark: Path
) -> None:
    pytest.importorskip("timm")
    for name in ("weights.safetensors", "weights.pt", "weights.bin", "weights"):
        file = tmp_path / name
        file.write_bytes(form(mark))
        config = ModelConfig(encoder="resnet18", encoder_weights=str(file))
        assert str(file) in refused(lambda config=config: build_model(config, 4, 3))


@pytest.mark.parametrize("form", [as_torch, as_yaml])
@pytest.mark.parametrize("name", ["config.yaml", "provenance.json", "attempt.json", "metrics.jsonl"])
def test_nor_what_else_stands_in_a_run(
    form: Callable[[Path], bytes], name: str, trained: Path, dataset: Path, tmp_path: Path, mark: Path
) -> None:
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", str(trained), str(run)], check=True)
    (run / name).write_bytes(form(mark))
    assert main(short(dataset, run)) in (0, 2)
    assert main(["train", "--run_dir", str(run)]) in (0, 2)  # which reads its configuration


@forms
@pytest.mark.parametrize("name", ["dataset.json", "00000.index.npy", "00000.tar"])
def test_a_data_set_is_never_unpickled(
    form: Callable[[Path], bytes], name: str, dataset: Path, tmp_path: Path, mark: Path
) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(dataset), str(copy)], check=True)
    (copy / ("" if name == "dataset.json" else "train") / name).write_bytes(form(mark))

    def read() -> None:
        reader = SplitReader(copy, Schema.read(copy), "train")
        for tile in range(len(reader)):
            reader.read(tile)

    assert str(copy) in refused(read)


@forms
def test_nor_a_configuration(
    form: Callable[[Path], bytes], tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(form(mark))
    assert main(["train", "--config", str(file), "--run_dir", str(tmp_path / "run")]) == 2
    assert str(file) in capsys.readouterr().err


# What the code itself may call.

FORBIDDEN_MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle",
    "pty", "telnetlib", "xmlrpc", "code", "codeop", "runpy",
}  # fmt: skip
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__", "input"}
FORBIDDEN_CALLS = re.compile(
    r"torch\.(load|save|hub\.\w+|jit\.load)"
    r"|os\.(system|popen|spawn\w*|exec[lv]p\w*|execl\w*)"
    r"|subprocess\.(getoutput|getstatusoutput)"
    r"|yaml\.(load|load_all|unsafe_load\w*|full_load\w*)"
    r"|tempfile\.mktemp"
    r"|tarfile\.(open|TarFile)|zipfile\.ZipFile\(.*\)\.extract\w*|shutil\.unpack_archive"
    r"|(\w+\.)*(broadcast|gather|all_gather|scatter|send|recv)_object\w*"  # these pickle
)
# Each with its reason.
ALLOWED = {
    ("launch/resources.py", "yaml.load"): "Loader=yaml.BaseLoader: every value stays text",
    ("launch/sweep.py", "yaml.load"): "Loader=yaml.BaseLoader: every value stays text",
}


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield str(path.relative_to(ROOT)), node, ast.unparse(node.func)


def test_no_module_of_the_kind_is_imported() -> None:
    """submitit pickles by itself, a path and nothing else: see tests/launch/test_submit.py."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [
                (str(path), name) for name in names if name.partition(".")[0] in FORBIDDEN_MODULES
            ]
    assert found == []


def test_nothing_of_the_kind_is_called() -> None:
    found = set()
    for path, node, name in calls():
        if name in FORBIDDEN_NAMES or FORBIDDEN_CALLS.fullmatch(name):
            found.add((path, name))
            if (path, name) in ALLOWED:
                (loader,) = [word.value for word in node.keywords if word.arg == "Loader"]
                assert ast.unparse(loader) == "yaml.BaseLoader"
    assert found == ALLOWED.keys()


def test_no_shell_is_started() -> None:
    started = 0
    for path, node, name in calls():
        assert not any(word.arg == "shell" for word in node.keywords), path
        if name.startswith("subprocess.") and name.partition(".")[2] in (
            "run",
            "Popen",
            "check_output",
        ):
            started += 1
            words = node.args[0]
            assert not isinstance(words, ast.Constant | ast.JoinedStr | ast.BinOp), (path, node.lineno)
            if isinstance(words, ast.List):
                assert ast.unparse(words.elts[0]) not in ("'bash'", "'sh'", "'/bin/sh'"), path
    assert started >= 5


def test_arrays_are_read_without_pickles() -> None:
    found = 0
    for path, node, name in calls():
        if name in ("np.load", "numpy.load", "np.save", "numpy.save"):
            found += 1
            (allowed,) = [word.value for word in node.keywords if word.arg == "allow_pickle"]
            assert isinstance(allowed, ast.Constant) and allowed.value is False, path
    assert found >= 1


# What is written down.

SECRET = "agrivision-test-secret-d6b1f0"
NAMES = ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "SSH_AUTH_SOCK_PASSWORD", "MY_PASSWORD")


def holding(folder: Path, text: str = SECRET) -> list[str]:
    """The files below a folder in which a text stands, in their names too."""
    needle = text.encode()
    found = [path for path in folder.rglob("*") if text in path.name]
    found += [path for path in folder.rglob("*") if path.is_file() and needle in path.read_bytes()]
    return [str(path.relative_to(folder)) for path in found]


def run(words: list[str], folder: Path, environment: dict[str, str], code: int = 0) -> None:
    """Run a command as users do; what it says is written down, too."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env={**os.environ, **dict.fromkeys(NAMES, SECRET), **environment},
        capture_output=True,
        check=False,
    )
    said = done.stdout + done.stderr
    with (folder / "said").open("ab") as file:
        file.write(said)
    assert done.returncode == code, said.decode()


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """Stand-ins for Slurm: `sbatch` keeps the script, `srun` runs what follows its options."""
    folder = tmp_path / ".bin"
    folder.mkdir()
    programs = {
        "sbatch": f'cp -- "${{@: -1}}" "{tmp_path}/script"; echo "Submitted batch job 17"',
        "squeue": "exit 0",
        "scontrol": "exit 0",
        "scancel": "exit 0",
        "srun": 'while [[ "$1" == --* ]]; do shift; done; SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1'
        " SLURM_NODEID=0 SLURM_STEP_ID=0 SLURM_STEP_NODELIST=n1 SLURM_STEP_TASKS_PER_NODE=1"
        ' exec "$@"',
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o700)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(tmp_path / ".home")}


@pytest.mark.faults
def test_no_secret_of_the_environment_is_written_down(
    fields: Path, tmp_path: Path, slurm: dict[str, str]
) -> None:
    """Preparing, training, predicting, and a job that is submitted, run and looked at."""
    environment = {**slurm, "TMPDIR": str(tmp_path)}
    data, train = (
        tmp_path / "data",
        short(tmp_path / "data", tmp_path / "run", monitor__tensorboard="true"),
    )
    run(["agrivision", "prepare", str(fields), str(data), "--workers", "2"], tmp_path, environment)
    run(["agrivision", *train, "--profile"], tmp_path, environment)
    run(
        ["agrivision", "predict", "--checkpoint", "run", str(data), "--out", "maps"],
        tmp_path,
        environment,
    )
    run(
        ["agrivision", "evaluate", "--checkpoint", "run", "--data", "missing"], tmp_path, environment, 2
    )
    submitted = [*short(data, tmp_path / "job")]
    run(["launch", *submitted], tmp_path, environment)
    inside = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS_PER_NODE": "1"}
    inside |= {"SLURMD_NODENAME": "n1", "SLURM_TASKS_PER_NODE": "1"}
    run(
        ["launch.batch", "run", str(tmp_path / "job" / "launch" / "job.json")],
        tmp_path,
        environment | inside,
    )
    run(["launch", "status", "job"], tmp_path, environment)
    assert (tmp_path / "script").is_file() and (tmp_path / "said").stat().st_size > 100
    assert list((tmp_path / "run" / "tensorboard").iterdir()) and (tmp_path / "maps").is_dir()
    assert '"decision": "done"' in (tmp_path / "job" / "launch" / "attempts.jsonl").read_text()
    assert holding(tmp_path) == []
    (tmp_path / "leak").write_text(f"x{SECRET}x")
    assert holding(tmp_path) == ["leak"]  # it would have been seen


URL = f"https://user:{SECRET}@host.example/data"


@pytest.mark.parametrize(
    "words",
    [
        ["agrivision", "train", "--run_dir", "run", "--data.path", URL],
        ["agrivision", "train", f"--run_dir={URL}"],
        ["agrivision", "prepare", URL, "out"],
        ["agrivision", "predict", "--checkpoint", "x", URL, "--out", "out"],
        ["agrivision", "inspect", URL],
        ["launch", "train", "--run_dir", "run", "--data.path", URL],
        ["launch", "prepare", URL, "out"],
        ["launch", "status", URL],
        ["launch.batch", "train", "--run_dir", "run", "--data.path", URL],
    ],
    ids=lambda words: " ".join(words).replace(SECRET, "SECRET")[:60],
)
def test_no_password_in_a_url_is_repeated(
    words: list[str], tmp_path: Path, slurm: dict[str, str]
) -> None:
    environment = {
        **slurm,
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_NTASKS_PER_NODE": "1",
    }
    run(words, tmp_path, environment, 2)
    assert b"error: " in (tmp_path / "said").read_bytes()
    assert holding(tmp_path) == []


def test_nor_one_in_a_configuration(tmp_path: Path, slurm: dict[str, str]) -> None:
    (tmp_path / "folder").mkdir()
    config = tmp_path / "folder" / "config.yaml"
    config.write_text(f"data:\n  path: {URL}\n")
    for program in ("agrivision", "launch"):
        run([program, "train", "--config", str(config), "--run_dir", "run"], tmp_path, slurm, 2)
    assert holding(tmp_path) == ["folder/config.yaml"]


def test_the_page_names_tests_that_are_there() -> None:
    page = (ROOT / "SECURITY.md").read_text()
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page))
    assert len(named) >= 20
    missing = [
        (file, name) for file, name in named if f"\ndef {name}(" not in (ROOT / file).read_text()
    ]
    assert missing == []
