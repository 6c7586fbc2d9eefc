"""`agrivision inspect`."""

from __future__ import annotations

from pathlib import Path

from agrivision.commands.parsing import Command, Parser, add_json, make_parser
from agrivision.errors import ExitCode

_SUMMARY = "what is in a data set, and is it whole"
_EXAMPLES = [
    "data/av2021 --verify",
    "data/farm --page farm.html",
]


def _parser() -> Parser:
    made = make_parser("inspect", _SUMMARY, _EXAMPLES)
    made.add_argument("dataset", type=str, help="a prepared data set")
    made.add_argument("--verify", action="store_true", help="read and decode every record")
    made.add_argument("--page", type=str, default=None, help="write an HTML page to look at")
    add_json(made, "what was found")
    return made


def _run(argv: list[str]) -> ExitCode:
    args = _parser().parse_args(argv)
    from agrivision.console import ProgressReport, say, write_json
    from agrivision.data.glance import look_over
    from agrivision.data.inspect import inspect_dataset
    from agrivision.monitor.log import configure_log
    from agrivision.monitor.progress import progress
    from agrivision.report.dataset import write_dataset_page

    configure_log(0, None)
    with progress("verifying", unit="tile", show=args.verify) as bar:
        found = inspect_dataset(Path(args.dataset), verify=args.verify, report=ProgressReport(bar))
    for line in found.lines():
        say(line)
    if args.page:
        with progress("looking at tiles", unit="tile") as bar:
            glance = look_over(found.folder, found.schema, report=ProgressReport(bar))
        write_dataset_page(Path(args.page), found, glance)
        say(f"{args.page}: open it in a browser")
    if args.json:
        write_json(Path(args.json), found.to_dict())
    return ExitCode.BAD_INPUT if found.damaged else ExitCode.DONE


COMMAND = Command(summary=_SUMMARY, parser=_parser, run=_run)
