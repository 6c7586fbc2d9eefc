"""Runs a program and stays the parent of all that it leaves behind, until nothing is left.

Slurm's step daemons, and what jobs put into the background, leave their parents and their sessions on
purpose. The kernel gives orphans to the nearest ancestor that asked for them: this process. Whoever
looks for what a daemon started then finds all of it below.

It runs as a script, without the package, because it must be there in milliseconds: `python -I -S
keeper.py OUTPUT PROGRAM ARGUMENT…` prints the keeper's process id and returns; what the program says is
added to the file OUTPUT.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence

MARK = "AGRIVISION_CLUSTER_KEEPER"  # in the keeper's environment, and not in the program's

_PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl(2)


def main(output: str, command: Sequence[str]) -> None:
    """Leave a keeper in the background, in a session of its own, and print its process id."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    keeper = os.fork()
    if keeper:
        sys.stdout.write(f"{keeper}\n")
        return
    os.setsid()
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    os.close(file)
    _keep(command)


def _keep(command: Sequence[str]) -> None:
    """Start the program, and return when it and all its orphans have ended."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.environ.pop(MARK, None)
    try:
        subprocess.Popen(list(command), stdin=subprocess.DEVNULL)
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
