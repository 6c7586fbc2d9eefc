"""`agrivision synthesize`."""

from __future__ import annotations

from pathlib import Path

from agrivision.commands.parsing import Command, Parser, cores, make_parser
from agrivision.errors import ExitCode

_SUMMARY = "invent fields in Agriculture-Vision's layout"
_EXAMPLES = [
    "fields --tiles 96 --size 256",
]


def _parser() -> Parser:
    made = make_parser("synthesize", _SUMMARY, _EXAMPLES)
    made.add_argument("out", type=str, help="folder to make")
    made.add_argument("--tiles", type=int, default=96, help="number of tiles over all splits")
    made.add_argument("--size", type=int, default=256, help="side of a tile in pixels")
    made.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    made.add_argument("--workers", type=int, default=None, help="processes; default: all cores")
    return made


def _run(argv: list[str]) -> ExitCode:
    args = _parser().parse_args(argv)
    from agrivision.console import say
    from agrivision.data.sources.synthetic import synthesize
    from agrivision.monitor.log import configure_log
    from agrivision.monitor.progress import progress

    configure_log(0, None)
    with progress("synthesizing", args.tiles, unit="tile") as bar:
        synthesize(
            Path(args.out),
            tiles=args.tiles,
            size=args.size,
            seed=args.seed,
            workers=cores() if args.workers is None else args.workers,
            report=bar.advance,
        )
    say(f"{args.tiles} tiles in {args.out}")
    return ExitCode.DONE


COMMAND = Command(summary=_SUMMARY, parser=_parser, run=_run)
