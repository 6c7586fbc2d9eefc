"""`agrivision tensorboard`."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import NoReturn

from agrivision.commands.parsing import Command, Parser, make_parser
from agrivision.errors import ExitCode

_SUMMARY = "look at runs in a browser, seen by nobody else"
_EXAMPLES = ["runs", "runs/first --port 6006", "runs --socket"]


def _parser() -> Parser:
    made = make_parser("tensorboard", _SUMMARY, _EXAMPLES)
    made.add_argument("runs", type=str, help="a run directory, or a folder of them")
    made.add_argument("--port", type=int, default=None, help="of loopback; default: one that is free")
    made.add_argument(
        "--socket",
        type=str,
        nargs="?",
        const=tempfile.gettempdir(),
        metavar="FOLDER",
        help="listen on a socket in a private folder made in FOLDER, by default the node's own"
        " temporary one, instead of on a port",
    )
    return made


def _run(argv: list[str]) -> ExitCode:
    args = _parser().parse_args(argv)
    from agrivision.monitor.board import serve

    signal.signal(signal.SIGTERM, _leave)
    mask = os.umask(0o077)
    try:
        socket_place = None if args.socket is None else Path(args.socket)
        serve(Path(args.runs), port=args.port, socket_place=socket_place)
    except KeyboardInterrupt:  # how one leaves it on a terminal
        pass
    finally:
        os.umask(mask)
    return ExitCode.DONE


def _leave(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
    sys.exit(int(ExitCode.DONE))


COMMAND = Command(summary=_SUMMARY, parser=_parser, run=_run)
