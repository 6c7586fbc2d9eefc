"""`agrivision score`."""

from __future__ import annotations

from pathlib import Path

from agrivision.commands.parsing import Command, Parser, add_json, make_parser
from agrivision.errors import ExitCode

_SUMMARY = "score anybody's class-id PNGs"
_EXAMPLES = [
    "submission.zip --data data/av2021 --split val",
]


def _parser() -> Parser:
    made = make_parser("score", _SUMMARY, _EXAMPLES)
    made.add_argument("predictions", type=str, help="folder or zip of class-id PNGs, one a tile")
    made.add_argument("--data", type=str, required=True, help="a prepared data set")
    made.add_argument("--split", type=str, default="val", help="of the data set")
    add_json(made, "the scores")
    return made


def _run(argv: list[str]) -> ExitCode:
    args = _parser().parse_args(argv)
    from agrivision.console import print_scores, write_json
    from agrivision.evaluation.score import score_folder
    from agrivision.monitor.log import configure_log
    from agrivision.monitor.progress import progress

    configure_log(0, None)
    with progress("scoring", unit="tile") as bar:
        found = score_folder(Path(args.predictions), Path(args.data), args.split, bar.advance)
    print_scores(found.to_dict())
    if args.json:
        write_json(Path(args.json), found.to_dict())
    return ExitCode.DONE


COMMAND = Command(summary=_SUMMARY, parser=_parser, run=_run)
