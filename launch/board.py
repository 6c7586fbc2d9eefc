"""TensorBoard in a job, listening on loopback only; whoever may log in to the node may see it.

`python -m launch.board RUNS_DIR`
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from agrivision.world import PORTS

_LOOPBACK = "127.0.0.1"


def main(argv: Sequence[str] | None = None) -> int:
    """Print how to reach TensorBoard, and become it."""
    parser = argparse.ArgumentParser(prog="python -m launch.board", description=__doc__)
    parser.add_argument("runs", type=Path, help="a run directory, or a folder of them")
    args = parser.parse_args(argv)
    if args.runs.is_dir():
        _become_tensorboard(args.runs)
    sys.stderr.write(f"launch: error: no such folder: {args.runs}\n")
    return 2


def _become_tensorboard(runs: Path) -> NoReturn:
    port = _free_port()
    for line in directions(port):
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
    # `tensorboard` itself, in this process's place, so that signals reach it.
    words = ["--logdir", str(runs.absolute()), "--host", _LOOPBACK, "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", "tensorboard.main", *words])  # noqa: S606


def directions(port: int) -> list[str]:
    """What to type elsewhere to see the page that this node serves on a loopback port."""
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    login = os.environ.get("SLURM_SUBMIT_HOST", "LOGIN_NODE")
    tunnel = ["ssh", "-N", "-L", f"6006:{_LOOPBACK}:{port}", "-J", login, node]
    return [
        "On your own machine, with your user name on the cluster before the names where it differs:",
        f"  {shlex.join(tunnel)}",
        "and then open http://localhost:6006 in a browser.",
    ]


def _free_port() -> int:
    """A port of loopback that nobody has: the first free one, from where the job's id says."""
    job = os.environ.get("SLURM_JOB_ID", "")
    first = int(job) if job.isdigit() else 0
    for place in range(len(PORTS)):
        port = PORTS[(first + place) % len(PORTS)]
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((_LOOPBACK, port))
            except OSError:
                continue
            return port
    raise SystemExit("launch: error: no free port on this node")


if __name__ == "__main__":
    sys.exit(main())
