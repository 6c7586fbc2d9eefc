"""What a command needs to ask Slurm something: called with a time limit, and its answers read.

Nothing here changes a job; that is for `launch`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from agrivision.errors import AgrivisionError

SIGNAL_SECONDS = 180  # so long before its time limit a job is warned, unless it asks for something else

_SECONDS = 60.0  # a controller under load answers late; one that is down is worth no longer wait
# What a job hands to its step must not reach a job that it submits: it would ask for the same again.
_INHERITED = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SUBMITIT_")
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")


class SlurmError(AgrivisionError):
    """Slurm refused, or did not answer; the message is Slurm's own."""


def available() -> bool:
    """Whether Slurm's commands are on the PATH."""
    return shutil.which("sbatch") is not None and shutil.which("squeue") is not None


def call(
    command: Sequence[str],
    *,
    check: bool = True,
    environment: Mapping[str, str] | None = None,
    text: str = "",
    seconds: float = _SECONDS,
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands to its end.

    Args:
        command: program and arguments; never a shell's line.
        check: whether a failure is an error.
        environment: of the command; None takes this process's.
        text: for its standard input.
        seconds: after which it is ended.

    Raises:
        SlurmError: there is no such command, it took too long, or it failed.
    """
    try:
        done = subprocess.run(
            list(command),
            input=text,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=seconds,
            check=False,
            env=_without_defaults(os.environ if environment is None else environment),
        )
    except FileNotFoundError:
        raise SlurmError(f"no {command[0]} on the PATH") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer within {seconds:.0f} s") from None
    if check and done.returncode != 0:
        raise SlurmError(f"{command[0]}: {said(done)}")
    return done


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The last line that a command said of its failure, and whom it asked, where nobody answered."""
    lines = (done.stderr or done.stdout).strip().splitlines()
    line = lines[-1] if lines else f"exit code {done.returncode}"
    if "Unable to contact slurm controller" not in line:
        return line
    asked = os.environ.get("SLURM_CONF")
    return f"{line}: {f'does the cluster of SLURM_CONF={asked}' if asked else 'does it'} still run?"


def fields(line: str) -> dict[str, str]:
    """A record that `scontrol --oneliner show` wrote: `PartitionName=main Default=YES …`.

    A key begins with a capital; a value may hold spaces.
    """
    pairs = re.split(r"(?:^|\s+)(?=[A-Z][\w/:]*=)", line.strip())
    return {key: value for key, _, value in (pair.partition("=") for pair in pairs) if key}


def settings(text: str) -> dict[str, str]:
    """What `scontrol show config` wrote: a line `KillWait                = 30 sec` for each key."""
    pairs = (re.fullmatch(r"(\S+)\s+= ?(.*)", line) for line in text.splitlines())
    return {pair[1]: pair[2].strip() for pair in pairs if pair is not None}


def seconds_of(text: str) -> int | None:
    """A time as Slurm writes it, `1-02:03:04`, `2:03:04` or `3:04`; None for UNLIMITED and its like."""
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what Slurm gave to the job that this process is in."""
    return {
        key: value
        for key, value in environment.items()
        if key in _KEPT or not key.startswith(_INHERITED)
    }


def _without_defaults(environment: Mapping[str, str]) -> dict[str, str]:
    """Without the user's own defaults for squeue, which would hide jobs from us."""
    return {key: value for key, value in environment.items() if not key.startswith("SQUEUE_")}
