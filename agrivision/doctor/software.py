"""Python and the packages that agrivision stands on: are they there, new enough, and do they load."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from agrivision.doctor import importing
from agrivision.doctor.finding import Finding, Topic

_PYTHON = Topic("Python")
_OURS = "agrivision"
# Where it is not the package's own name.
_MODULES = {"nvidia-ml-py": "pynvml", "pillow": "PIL", "pyyaml": "yaml"}
_SECONDS = 300.0  # torch comes off a shared file system for the first time
_SLOW_SECONDS = 60.0
_MARK = "importing: "

Find = Callable[[str], metadata.Distribution]


@dataclass(frozen=True, kw_only=True)
class Imported:
    """How modules loaded.

    Attributes:
        errors: by module, what went wrong.
        seconds: that all took.
    """

    errors: Mapping[str, str]
    seconds: float


def examine_software(find: Find = metadata.distribution) -> Iterator[Finding]:
    """Python, the packages' versions, and whether they load.

    Args:
        find: gives an installed package by its name, or raises PackageNotFoundError.
    """
    try:
        ours = find(_OURS)
    except metadata.PackageNotFoundError:
        yield _PYTHON.careful(
            f"{platform.python_version()} in {sys.executable}; agrivision is not installed here",
            "install it (`pip install -e .` in its folder), or no versions can be compared",
        )
        return
    yield python(platform.python_version(), ours.metadata["Requires-Python"] or "")
    wanted = _requirements(ours)
    yield from versions(wanted, find)
    present = [each.name for each in wanted if _version(each.name, find) is not None]
    modules = [_MODULES.get(name.lower(), name) for name in present]
    yield from loading(modules, load(modules))


def python(version: str, wanted: str) -> Finding:
    """Whether this is a Python that the package asks for.

    Args:
        version: of the interpreter.
        wanted: as in the package's metadata, `>=3.11`.
    """
    what = f"{version} in {sys.executable}"
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return _PYTHON.good(what)
    return _PYTHON.bad(
        f"{what}, but agrivision asks for {wanted}", "make an environment with such a one"
    )


def versions(wanted: Sequence[Requirement], find: Find) -> Iterator[Finding]:
    """Whether packages are there, in versions that fit.

    Args:
        wanted: packages.
        find: see `examine_software`.
    """
    fine = []
    for each in wanted:
        version = _version(each.name, find)
        if version is None:
            yield _PYTHON.bad(f"{each.name} is not installed", f"pip install '{each}'")
        elif not each.specifier.contains(version, prereleases=True):
            yield _PYTHON.bad(
                f"{each.name} is {version}, not {each.specifier}", f"pip install '{each}'"
            )
        else:
            fine.append(f"{each.name} {version}")
            yield from _pins(each.name, version, find)
    if fine:
        yield _PYTHON.good(", ".join(fine))


def _pins(name: str, version: str, find: Find) -> Iterator[Finding]:
    """What torchvision says of itself: it is built for one version of torch."""
    if name != "torchvision":
        return
    for pin in (each for each in _requirements(find(name)) if each.name == "torch"):
        torch = _version("torch", find)
        if torch is not None and not pin.specifier.contains(torch, prereleases=True):
            yield _PYTHON.bad(
                f"torchvision {version} was built for torch{pin.specifier}, and torch is {torch}",
                "install both in one command, from one index: pip install --upgrade torch torchvision",
            )


def load(
    modules: Sequence[str], environment: Mapping[str, str] = os.environ, seconds: float = _SECONDS
) -> Imported:
    """Import modules in a process of their own.

    Args:
        modules: names.
        environment: of the process.
        seconds: after which it is ended.
    """
    # With -P the folder of that file is no place to import from.
    command = [sys.executable, "-P", str(Path(importing.__file__)), *modules]
    begun, errors, took = "", {}, 0.0
    try:
        done = subprocess.run(
            command, env=dict(environment), capture_output=True, timeout=seconds, check=False
        )
        output, ending = done.stdout, f"the interpreter ended with {done.returncode}"
    except subprocess.TimeoutExpired as late:
        output, ending = late.stdout or b"", f"not loaded after {seconds:.0f} s"
    for line in output.decode(errors="replace").splitlines():
        if not line.startswith(_MARK):
            continue
        said = json.loads(line.removeprefix(_MARK))
        begun = "" if "error" in said or "seconds" in said else said["module"]
        took += said.get("seconds", 0.0)
        if "error" in said:
            errors[said["module"]] = said["error"]
    if begun:
        errors[begun] = ending
    return Imported(errors=errors, seconds=took)


def loading(modules: Sequence[str], imported: Imported) -> Iterator[Finding]:
    """What to make of how modules loaded.

    Args:
        modules: that were asked for.
        imported: how they did.
    """
    for module, error in imported.errors.items():
        advice = f"install {module} again, for this Python and this machine"
        if module == "torchvision":
            advice = (
                "torch and torchvision are of different builds: install both in one command, from one"
                " index: pip install --force-reinstall torch torchvision"
            )
        yield _PYTHON.bad(f"{module} does not load: {error}", advice)
    if imported.errors:
        return
    what = f"all {len(modules)} packages load, in {imported.seconds:.1f} s"
    yield _PYTHON.graded(
        -imported.seconds,
        -_SLOW_SECONDS,
        -_SECONDS,
        what,
        "each rank waits that long: put the environment on a faster disk, or into one image file",
    )


def _requirements(package: metadata.Distribution) -> list[Requirement]:
    """What a package needs here, without its extras."""
    found = [Requirement(text) for text in package.requires or []]
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]


def _version(name: str, find: Find) -> str | None:
    try:
        return find(name).version
    except metadata.PackageNotFoundError:
        return None
