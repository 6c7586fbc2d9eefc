"""A run directory: where things stand in it, and who may write there."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agrivision.errors import RunMismatch
from agrivision.storage import make_private, storage_error

_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunDirectory:
    """The paths of a run directory.

    Attributes:
        path: of the directory itself.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The complete configuration, as YAML."""
        return self.path / "config.yaml"

    @property
    def provenance(self) -> Path:
        """Versions, commit, hardware and data set, one entry an attempt."""
        return self.path / "provenance.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON row for each line of the log and each evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of the event files."""
        return self.path / "tensorboard"

    @property
    def log(self) -> Path:
        """Folder of the ranks' logs and lists of samples."""
        return self.path / "log"

    def evaluations(self) -> dict[int, float | None]:
        """The mIoU by step of all evaluations; torn or foreign rows are passed over."""
        try:
            lines = self.metrics.read_bytes().splitlines()
        except FileNotFoundError:
            return {}
        found: dict[int, float | None] = {}
        for line in lines:
            try:
                row = json.loads(line)
                if row["kind"] == "evaluation":
                    score = row["miou"]
                    found[int(row["step"])] = None if score is None else float(score)
            except (ValueError, KeyError, TypeError, OverflowError):
                continue
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory against a second run that would write the same files.

        The lock goes with the process, however it ends. Where the file system knows no locks (Lustre
        without `-o flock`, NFS without its lock service), a warning is all there is.

        Raises:
            RunMismatch: another process holds it.
            StorageError, NotWritable: the disk refused.
        """
        path = self.path / ".lock"
        make_private(self.path)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise storage_error(path, error) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunMismatch(
                    f"{self.path} is in use by another run: wait for it, or choose another --run_dir"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise storage_error(path, error) from error
                log.warning(
                    "%s: this file system has no locks (%s), so a second run in the same directory"
                    " would not be noticed",
                    path,
                    error.strerror,
                )
            yield
        finally:
            os.close(descriptor)


def best_step(scores: Mapping[int, float | None]) -> int | None:
    """The step with the highest score, the earliest of equals; None where nothing was scored."""
    scored = {step: score for step, score in scores.items() if score is not None}
    return max(scored, key=lambda step: (scored[step], -step), default=None)
