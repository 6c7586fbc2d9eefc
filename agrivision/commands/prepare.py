"""`agrivision prepare`."""

from __future__ import annotations

from pathlib import Path

from agrivision.commands.parsing import (
    PART_HELP,
    Command,
    Parser,
    add_allow_vrt,
    make_parser,
    names,
)
from agrivision.errors import BadInput, ExitCode
from agrivision.training.preemption import StopRequest

_SUMMARY = "turn a source of imagery and labels into shards"
_EXAMPLES = [
    "Agriculture-Vision-2021 data/av2021",
    "my_farm data/farm --val north_field --classes 0:crop,1:weeds,2:water",
]


def _parser() -> Parser:
    made = make_parser("prepare", _SUMMARY, _EXAMPLES)
    made.add_argument("source", type=str, help="Agriculture-Vision folder, scenes/ + labels/, or CSV")
    made.add_argument("out", type=str, help="data set to make")
    made.add_argument("--workers", type=int, default=None, help="processes; default: all cores")
    made.add_argument("--val", type=str, default="", help="fields or scenes that validate: a,b")
    made.add_argument("--val_fraction", type=float, default=0.2, help="else this share validates")
    made.add_argument("--tile", type=int, default=256, help="side of the tiles cut from scenes")
    made.add_argument("--stride", type=int, default=None, help="between tiles; default: --tile")
    made.add_argument("--classes", type=str, default="", help="label values: 0:vegetation,1:water")
    made.add_argument("--bands", type=str, default="", help="names of the bands: red,green,blue,nir")
    made.add_argument("--ignore", type=int, default=None, help="label value that does not count")
    made.add_argument("--edition", type=str, default=None, help="of Agriculture-Vision: 2020 or 2021")
    made.add_argument(
        "--assume_valid", action="store_true", help="without boundaries or masks: all valid"
    )
    made.add_argument("--strict", action="store_true", help="stop at the first problem")
    made.add_argument("--shard_tiles", type=int, default=128, help="tiles in a shard")
    made.add_argument(
        "--raw",
        action="store_true",
        help="uncompressed pixels, for fast local disks: far larger files",
    )
    add_allow_vrt(made)
    made.add_argument("--part", type=str, default=None, help=PART_HELP)
    made.add_argument(
        "--repair",
        action="store_true",
        help="of a finished data set, make the damaged shards again, byte for byte",
    )
    return made


def _run(argv: list[str]) -> ExitCode:
    args = _parser().parse_args(argv)
    stop = StopRequest().listen()
    from agrivision.console import ProgressReport, say
    from agrivision.data.prepare import (
        PartSummary,
        PrepareOptions,
        PrepareSummary,
        prepare,
        prepare_part,
    )
    from agrivision.data.repair import RepairSummary, repair
    from agrivision.data.sources.survey import parse_classes
    from agrivision.monitor.log import configure_log
    from agrivision.monitor.progress import progress
    from agrivision.part import Part

    options = PrepareOptions(
        workers=args.workers,
        val=names(args.val),
        val_fraction=args.val_fraction,
        tile=args.tile,
        stride=args.stride,
        classes=parse_classes(args.classes) if args.classes else None,
        bands=names(args.bands) or None,
        ignore=args.ignore,
        edition=args.edition,
        assume_valid=args.assume_valid,
        strict=args.strict,
        shard_tiles=args.shard_tiles,
        raw=args.raw,
        allow_vrt=args.allow_vrt,
    )
    part = None if args.part is None else Part.parse(args.part)
    if part is not None and args.repair:
        raise BadInput("--repair is done by one process: leave out --part")
    source, out = Path(args.source), Path(args.out)
    configure_log(0, None)
    summary: PrepareSummary | PartSummary | RepairSummary
    with progress("repairing" if args.repair else "preparing", unit="tile") as bar:
        report = ProgressReport(bar)
        if args.repair:
            summary = repair(source, out, options, report, stop=lambda: stop.made)
        elif part is None:
            summary = prepare(source, out, options, report, stop=lambda: stop.made)
        else:
            summary = prepare_part(source, out, options, part, report, stop=lambda: stop.made)
    for line in summary.lines():
        say(line)
    return ExitCode.DONE


COMMAND = Command(summary=_SUMMARY, parser=_parser, run=_run)
