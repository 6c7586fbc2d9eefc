"""Packages that are missing, too old, of another build, or that take the interpreter with them."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from agrivision.doctor.finding import Verdict
from agrivision.doctor.software import examine_software, load, loading, python, versions
from tests.doctor.said import about, worse


def finder(folder: Path) -> Callable[[str], metadata.Distribution]:
    """Finds the packages that a folder holds, and no others."""

    def find(name: str) -> metadata.Distribution:
        for found in metadata.distributions(name=name, path=[str(folder)]):
            return found
        raise metadata.PackageNotFoundError(name)

    return find


def install(folder: Path, name: str, version: str, *requires: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [f"Name: {name}", f"Version: {version}", "Requires-Python: >=3.11"]
    lines += [f"Requires-Dist: {each}" for each in requires]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, "", ""]))


def module(folder: Path, name: str, content: str) -> dict[str, str]:
    """Write a module; returns the environment in which it is found first."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(content)
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_a_python_that_is_too_old_is_named() -> None:
    assert python("3.9.2", ">=3.11").verdict == Verdict.BAD
    assert ">=3.11" in python("3.9.2", ">=3.11").what
    assert python(platform.python_version(), ">=3.11").verdict == Verdict.GOOD


def test_a_package_that_is_missing_and_one_that_is_old_are_named(tmp_path: Path) -> None:
    install(tmp_path, "numpy", "1.26.4")
    wanted = [Requirement("numpy>=2.0"), Requirement("zstandard>=0.22")]
    found = list(versions(wanted, finder(tmp_path)))
    assert worse(found) == [
        ("bad", "numpy is 1.26.4, not >=2.0"),
        ("bad", "zstandard is not installed"),
    ]
    assert found[0].advice == "pip install 'numpy>=2.0'"


def test_torchvision_for_another_torch_is_named(tmp_path: Path) -> None:
    install(tmp_path, "torch", "2.15.0+cu132")
    install(tmp_path, "torchvision", "0.28.0", "numpy", "torch==2.14.0")
    wanted = [Requirement("torch>=2.11"), Requirement("torchvision>=0.26")]
    said = "torchvision 0.28.0 was built for torch==2.14.0, and torch is 2.15.0+cu132"
    assert worse(versions(wanted, finder(tmp_path))) == [("bad", said)]


def test_torchvision_that_fits_is_good(tmp_path: Path) -> None:
    install(tmp_path, "torch", "2.15.0+cu132")
    install(tmp_path, "torchvision", "0.29.0", "torch==2.15.0")
    wanted = [Requirement("torch>=2.11"), Requirement("torchvision>=0.26")]
    assert worse(versions(wanted, finder(tmp_path))) == []


def test_a_checkout_that_is_not_installed_is_named(tmp_path: Path) -> None:
    (found,) = examine_software(finder(tmp_path))
    assert (found.verdict, "not installed" in found.what) == (Verdict.CAREFUL, True)


def test_operators_of_another_build_are_named(tmp_path: Path) -> None:
    content = (
        "class ops:\n def nms(*_):\n  raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    environment = module(tmp_path / "site", "torchvision", content)
    (tmp_path / "site" / "torch.py").write_text("def zeros(*_): ...\n")
    imported = load(["torchvision"], environment)
    assert imported.errors == {"torchvision": "RuntimeError: operator torchvision::nms does not exist"}
    (found,) = loading(["torchvision"], imported)
    assert found.verdict == Verdict.BAD
    assert "torch and torchvision" in found.advice


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "raise ImportError('libcudart.so.12: cannot open')",
            "ImportError: libcudart.so.12: cannot open",
        ),
        ("import os; os.abort()", "the interpreter ended with -6"),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
    ],
)
def test_a_library_that_does_not_load_is_named_and_the_others_are_tried(
    content: str, said: str, tmp_path: Path
) -> None:
    environment = module(tmp_path / "site", "broken", content)
    imported = load(["json", "broken"], environment)
    assert imported.errors == {"broken": said}
    assert worse(loading(["json", "broken"], imported)) == [("bad", f"broken does not load: {said}")]


def test_a_library_that_never_loads_is_named(tmp_path: Path) -> None:
    environment = module(tmp_path / "site", "slow", "import time; time.sleep(600)")
    assert load(["slow"], environment, seconds=3).errors == {"slow": "not loaded after 3 s"}


def test_what_a_module_prints_confuses_nobody(tmp_path: Path) -> None:
    environment = module(tmp_path / "site", "noisy", "print('importing', end='')")
    imported = load(["noisy", "json"], environment)
    assert imported.errors == {}
    assert about(loading(["noisy", "json"], imported), "all 2 packages load").verdict == Verdict.GOOD
