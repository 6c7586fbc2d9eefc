"""A run directory: where things stand in it, and who may write there."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agrivision.errors import RunMismatch
from agrivision.fence import Fence, Owner, read_owner
from agrivision.json_values import entries, parse, share, text, whole
from agrivision.ownership import require_own_entries
from agrivision.reading import open_plain
from agrivision.storage import make_private, storage_error
from agrivision.world import World

# How long an attempt that Slurm has given up may take to notice; then the run goes on without its lock.
_HANDOVER_SECONDS = 20.0
_POLL_SECONDS = 0.2
_CHECKPOINT = re.compile(r"step-(\d{9,})")
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
    def profile(self) -> Path:
        """Folder of traces, where they were asked for."""
        return self.path / "profile"

    @property
    def metrics(self) -> Path:
        """One JSON row for each line of the log and each evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def quarantine(self) -> Path:
        """One JSON row for each damaged training tile that the run goes on without."""
        return self.path / "quarantine.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of the event files."""
        return self.path / "tensorboard"

    @property
    def log(self) -> Path:
        """Folder of the ranks' logs and lists of samples."""
        return self.path / "log"

    def latest_step(self) -> int:
        """The step of the newest checkpoint by name, whole or not; 0 where there is none."""
        steps = map(checkpoint_step, self.checkpoints.glob("step-*"))
        return max((step for step in steps if step is not None), default=0)

    def evaluations(self) -> dict[int, float | None]:
        """The mIoU by step of all evaluations; torn or foreign rows are passed over."""
        found: dict[int, float | None] = {}
        for row in self.rows("evaluation"):
            try:
                score = row["miou"]
                found[whole(row["step"])] = None if score is None else share(score)
            except (ValueError, KeyError):
                continue
        return found

    def early_ends(self) -> dict[int, str]:
        """Why the run ended before its last step, by the step where it did."""
        found: dict[int, str] = {}
        for row in self.rows("end"):
            with suppress(ValueError, KeyError):
                found[whole(row["step"])] = text(row["reason"])
        return found

    def rows(self, kind: str) -> Iterator[dict[str, Any]]:
        """The rows of `metrics.jsonl` of a kind; torn or foreign ones are passed over.

        Others are not parsed: a long run has a hundred times as many, and this is read at each save.

        Raises:
            OSError: the file is there and cannot be read.
        """
        word = f'"{kind}"'.encode()
        with suppress(FileNotFoundError), open_plain(self.metrics) as file:
            for line in file:
                if word in line:
                    with suppress(ValueError):
                        row = entries(parse(line))
                        if row.get("kind") == kind:
                            yield row

    @property
    def attempt(self) -> Path:
        """Who may write here."""
        return self.path / "attempt.json"

    @property
    def lock_file(self) -> Path:
        """Locked by the process that trains here."""
        return self.path / ".lock"

    @contextmanager
    def held(self, world: World) -> Iterator[Fence]:
        """Hold the directory against a second run that would write the same files.

        The lock goes with the process, however it ends. Where the file system knows no locks (Lustre
        without `-o flock`, NFS without its lock service), a warning is all there is. An older attempt
        of the same job, on a node that Slurm has lost, may still have it: it is fenced off.

        Args:
            world: this attempt.

        Raises:
            RunMismatch: another process holds it.
            Untrusted: it, or something in it, is somebody else's.
            StorageError, NotWritable: the disk refused.
        """
        path = self.lock_file
        make_private(self.path)
        try:
            require_own_entries(self.path, depth=2)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise storage_error(path, error) from error
        try:
            owner = Owner.of(world)
            if self._lock(descriptor, path):
                yield Fence.raise_around(self.attempt, owner)
            else:
                yield self._take_over(descriptor, path, owner, world.earlier_jobs)
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int, path: Path) -> bool:
        """Take the lock; False where somebody else has it."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise storage_error(path, error) from error
            log.warning(
                "%s: this file system has no locks (%s), so a second run in the same directory"
                " would not be noticed",
                path,
                error.strerror,
            )
        return True

    def _take_over(
        self, descriptor: int, path: Path, owner: Owner, earlier_jobs: tuple[str, ...]
    ) -> Fence:
        holder = read_owner(self.attempt)
        if holder is None or not owner.follows(holder, earlier_jobs):
            raise RunMismatch(
                f"{self.path} is in use by another run: wait for it, or choose another --run_dir"
            )
        log.warning(
            "an earlier attempt (process %d on %s) still runs, though its job has ended: it can write"
            " no more",
            holder.pid,
            holder.host,
        )
        fence = Fence.raise_around(self.attempt, owner)
        end = time.monotonic() + _HANDOVER_SECONDS
        while not self._lock(descriptor, path) and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        return fence


def checkpoint_step(folder: Path) -> int | None:
    """The step that a checkpoint's folder is named after; None where it is no such name."""
    match = _CHECKPOINT.fullmatch(folder.name)
    return int(match[1]) if match else None


def ranked_steps(scores: Mapping[int, float | None]) -> list[int]:
    """The steps that have a score, the highest first and the earlier of equals."""
    scored = {step: score for step, score in scores.items() if score is not None}
    return sorted(scored, key=lambda step: (-scored[step], step))


def best_step(scores: Mapping[int, float | None]) -> int | None:
    """The step with the highest score, the earliest of equals; None where nothing was scored."""
    return next(iter(ranked_steps(scores)), None)
