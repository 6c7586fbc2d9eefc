"""Several ranks on this machine, with exit codes and signals as a cluster would have them.

`python -m launch.local --ranks 2 train --config … --run_dir …`

torchrun does the same and more, but answers every failure with exit code 1: whoever waits for 85
("checkpointed, wants another turn") never sees it. Here the ranks meet on loopback, where a file in a
private folder says, so nothing listens beyond it.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 60.0  # between TERM and KILL for the ranks that are left when one has failed
_FOLLOW_SECONDS = 10.0  # for the others, when one has left because it was asked to
_STOPPED = 85
_PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the ranks; returns their exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.local", description=__doc__)
    parser.add_argument("--ranks", type=int, required=True, help="processes to start")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="command of agrivision and its arguments"
    )
    args = parser.parse_args(argv)
    if args.ranks < 1 or not args.command:
        parser.error(
            "give --ranks of at least 1, and a command such as: train --config FILE --run_dir DIR"
        )
    return run_ranks([sys.executable, "-m", "agrivision", *args.command], args.ranks)


def run_ranks(command: Sequence[str], ranks: int) -> int:
    """Start a command once for each rank, pass signals on, and wait for all.

    When a rank fails the others get SIGTERM, as `srun --kill-on-bad-exit` does it, and SIGKILL a
    minute later, or at once where they are stopped and cannot hear. A rank that was merely asked to
    stop (85) is no failure; but the others would wait for it where they have not met yet, so they are
    asked, too.

    Args:
        command: program and arguments; never a shell string.
        ranks: how many.

    Returns:
        0 if all ranks ended well; else the exit code of the first that failed, or 85 if all that did
        not end well had been asked to stop.
    """
    processes: list[subprocess.Popen[bytes]] = []
    with (
        tempfile.TemporaryDirectory(prefix="agrivision-ranks-") as folder,
        _Forwarding(processes) as forwarding,  # before the first starts: none may be left behind
    ):
        for rank in range(ranks):
            environment = rank_environment(rank, ranks, Path(folder))
            process = subprocess.Popen(
                list(command),
                env=environment,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - this process has one thread
            )
            processes.append(process)
        forwarding.repeat()
        return _wait(processes)


def _die_with_parent() -> None:
    """In a rank, before it runs: get SIGTERM when the launcher is gone, however it went."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def rank_environment(rank: int, ranks: int, folder: Path) -> Mapping[str, str]:
    """The environment of one rank: torchrun's variables, and a file to meet at."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "AGRIVISION_RENDEZVOUS_FILE": str(folder / "rendezvous"),
    }


class _Forwarding:
    """Passes SIGTERM, SIGUSR1 and SIGINT on to the ranks while the block runs."""

    _SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self._processes = processes
        self._before: dict[int, object] = {}
        self._received: list[signal.Signals] = []

    def repeat(self) -> None:
        """Send what came while the processes were still being started to all of them."""
        for number in list(self._received):
            _signal_all(self._processes, number)

    def _forward(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        # Ctrl-C in a terminal reaches the ranks by itself, and a second one ends them at once.
        if number == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty():
            return
        self._received.append(signal.Signals(number))
        _signal_all(self._processes, signal.Signals(number))

    def __enter__(self) -> _Forwarding:
        for number in self._SIGNALS:
            self._before[number] = signal.signal(number, self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    deadline = ask = None
    first = 0
    # All of them, each time: a rank that ended counts even while one before it still runs.
    while None in (states := [process.poll() for process in processes]):
        bad = [state for state in states if state not in (None, 0, _STOPPED)]
        if bad and deadline is None:
            first, deadline = bad[0], time.monotonic() + _GRACE_SECONDS
            _signal_all(processes, signal.SIGTERM)
        if deadline is not None:
            late = time.monotonic() > deadline
            _signal_all([each for each in processes if late or _is_stopped(each)], signal.SIGKILL)
        elif ask is None and _STOPPED in states:
            ask = time.monotonic() + _FOLLOW_SECONDS
        elif ask is not None and time.monotonic() > ask:
            _signal_all(processes, signal.SIGTERM)  # whoever is saving has heard that already
            ask = math.inf
        time.sleep(_POLL_SECONDS)
    codes = [process.returncode for process in processes]
    bad = [code for code in codes if code not in (0, _STOPPED)]
    code = first or (bad[0] if bad else max(codes))
    return 128 - code if code < 0 else code  # as a shell tells a death by signal


def _is_stopped(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process stands still after SIGSTOP, in which it hears of nothing but SIGKILL."""
    try:
        status = Path(f"/proc/{process.pid}/stat").read_text()
    except OSError:  # gone
        return False
    return status.rpartition(")")[2].split()[0] == "T"


def _signal_all(processes: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
