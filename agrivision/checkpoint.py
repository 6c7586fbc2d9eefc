"""Checkpoints: a folder of safetensors and JSON files, and a manifest that is written last.

`checkpoints/step-000001234/` appears by a rename when all of it is on the disk. The manifest holds the
size and XXH3-128 of every file and a digest of itself, so that a flipped bit, which safetensors would
load in silence, is found before a tensor is used. This module knows nothing of models: it saves and
loads a mapping of names to flat mappings of tensors and JSON values.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError

from agrivision import json_values, tensor_file
from agrivision.errors import AgrivisionError, CheckpointError, StorageError
from agrivision.reading import open_plain
from agrivision.rundir import checkpoint_step
from agrivision.storage import make_private, remove_tree, storage_error, sync_folder, sync_tree

FORMAT = "agrivision-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"

_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.(?:safetensors|json)")
_CHECKSUM = re.compile(r"[0-9a-f]{32}")
_MOST_MANIFEST_BYTES = 1 << 20

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
        attempt: number of the attempt that saved it, 1 for the first; 0 where it is not known.
        files: size and checksum by file name.
    """

    folder: Path
    step: int
    epoch: int
    milestone: bool
    attempt: int
    files: dict[str, tuple[int, str]]


def save(
    folder: Path,
    states: Mapping[str, State],
    *,
    step: int,
    epoch: int,
    milestone: bool = False,
    attempt: int = 0,
    allowed: Callable[[], None] = lambda: None,
) -> Path:
    """Save the states of one step, and read back what was written before it gets its name.

    A whole checkpoint of the step with the same bytes is left as it is; any other thing of its name is
    set aside.

    Args:
        folder: the run's `checkpoints` folder; it is made where missing.
        states: by name: flat mappings of tensors and JSON values; nothing may change in them before
            this returns.
        step: optimiser steps done.
        epoch: whole epochs done.
        milestone: keep it for good.
        attempt: number of the attempt that saves it.
        allowed: raises where another attempt has taken over the run; asked before anything is written,
            and again before it gets its name.

    Returns:
        The checkpoint's folder.

    Raises:
        Whatever `allowed` raises.
        StorageError, NotWritable: the disk refused, or gave back something else than it was given;
            nothing that was there is touched.
    """
    final = folder / f"step-{step:09d}"
    allowed()
    make_private(folder)
    beside = folder / f".{final.name}.{os.getpid()}.part"
    try:
        if beside.is_dir():  # of a killed attempt: process ids repeat, in containers most of all
            shutil.rmtree(beside)
        beside.mkdir(mode=0o700)
        files = {
            file: _write(beside / file, pieces)
            for name, state in states.items()
            for file, pieces in _encode(name, state).items()
        }
        about = {"step": step, "epoch": epoch, "milestone": milestone, "attempt": attempt}
        (beside / MANIFEST).write_bytes(_manifest(about, files))
        sync_tree(beside)
        written = _read_back(beside)
        allowed()
        if os.path.lexists(final):
            if _holds(final, written):
                return final
            _set_aside(final)
        beside.rename(final)
        sync_folder(folder)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # seen late; the next try sets it aside
            raise StorageError(f"cannot write {final}: something else has just come there") from error
        raise storage_error(final, error) from error
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
    return final


def _read_back(beside: Path) -> Entry:
    """What was written, as the disk has it.

    Raises:
        StorageError: it is something else.
    """
    try:
        return verify(beside)
    except CheckpointError as error:
        raise StorageError(f"the disk does not give back what was written: {error}") from None


def _holds(folder: Path, written: Entry) -> bool:
    """Whether a checkpoint is whole and has these very files."""
    try:
        return verify(folder).files == written.files
    except CheckpointError as error:
        log.warning("%s; it is set aside", error)
        return False


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
        CheckpointError: there is none, or it is damaged, of another version or of another step.
    """
    path = folder / MANIFEST
    try:
        with _opened(path, 0, _MOST_MANIFEST_BYTES) as file:
            content = json.loads(file.read())
        digest = content.pop("digest")
        if content.get("format") != FORMAT or _digest(content) != digest:
            raise CheckpointError(f"{path} is damaged: its digest differs")
        if content["version"] != VERSION:
            raise CheckpointError(
                f"{path} has format version {content['version']}; this program reads {VERSION}"
            )
        entry = Entry(
            folder=folder,
            step=_count(content["step"]),
            epoch=_count(content["epoch"]),
            milestone=bool(content["milestone"]),
            attempt=_count(content.get("attempt", 0)),
            files=dict(_file(name, file) for name, file in content["files"].items()),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__} {error}") from None
    if checkpoint_step(folder) not in (None, entry.step):
        raise CheckpointError(f"{path} is of step {entry.step}: somebody has renamed its folder")
    return entry


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _file(name: str, about: Mapping[str, Any]) -> tuple[str, tuple[int, str]]:
    """A file of the manifest; only plain names of the two kinds, which lead nowhere else."""
    checksum = about["xxh3_128"]
    if not _FILE.fullmatch(name) or name == MANIFEST or not _CHECKSUM.fullmatch(checksum):
        raise ValueError(f"{name!r} is no file of a checkpoint")
    return name, (_count(about["bytes"]), checksum)


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint and compare every checksum.

    Raises:
        CheckpointError: a file is missing, cut or changed; the line names it.
    """
    return _load(read_entry(folder))


def _load(entry: Entry) -> Checkpoint:
    folder = entry.folder
    states: dict[str, dict[str, Any]] = {}
    for name, (size, checksum) in entry.files.items():
        content = _read_file(folder / name, size, checksum)
        state, _, kind = name.rpartition(".")
        states.setdefault(state, {}).update(_decode(folder / name, content, kind))
    return Checkpoint(folder=folder, step=entry.step, epoch=entry.epoch, states=states)


def verify(folder: Path) -> Entry:
    """Read all of a checkpoint from the disk and compare every checksum, a piece at a time.

    The operating system is asked to forget what it has in memory of the files. It need not listen, and
    a server or a disk may have a memory of its own: what is told apart then is only what they give.

    Raises:
        CheckpointError: a file is missing, cut or changed; the line names it.
    """
    entry = read_entry(folder)
    for name, (size, checksum) in entry.files.items():
        with _opened(folder / name, size, size) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found = hashlib.file_digest(file, xxhash.xxh3_128)
        _compare(folder / name, found.hexdigest(), checksum)
    return entry


def _read_file(path: Path, size: int, checksum: str) -> bytes:
    with _opened(path, size, size) as file:
        content = file.read(size)
    _compare(path, xxhash.xxh3_128_hexdigest(content), checksum)
    return content


def _compare(path: Path, found: str, checksum: str) -> None:
    if found != checksum:
        raise CheckpointError(f"{path} is damaged: its checksum differs")


@contextmanager
def _opened(path: Path, least: int, most: int) -> Iterator[BufferedReader]:
    """A plain file of an allowed size, opened for reading; what it is a link to is not followed.

    Raises:
        CheckpointError: it cannot be read, is no plain file, or has another size.
    """
    try:
        with open_plain(path, follow=False) as file:
            size = os.fstat(file.fileno()).st_size
            if not least <= size <= most:
                raise CheckpointError(f"{path} has {size} bytes instead of {most}")
            yield file
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def _decode(path: Path, content: bytes, kind: str) -> dict[str, Any]:
    try:
        if kind == "safetensors":
            return dict(safetensors.torch.load(content))
        return json_values.entries(json_values.parse(content))
    except (ValueError, TypeError, KeyError, RecursionError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None


def folders(folder: Path) -> list[Path]:
    """All checkpoints of a run by name, oldest first, looked at no further.

    Raises:
        CheckpointError, StorageError: the folder cannot be listed.
    """
    try:
        found = [path for path in folder.iterdir() if checkpoint_step(path) is not None]
    except FileNotFoundError:
        return []
    except OSError as error:
        noun = (
            CheckpointError if isinstance(error, PermissionError | NotADirectoryError) else StorageError
        )
        raise noun(f"cannot list {folder}: {error.strerror}") from None
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


def latest(folder: Path, counts: Callable[[Entry], bool] = lambda _: True) -> Checkpoint | None:
    """The newest checkpoint that is whole; each that is passed over is named in the log.

    Args:
        folder: the run's `checkpoints` folder.
        counts: whether the run may go on from a checkpoint.

    Returns:
        None where there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but none is whole: to start again from nothing is a
            decision for the user.
        StorageError: the folder cannot be listed.
    """
    candidates = folders(folder)
    for path in reversed(candidates):
        try:
            entry = read_entry(path)
            if counts(entry):
                return _load(entry)
            log.warning("%s is of an attempt that the run did not go on from; it is passed over", path)
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

    Called when a run goes on from an older checkpoint. They are kept for whoever wants to look, as
    `damaged-step-…`, or `other-step-…` where they are whole, but of an attempt that the run did not go
    on from. Nothing is removed.

    Args:
        folder: the run's `checkpoints` folder.
        after_step: the last step that stays.

    Raises:
        StorageError, NotWritable: the disk refused.
        CheckpointError: the folder cannot be listed.
    """
    for path in folders(folder):
        step = checkpoint_step(path)
        if step is not None and step > after_step:
            try:
                _set_aside(path)
            except OSError as error:
                raise storage_error(path, error) from error


def _set_aside(path: Path) -> None:
    try:
        verify(path)
        word = "other"
    except CheckpointError:
        word = "damaged"
    names = (f"{word}-{path.name}" + (f".{number}" if number else "") for number in itertools.count())
    aside = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
    path.rename(aside)
    log.warning("%s is kept as %s", path, aside.name)


def tidy(
    folder: Path, keep_last: int, keep_steps: Collection[int], seen: dict[int, bool] | None = None
) -> None:
    """Remove what need not be kept, once enough of what is kept was read back and found whole.

    Checkpoints that cannot be read, or have changed since they were written, are left alone and count
    for nothing.

    Args:
        folder: the run's `checkpoints` folder.
        keep_last: how many of the newest whole ones stay; milestones always do.
        keep_steps: steps that stay as well, for example the best one's.
        seen: whether the checkpoint of a step was found whole when it was read, for those that were
            read since this process began; it is added to.

    Raises:
        CheckpointError, StorageError: the folder cannot be listed; nothing is removed.
    """
    seen = {} if seen is None else seen
    whole = 0
    unwanted = []
    for entry in reversed(entries(folder)):
        if whole < keep_last:
            whole += _is_whole(entry, seen)
        elif not entry.milestone and entry.step not in keep_steps:
            unwanted.append(entry.folder)
    for path in reversed(unwanted):
        try:
            remove_tree(path)
        except AgrivisionError as error:
            log.warning("%s", error)
    _remove_leftovers(folder)


def first_whole(found: Iterable[Entry], seen: dict[int, bool]) -> int | None:
    """The step of the first checkpoint that is whole; None where none is.

    Args:
        found: in the order in which they are wanted.
        seen: as in `tidy`.
    """
    return next((entry.step for entry in found if _is_whole(entry, seen)), None)


def _is_whole(entry: Entry, seen: dict[int, bool]) -> bool:
    if entry.step not in seen:
        try:
            seen[entry.step] = verify(entry.folder) == entry
        except CheckpointError as error:
            log.warning("%s; it is left as it is, and an older checkpoint is kept instead", error)
            seen[entry.step] = False
    return seen[entry.step]


def _remove_leftovers(folder: Path) -> None:
    """Parts that killed attempts left behind; only one attempt at a time holds the run directory."""
    for path in (*folder.glob(".step-*"), *folder.glob(".damaged-step-*")):
        shutil.rmtree(path, ignore_errors=True)
