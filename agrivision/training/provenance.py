"""What computed a run: versions, commit, hardware, data set."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import agrivision
from agrivision.rundir import RunDirectory
from agrivision.storage import write_atomically
from agrivision.world import World

_PACKAGES = ("torch", "torchvision", "numpy", "rasterio", "safetensors", "simplejpeg", "zstandard")


def describe(world: World, device: torch.device, fingerprint: str, step: int) -> dict[str, Any]:
    """One attempt, as JSON values.

    Args:
        world: of this rank.
        device: of this rank.
        fingerprint: of the data set.
        step: that the attempt goes on from.
    """
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "from_step": step,
        "agrivision": agrivision.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "ranks": world.size,
        "launcher": world.launcher,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "data_fingerprint": fingerprint,
    }


def attempts(run: RunDirectory) -> list[dict[str, Any]]:
    """The attempts so far, oldest first; an unreadable file counts as none."""
    try:
        content = json.loads(run.provenance.read_bytes())
        return [dict(entry) for entry in content["attempts"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def add_attempt(run: RunDirectory, attempt: dict[str, Any]) -> None:
    """Write provenance.json with one more attempt.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    content = {"attempts": [*attempts(run), attempt]}
    write_atomically(run.provenance, (json.dumps(content, indent=2) + "\n").encode())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of a checkout that this package runs from, with `-dirty` after changes."""
    folder = Path(agrivision.__file__).parent
    if not (folder.parent / ".git").exists():  # installed: a repository around it is another one's
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
