"""Who may write into a run directory, when more than one attempt believes that it may.

Slurm requeues the job of a node that it has lost, while the ranks on that node may still run: they see
the shared file system, but nobody can end them. Locks do not help, since it is the old attempt that
holds them. So each attempt writes a token into `attempt.json` when it begins, and looks before every
write that counts whether the token there is still its own (a fencing token: M. Kleppmann, *Designing
Data-Intensive Applications*, 2017, chapter 8).
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

from agrivision.errors import Superseded
from agrivision.json_values import entries, parse, text, whole
from agrivision.storage import write_atomically
from agrivision.world import World


@dataclass(frozen=True, kw_only=True)
class Owner:
    """An attempt, as it stands in `attempt.json`.

    Attributes:
        token: no other attempt has it.
        job: Slurm's id, empty outside of a job.
        restart: how often the job was requeued before.
        step_id: of the job's step.
        host: of rank 0.
        pid: of rank 0.
    """

    token: str
    job: str
    restart: int
    step_id: int
    host: str
    pid: int

    @classmethod
    def of(cls, world: World) -> Owner:
        """This process's attempt."""
        return cls(
            token=secrets.token_hex(16),
            job=world.job,
            restart=world.restart,
            step_id=world.step_id,
            host=socket.gethostname(),
            pid=os.getpid(),
        )

    def follows(self, other: Owner, earlier_jobs: tuple[str, ...]) -> bool:
        """Whether the other attempt is over as far as Slurm is concerned, and this one in its place.

        Args:
            other: holds the run directory.
            earlier_jobs: that are known to have ended.
        """
        if not other.job:
            return False
        if other.job != self.job:
            return other.job in earlier_jobs
        return (self.restart, self.step_id) > (other.restart, other.step_id)


@dataclass(frozen=True)
class Fence:
    """The right to write into a run directory, until another attempt takes it.

    Attributes:
        file: `attempt.json`.
        owner: who has the right.
    """

    file: Path
    owner: Owner

    @classmethod
    def raise_around(cls, file: Path, owner: Owner) -> Fence:
        """Take the right; whoever had it sees that at its next look.

        Raises:
            StorageError, NotWritable: the disk refused.
        """
        content = json.dumps(dataclasses.asdict(owner), indent=2)
        write_atomically(file, f"{content}\n".encode())
        return cls(file, owner)

    def check(self) -> None:
        """Go on only if no other attempt has taken over.

        Raises:
            Superseded: one has.
        """
        now = read_owner(self.file)
        # A file that cannot be read says nothing of another attempt: an NFS server that restarts.
        if now is not None and now.token != self.owner.token:
            raise Superseded(
                f"{self.file.parent} belongs to a later attempt now (job {now.job or 'none'} on"
                f" {now.host}): this one leaves without writing"
            )


def read_owner(file: Path) -> Owner | None:
    """Who wrote `attempt.json`; None where it is missing or cannot be read."""
    try:
        content = entries(parse(file.read_bytes()))
        return Owner(
            token=text(content["token"]),
            job=text(content["job"]),
            restart=whole(content["restart"]),
            step_id=whole(content["step_id"], least=-1),
            host=text(content["host"]),
            pid=whole(content["pid"]),
        )
    except (OSError, ValueError, KeyError):
        return None
