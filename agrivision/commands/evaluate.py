"""`agrivision evaluate`."""

from __future__ import annotations

from pathlib import Path

from agrivision.commands.parsing import (
    SYMMETRIES_HELP,
    Command,
    Parser,
    add_checkpoint,
    add_json,
    add_postprocess,
    add_stall_minutes,
    make_parser,
)
from agrivision.errors import ExitCode
from agrivision.training.preemption import StopRequest

_SUMMARY = "score a run on a split"
_EXAMPLES = [
    "--checkpoint runs/first --data data/av2021 --split val --json score.json",
    "--checkpoint runs/first --data data/av2021 --symmetries --postprocess",
]


def _parser() -> Parser:
    made = make_parser("evaluate", _SUMMARY, _EXAMPLES)
    add_checkpoint(made)
    made.add_argument("--data", type=str, required=True, help="a prepared data set")
    made.add_argument("--split", type=str, default="val", help="of the data set")
    made.add_argument("--symmetries", action="store_true", help=SYMMETRIES_HELP)
    add_postprocess(made)
    add_stall_minutes(made)
    add_json(made, "the scores")
    return made


def _run(argv: list[str]) -> ExitCode:
    args = _parser().parse_args(argv)
    stop = StopRequest().listen()
    from agrivision.console import print_scores, say, write_json
    from agrivision.inference.scoring import evaluate_run

    given = args.postprocess
    found = evaluate_run(
        Path(args.checkpoint),
        Path(args.data),
        args.split,
        batch_size=args.batch_size,
        threads=args.threads,
        precision=args.precision,
        symmetries=args.symmetries,
        postprocess=Path(given) if given else given is not None,
        stop=lambda: stop.made,
        stall_minutes=args.stall_minutes,
    )
    if found is not None:  # rank 0
        say(f"{found['checkpoint']}, trained for {found['step']} steps, on {args.split}:")
        if "postprocessing" in found:
            say(f"post-processing: {found['postprocessing']}")
        print_scores(found)
        if args.json:
            write_json(Path(args.json), found)
    return ExitCode.DONE


COMMAND = Command(summary=_SUMMARY, parser=_parser, run=_run)
