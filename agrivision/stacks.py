"""Where this process's threads are in Python, and another process of this host for the kernel."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

_COMPILERS = ("torch._dynamo", "torch._inductor")
_BEGAN = 19  # place of a process's beginning among the fields of /proc/PID/stat after its name


def stacks(main: int) -> str:
    """The Python stacks of all other threads of this process, the innermost call last.

    Source files are not read: they may lie on the very disk that hangs.

    Args:
        main: the thread to begin with, as `threading.get_ident` names it.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)
    order = sorted(frames, key=lambda thread: (thread != main, thread))
    return "\n".join(
        "\n".join([f"thread {names.get(thread, thread)}:", *_lines(frames[thread])]) for thread in order
    )


def _lines(frame: FrameType) -> list[str]:
    calls = [
        f"  {each.f_code.co_filename}:{each.f_lineno} in {each.f_code.co_qualname}"
        for each in _out(frame)
    ]
    return calls[::-1]


def _out(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def compiling(thread: int) -> tuple[tuple[int, int], ...]:
    """Where torch's compiler is, if a thread is in it: another value each time that it has got on."""
    frame = sys._current_frames().get(thread)
    calls = list(_out(frame))
    if any(each.f_globals.get("__name__", "").startswith(_COMPILERS) for each in calls):
        return tuple((id(each.f_code), each.f_lasti) for each in calls)
    return ()


def began(pid: int) -> int:
    """When a process of this host began, in the kernel's ticks; 0 where it is not there."""
    with suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[_BEGAN])
    return 0


def kernel_view(pid: int) -> str:
    """What the kernel says of a process of this host: its state, and what it waits for there."""
    said = f"process {pid} is {_field(pid, 'State')}"
    with suppress(OSError):
        where = Path(f"/proc/{pid}/wchan").read_text().strip("0\n")
        said += f", in the kernel's {where}" if where else ""
    with suppress(OSError):  # readable by root only
        said += "\n" + Path(f"/proc/{pid}/stack").read_text().rstrip()
    return said


def _field(pid: int, name: str) -> str:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return " ".join(line.partition(":")[2].split())
    return "not there"
