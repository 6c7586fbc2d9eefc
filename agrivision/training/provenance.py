"""What computed a run: versions, commit, hardware, data set."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import agrivision
from agrivision.commit import commit
from agrivision.rundir import RunDirectory
from agrivision.storage import storage_error, write_atomically
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
        "commit": commit(),
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


def went_on(attempts: Sequence[Mapping[str, Any]], number: int, step: int) -> bool:
    """Whether the run went on from what an attempt saved at a step, or still may.

    A later attempt that began at an earlier step has repeated that step in its own way: it did not see
    the checkpoint, on a node whose view of the folder was late.

    Args:
        attempts: all so far, oldest first, without the one that asks.
        number: of the attempt, 1 for the first; 0 where it is not known.
        step: that it saved.
    """
    return number == 0 or all(step <= int(later.get("from_step", step)) for later in attempts[number:])


def add_attempt(run: RunDirectory, attempt: dict[str, Any]) -> None:
    """Write provenance.json with one more attempt; one that cannot be read is kept beside it.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    before = attempts(run)
    if not before and run.provenance.exists():
        damaged = run.provenance.with_name(f"damaged-{run.provenance.name}")
        try:
            run.provenance.replace(damaged)
        except OSError as error:
            raise storage_error(damaged, error) from error
    content = {"attempts": [*before, attempt]}
    write_atomically(run.provenance, (json.dumps(content, indent=2) + "\n").encode())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
