"""`agrivision report`."""

from __future__ import annotations

from pathlib import Path

from agrivision.commands.parsing import Command, Parser, make_parser
from agrivision.errors import BadInput, ExitCode

_SUMMARY = "one page about a run, or about several side by side"
_MOST_TILES = 20  # of each class
_EXAMPLES = [
    "runs/farm --out report.html",
    "runs/wide runs/deep runs/both --out compared.html --figures figures",
]


def _parser() -> Parser:
    made = make_parser("report", _SUMMARY, _EXAMPLES)
    made.add_argument("runs", type=str, nargs="+", help="run directories; also copies, also running")
    made.add_argument("--out", type=str, required=True, help="HTML file to write; it needs no other")
    made.add_argument("--figures", type=str, default=None, help="folder for the charts as SVG, too")
    made.add_argument(
        "--tiles", type=int, default=1, help="of each class, best and worst, to draw; 0 for none"
    )
    made.add_argument(
        "--data", type=str, default=None, help="data set, where it is not at its old place any more"
    )
    return made


def _run(argv: list[str]) -> ExitCode:
    args = _parser().parse_args(argv)
    if not 0 <= args.tiles <= _MOST_TILES:
        raise BadInput(f"--tiles {args.tiles}: from 0 to {_MOST_TILES}")
    from agrivision.console import say
    from agrivision.data.schema import Schema
    from agrivision.monitor.log import configure_log
    from agrivision.report.write import write_report

    configure_log(0, None)
    data = None if args.data is None else Path(args.data)
    if data is not None:
        Schema.read(data)  # a path that is none is an error, not a page with less in it
    write_report(
        [Path(run) for run in args.runs],
        Path(args.out),
        tiles=args.tiles,
        charts=None if args.figures is None else Path(args.figures),
        data=data,
    )
    say(f"{args.out}: open it in a browser")
    return ExitCode.DONE


COMMAND = Command(summary=_SUMMARY, parser=_parser, run=_run)
