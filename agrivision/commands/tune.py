"""`agrivision tune`."""

from __future__ import annotations

from pathlib import Path

from agrivision.commands.parsing import (
    SYMMETRIES_HELP,
    Command,
    Parser,
    add_json,
    add_network,
    add_stall_minutes,
    make_parser,
)
from agrivision.errors import ExitCode
from agrivision.training.preemption import StopRequest

_SUMMARY = "choose thresholds and least areas by class for a run"
_EXAMPLES = [
    "runs/first --data data/av2021",
    "runs/first --data data/av2021 --symmetries --areas_only",
]


def _parser() -> Parser:
    made = make_parser("tune", _SUMMARY, _EXAMPLES)
    made.add_argument("run", type=str, help="run directory, or one of its checkpoints")
    made.add_argument("--data", type=str, required=True, help="a prepared data set")
    made.add_argument("--split", type=str, default="val", help="of the data set, with labels")
    made.add_argument(
        "--objective", choices=("miou", "f1"), default="miou", help="what is to become largest"
    )
    made.add_argument("--classes_only", action="store_true", help="no least areas")
    made.add_argument("--areas_only", action="store_true", help="no factors of probabilities")
    made.add_argument("--batch_size", type=int, default=8, help="tiles in one forward pass")
    add_network(made)
    made.add_argument("--symmetries", action="store_true", help=SYMMETRIES_HELP)
    add_stall_minutes(made)
    add_json(made, "the scores")
    return made


def _run(argv: list[str]) -> ExitCode:
    args = _parser().parse_args(argv)
    stop = StopRequest().listen()
    from agrivision.console import print_tuned, say, write_json
    from agrivision.inference.scoring import Looking
    from agrivision.inference.tuning import tune

    found = tune(
        Path(args.run),
        Path(args.data),
        args.split,
        kind=args.objective,
        factors=not args.areas_only,
        areas=not args.classes_only,
        how=Looking(
            batch_size=args.batch_size,
            threads=args.threads,
            precision=args.precision,
            symmetries=args.symmetries,
        ),
        stop=lambda: stop.made,
        stall_minutes=args.stall_minutes,
    )
    if found is not None:  # rank 0
        for line in found.lines():
            say(line)
        print_tuned(found.to_dict())
        say(f"{found.path}: `evaluate` and `predict` take it with --postprocess")
        if args.json:
            write_json(Path(args.json), found.to_dict())
    return ExitCode.DONE


COMMAND = Command(summary=_SUMMARY, parser=_parser, run=_run)
