"""`agrivision doctor`."""

from __future__ import annotations

import signal
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from agrivision import __version__
from agrivision.commands.parsing import Command, Parser, add_json, make_parser
from agrivision.errors import BadInput, ExitCode, one_line
from agrivision.slurm import SIGNAL_SECONDS

if TYPE_CHECKING:
    from rich.console import Console

    from agrivision.doctor.finding import Finding

_SUMMARY = "what this machine and its cluster can do, and what to do about what they cannot"
_EXAMPLES = [
    "",
    "--data data/av2021 --run_dir runs --json doctor.json",
    "--run_dir runs --node --partition gpu --gpus_per_node 1      # runs a tiny job there",
]
_COLOURS = {"good": "green", "careful": "yellow", "bad": "bold red"}


def _parser() -> Parser:
    made = make_parser("doctor", _SUMMARY, _EXAMPLES)
    made.add_argument("--data", type=str, default=None, help="data set or folder of images, to be read")
    made.add_argument(
        "--run_dir",
        type=str,
        default=None,
        help="folder of a run or of runs, to be written for seconds",
    )
    made.add_argument("--node", action="store_true", help="try all of it in a tiny Slurm job, too")
    made.add_argument("--wait_seconds", type=int, default=60, help="for a node for that job")
    for name, what in (
        ("partition", "that jobs will run in; the cluster's default for none"),
        ("account", "that jobs will be charged to"),
        ("qos", "quality of service of jobs"),
        ("gpus_per_node", "GPUs that jobs will ask for, `4` or `a100:4`"),
    ):
        made.add_argument(f"--{name}", type=str, default=None, help=what)
    made.add_argument(
        "--signal_seconds",
        type=int,
        default=SIGNAL_SECONDS,
        help="how long before their time limit jobs are warned",
    )
    add_json(made, "all findings")
    return made


def _run(argv: list[str]) -> ExitCode:
    args = _parser().parse_args(argv)
    # What is tried leaves nothing behind also when somebody ends it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from agrivision.console import write_json
    from agrivision.doctor.cluster import Wanted
    from agrivision.doctor.examination import Examination, examine
    from agrivision.doctor.finding import Finding, Verdict, counted

    for name in ("wait_seconds", "signal_seconds"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name} is {getattr(args, name)}: give at least 1")
    wanted = Wanted(
        partition=args.partition,
        account=args.account,
        qos=args.qos,
        gpus_per_node=args.gpus_per_node,
        signal_seconds=args.signal_seconds,
    )
    what = Examination(
        data=Path(args.data) if args.data else None,
        run_dir=Path(args.run_dir) if args.run_dir else None,
        wanted=wanted,
        node=args.node,
        wait_seconds=args.wait_seconds,
    )
    console, findings = _console(), list[Finding]()
    for finding in examine(what):
        _print(console, finding, new=not findings or findings[-1].topic != finding.topic)
        findings.append(finding)
    counts = counted(findings)
    console.print(
        f"\n{', '.join(f'{count} {verdict}' for verdict, count in counts.items())}", style="bold"
    )
    if args.json:
        content = {
            "agrivision": __version__,
            "counts": counts,
            "findings": [
                {"topic": each.topic, "what": each.what, "verdict": each.verdict, "advice": each.advice}
                for each in findings
            ],
        }
        write_json(Path(args.json), content)
    return ExitCode.FAILED if counts[Verdict.BAD] else ExitCode.DONE


def _console() -> Console:
    """Without rich's own marks and colours: what is printed holds names of files."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True, file=sys.stdout)


def _print(console: Console, finding: Finding, *, new: bool) -> None:
    """Lines that a terminal folds where their text begins; a log gets them whole."""
    from rich.text import Text

    if new:
        console.print(f"\n{finding.topic}", style="bold")
    width = console.width if console.is_terminal else None
    mark = f"  {finding.verdict:8} "
    text = Text(_folded(mark, finding.what, width))
    text.stylize(_COLOURS[finding.verdict], 0, len(mark))
    console.print(text)
    if finding.advice:
        console.print(Text(_folded(f"{'':{len(mark)}}→ ", finding.advice, width)))


def _folded(begin: str, text: str, width: int | None) -> str:
    text = one_line(text)
    if width is None:
        return begin + text
    return textwrap.fill(text, width, initial_indent=begin, subsequent_indent=" " * len(begin))


COMMAND = Command(summary=_SUMMARY, parser=_parser, run=_run)
