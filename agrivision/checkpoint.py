"""Checkpoints: a folder of safetensors and JSON files, and a manifest that is written last.

`checkpoints/step-000001234/` appears by a rename when all of it is on the disk. The manifest holds the
size and XXH3-128 of every file and a digest of itself, so that a flipped bit, which safetensors would
load in silence, is found before a tensor is used. This module knows nothing of models: it saves and
loads a mapping of names to flat mappings of tensors and JSON values.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError

from agrivision import tensor_file
from agrivision.errors import AgrivisionError, CheckpointError
from agrivision.rundir import checkpoint_step
from agrivision.storage import make_private, remove_tree, storage_error, sync_folder, sync_tree

FORMAT = "agrivision-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"

State = Mapping[str, Any]
"""Flat: names → tensors or JSON values."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One checkpoint, read and found whole.

    Attributes:
        folder: where it stands.
        step: optimiser steps done.
        epoch: whole epochs done.
        states: by name, as they were saved; tensors on the CPU.
    """

    folder: Path
    step: int
    epoch: int
    states: dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A checkpoint's name and manifest, its files not yet looked at.

    Attributes:
        folder: where it stands.
        step: optimiser steps done.
        epoch: whole epochs done.
        milestone: kept for good.
        files: size and checksum by file name.
    """

    folder: Path
    step: int
    epoch: int
    milestone: bool
    files: dict[str, tuple[int, str]]


def save(
    folder: Path,
    states: Mapping[str, State],
    *,
    step: int,
    epoch: int,
    milestone: bool = False,
    allowed: Callable[[], None] = lambda: None,
) -> Path:
    """Save the states of one step; an existing checkpoint of the step is left as it is.

    Args:
        folder: the run's `checkpoints` folder; it is made where missing.
        states: by name: flat mappings of tensors and JSON values; nothing may change in them before
            this returns.
        step: optimiser steps done.
        epoch: whole epochs done.
        milestone: keep it for good.
        allowed: raises where another attempt has taken over the run; asked before anything is written,
            and again before it gets its name.

    Returns:
        The checkpoint's folder.

    Raises:
        Whatever `allowed` raises.
        StorageError, NotWritable: the disk refused; nothing that was there is touched.
    """
    final = folder / f"step-{step:09d}"
    allowed()
    make_private(folder)
    if (final / MANIFEST).is_file():
        return final
    beside = folder / f".{final.name}.{os.getpid()}.part"
    try:
        if final.is_dir():  # without a manifest: it is no checkpoint any more
            remove_tree(final)
        if beside.is_dir():  # of a killed attempt: process ids repeat, in containers most of all
            shutil.rmtree(beside)
        beside.mkdir(mode=0o700)
        files = {
            file: _write(beside / file, pieces)
            for name, state in states.items()
            for file, pieces in _encode(name, state).items()
        }
        about = {"step": step, "epoch": epoch, "milestone": milestone}
        (beside / MANIFEST).write_bytes(_manifest(about, files))
        sync_tree(beside)
        allowed()
        beside.rename(final)
        sync_folder(folder)
    except OSError as error:
        raise storage_error(final, error) from error
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
    return final


def _encode(name: str, state: State) -> dict[str, Iterable[bytes | memoryview]]:
    """Tensors go into NAME.safetensors, the rest into NAME.json; files without content are left out."""
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    values = {key: value for key, value in state.items() if key not in tensors}
    files: dict[str, Iterable[bytes | memoryview]] = {}
    if tensors:
        files[f"{name}.safetensors"] = tensor_file.pieces(tensors)
    if values or not tensors:
        files[f"{name}.json"] = [(json.dumps(values, indent=2) + "\n").encode()]
    return files


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file; returns what the manifest says of it."""
    size, checksum = 0, xxhash.xxh3_128()
    with path.open("wb") as file:
        for piece in pieces:
            checksum.update(piece)
            size += file.write(piece)
    return {"bytes": size, "xxh3_128": checksum.hexdigest()}


def _manifest(about: dict[str, Any], files: Mapping[str, dict[str, Any]]) -> bytes:
    content = {"format": FORMAT, "version": VERSION, **about, "files": files}
    return (json.dumps(content | {"digest": _digest(content)}, indent=2) + "\n").encode()


def _digest(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def read_entry(folder: Path) -> Entry:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged or of another version.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        digest = content.pop("digest")
        if content.get("format") != FORMAT or _digest(content) != digest:
            raise CheckpointError(f"{path} is damaged: its digest differs")
        if content["version"] != VERSION:
            raise CheckpointError(
                f"{path} has format version {content['version']}; this program reads {VERSION}"
            )
        return Entry(
            folder=folder,
            step=int(content["step"]),
            epoch=int(content["epoch"]),
            milestone=bool(content["milestone"]),
            files={name: (file["bytes"], file["xxh3_128"]) for name, file in content["files"].items()},
        )
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__} {error}") from None


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint and compare every checksum.

    Raises:
        CheckpointError: a file is missing, cut or changed; the line names it.
    """
    entry = read_entry(folder)
    states: dict[str, dict[str, Any]] = {}
    for name, (size, checksum) in entry.files.items():
        content = _read_file(folder / name, size, checksum)
        state, _, kind = name.rpartition(".")
        states.setdefault(state, {}).update(_decode(folder / name, content, kind))
    return Checkpoint(folder=folder, step=entry.step, epoch=entry.epoch, states=states)


def _read_file(path: Path, size: int, checksum: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if len(content) != size:
        raise CheckpointError(f"{path} has {len(content)} bytes instead of {size}")
    if xxhash.xxh3_128_hexdigest(content) != checksum:
        raise CheckpointError(f"{path} is damaged: its checksum differs")
    return content


def _decode(path: Path, content: bytes, kind: str) -> dict[str, Any]:
    try:
        if kind == "safetensors":
            return dict(safetensors.torch.load(content))
        return dict(json.loads(content))
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None


def folders(folder: Path) -> list[Path]:
    """All checkpoints of a run by name, oldest first, looked at no further."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if checkpoint_step(path) is not None]
    return sorted(found, key=lambda path: (len(path.name), path.name))  # more digits, more steps


def entries(folder: Path) -> list[Entry]:
    """The checkpoints of a run whose manifests can be read, oldest first."""
    found = []
    for path in folders(folder):
        try:
            found.append(read_entry(path))
        except CheckpointError as error:
            log.warning("%s; it is passed over", error)
    return found


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; each damaged one that is passed over is named in the log.

    Returns:
        None where there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but none is whole: to start again from nothing is a
            decision for the user.
    """
    candidates = folders(folder)
    for path in reversed(candidates):
        try:
            return load(path)
        except CheckpointError as error:
            log.warning("%s; going back to the checkpoint before it", error)
    if candidates:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoints in {folder} is whole: restore one, or start"
            " again in another run directory"
        )
    return None


def set_aside(folder: Path, after_step: int) -> None:
    """Rename the checkpoints of later steps, so that their steps can be saved again.

    Called when a run goes on from an older checkpoint because the newer ones are damaged; they are
    kept as `damaged-step-…` for whoever wants to look.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    for path in folders(folder):
        step = checkpoint_step(path)
        if step is not None and step > after_step:
            aside = path.with_name(f"damaged-{path.name}")
            try:
                if aside.exists():
                    remove_tree(aside)
                path.rename(aside)
            except OSError as error:
                raise storage_error(aside, error) from error


def tidy(folder: Path, keep_last: int, keep_steps: Collection[int]) -> None:
    """Remove what need not be kept; checkpoints that cannot be read are left alone.

    Args:
        folder: the run's `checkpoints` folder.
        keep_last: how many of the newest stay; milestones always do.
        keep_steps: steps that stay as well, for example the best one's.
    """
    for entry in entries(folder)[:-keep_last]:
        if not entry.milestone and entry.step not in keep_steps:
            try:
                remove_tree(entry.folder)
            except AgrivisionError as error:
                log.warning("%s", error)
    _remove_leftovers(folder)


def _remove_leftovers(folder: Path) -> None:
    """Parts that killed attempts left behind; only one attempt at a time holds the run directory."""
    for path in (*folder.glob(".step-*"), *folder.glob(".damaged-step-*")):
        shutil.rmtree(path, ignore_errors=True)
