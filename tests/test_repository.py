"""What holds for the repository as a whole."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]

CONDA_NAMES = {"torch": "pytorch", "xxhash": "python-xxhash"}  # where conda-forge says it otherwise
ONLY_CONDA = {"python", "pip", "docstring-parser", "typeshed-client"}

# Written in pieces, so that this file does not contain what it looks for.
REGISTRY_HOSTS = [
    "pypi" + ".org",
    "pythonhosted" + ".org",
    "anaconda" + ".org",
    "anaconda" + ".com",
    "prefix" + ".dev",
    "download.pytorch" + ".org",
    "pypi.nvidia" + ".com",
    "arti" + "factory",
    "nexus" + "-repository",
]
LOCAL_PATH = re.compile(r"(?<![\w.$}>/-])/(?:work|root|home|Users)/\w")


def requirement(text: str) -> tuple[str, str]:
    """`jsonargparse[signatures]>=4.49` and `jsonargparse >=4.49` → ("jsonargparse", ">=4.49")."""
    match = re.fullmatch(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*(.*)", text)
    assert match is not None, text
    return match[1].lower().replace("_", "-"), match[2].replace(" ", "")


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def files() -> list[Path]:
    """Files of the repository: tracked, and new ones that are not ignored."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    paths = {ROOT / os.fsdecode(name) for name in names.split(b"\0") if name}
    return sorted(path for path in paths if path.is_file())


def text_of(path: Path) -> str:
    """The content of a text file; nothing for a binary one."""
    content = path.read_bytes()
    return "" if b"\0" in content else content.decode()


def where(path: Path, text: str, position: int) -> str:
    return f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, position) + 1}"


def test_conda_and_pip_install_the_same() -> None:
    metadata = project()["project"]
    assert isinstance(metadata, dict)
    extras = metadata["optional-dependencies"]
    from_pip = [*metadata["dependencies"], *extras["dev"], *extras["encoders"]]
    pip = dict(requirement(text) for text in from_pip)
    pip = {CONDA_NAMES.get(name, name): version for name, version in pip.items()}
    pip["setuptools"] = requirement(build_requirement())[1]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = dict(requirement(text) for text in environment["dependencies"])
    assert conda.pop("python") == metadata["requires-python"]
    assert {name: version for name, version in conda.items() if name not in ONLY_CONDA} == pip


def build_requirement() -> str:
    build = project()["build-system"]
    assert isinstance(build, dict)
    return str(build["requires"][0])


def test_no_file_names_a_package_registry() -> None:
    found = []
    for path in files():
        text = text_of(path)
        found += [
            f"{where(path, text, text.find(host))}: {host}" for host in REGISTRY_HOSTS if host in text
        ]
    assert found == []


def test_no_file_names_a_path_of_one_machine() -> None:
    found = []
    for path in files():
        text = text_of(path)
        found += [f"{where(path, text, hit.start())}: {hit[0]}…" for hit in LOCAL_PATH.finditer(text)]
    assert found == []


def test_relative_links_lead_somewhere() -> None:
    broken = []
    for path in files():
        if path.suffix != ".md":
            continue
        text = re.sub(r"```.*?```|`[^`\n]*`", "", text_of(path), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)[^)]*\)", text):
            target = link.partition("#")[0]
            if not target or re.match(r"[a-z]+:", target):
                continue
            if not (path.parent / target).exists():
                broken.append(f"{path.relative_to(ROOT)}: {link}")
    assert broken == []


def test_no_name_differs_only_by_case() -> None:
    """A checkout on macOS or on a Windows share would lose one of the two."""
    names = [str(path.relative_to(ROOT)).lower() for path in files()]
    assert len(set(names)) == len(names)


def test_scripts_that_are_run_directly_are_executable() -> None:
    scripts = [path for path in files() if path.read_bytes()[:2] == b"#!" and not path.suffix]
    assert scripts != []
    assert [path for path in scripts if not os.access(path, os.X_OK)] == []


def test_shell_scripts_parse() -> None:
    for path in files():
        if text_of(path).startswith(("#!/usr/bin/env bash", "#!/bin/bash")):
            subprocess.run(["bash", "-n", str(path)], check=True)


def test_make_help_names_every_target() -> None:
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    shown = subprocess.run(
        ["make", "--no-print-directory", "-C", str(ROOT), "help"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert {line.split()[0] for line in shown.splitlines()[1:]} == {
        "help", "install", "demo", "test", "test-faults", "storm", "fuzz", "cluster", "cluster-stop",
        "bench", "docs", "check", "audit", "clean",
    }  # fmt: skip


def test_imports_run_one_way() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    if not program.exists():
        pytest.skip("import-linter is not installed")
    result = subprocess.run(
        [str(program), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
