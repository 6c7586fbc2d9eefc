"""`python -m tests.storm`: runs of the demo's kind through storms of random faults."""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.storm.course import demo
from tests.storm.harness import Course, Report, endure, forget, undisturbed

_HEAD = (
    "| seed | faults | attempts | steps repeated | seconds | seconds lost | same bits |"
    " memory MiB | files | threads | disk MiB |",
    "| ---: | ---: | ---: | ---: | ---: | ---: | --- | --- | --- | --- | --- |",
)


def main(argv: Sequence[str]) -> int:
    """Brew storms; returns 1 where a run did not come out of one as it should."""
    parser = argparse.ArgumentParser(prog="python -m tests.storm", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--seed", type=int, help="of the one storm")
    which.add_argument("--seeds", type=_numbers, help="of several storms: 0,1,2")
    which.add_argument("--fresh", action="store_true", help="one storm, of a seed that nobody knows")
    parser.add_argument("--faults", type=int, default=20, help="in each storm")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep runs, logs and notes here")
    args = parser.parse_args(argv)
    if args.fresh:
        args.seed = random.SystemRandom().randrange(10**6)
    seeds = args.seeds or [args.seed]
    with ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="storm-")))
        folder = folder.resolve()
        return _storms(folder, seeds, args.faults)


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _storms(folder: Path, seeds: Sequence[int], faults: int) -> int:
    course = demo(folder)
    for place in (course.reference, folder / "notes"):
        forget(place)
    calm = undisturbed(course, folder / "notes", ranks=2)
    _say(f"undisturbed: {course.steps} steps in {calm.seconds:.0f} s")
    storms = [] if calm.wrong else seeds
    reports = [calm, *(_one(course, folder / f"storm-{seed}", seed, faults) for seed in storms)]
    _say("\n".join(["", *_HEAD, *(_row(report, calm) for report in reports)]))
    bad = [report for report in reports if report.wrong]
    for report in bad:
        _say(f"\nseed {report.seed}:", *report.wrong, sep="\n  ")
        if report.seed >= 0:
            _say(f"again: python -m tests.storm --seed {report.seed} --faults {faults} --keep DIR")
    return 1 if bad else 0


def _one(course: Course, folder: Path, seed: int, faults: int) -> Report:
    _say(f"\nstorm {seed}")
    forget(folder)
    number = iter(range(1, faults + 1))
    report = endure(
        course,
        course.storm(seed, faults),
        folder,
        seed=seed,
        tell=lambda line: _say(f"{next(number):3d}/{faults} {line}"),
    )
    _say(f"storm {seed}: {'as undisturbed' if not report.wrong else 'NOT as undisturbed'}")
    return report


def _say(*parts: str, sep: str = " ") -> None:
    sys.stdout.write(f"{sep.join(parts)}\n")
    sys.stdout.flush()


def _row(report: Report, calm: Report) -> str:
    cells = [
        "none" if report is calm else str(report.seed),
        f"{report.struck} of {len(report.faults)}",
        str(len(report.attempts)),
        str(report.repeated),
        f"{report.seconds:.0f}",
        f"{report.seconds - calm.seconds:.0f}",
        "no" if report.wrong else "yes",
        _span([row["kib"] / 1024 for row in _gauges(report)]),
        _span([row["files"] for row in _gauges(report)]),
        _span([row["threads"] for row in _gauges(report)]),
        _span([attempt.size / 2**20 for attempt in report.attempts]),
    ]
    return f"| {' | '.join(cells)} |"


def _gauges(report: Report) -> list[dict[str, Any]]:
    """What rank 0 held: at all steps of the only attempt, or at the third step of each."""
    if len(report.attempts) == 1:
        return report.attempts[0].gauges[3:]
    return [attempt.gauges[3] for attempt in report.attempts if len(attempt.gauges) > 3]


def _span(values: Sequence[float]) -> str:
    """The medians of the first and of the last third."""
    if not values:
        return ""
    third = max(1, len(values) // 3)
    return f"{statistics.median(values[:third]):.0f} → {statistics.median(values[-third:]):.0f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
