"""`python -m benchmarks.accuracy run` and `… table`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common import say

if TYPE_CHECKING:
    from benchmarks.accuracy.task import Task

_HERE = Path(__file__).parent
_FOLDER = Path(tempfile.gettempdir()) / "agrivision-benchmarks"
_WHAT = "How good networks become: recipes and peers, with the same tiles and the same budget."
_PARTS = {"peers", "on", "off"}
_FIELDS = {"steps": 3200, "batch": 8, "crop": 64, "base_channels": 8, "depth": 4}
_SCENES = {"steps": 300, "batch": 16, "crop": 128, "base_channels": 16, "depth": 4}
_QUICK = {"steps": 4, "batch": 4, "crop": 48, "base_channels": 4, "depth": 3}
_QUICK_TILES = (48, 64)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, or print the tables."""
    args = _parser().parse_args(argv)
    # Before torch is imported, here and in the processes of the runs.
    if args.command == "run":
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    from benchmarks.accuracy.results import Results

    results = Results(Path(args.results or Path(args.folder) / "accuracy.jsonl"))
    if args.command == "table":
        from benchmarks.accuracy.tables import tables

        print(tables(results.rows()), end="")
        return 0
    from agrivision.errors import ConfigurationError
    from benchmarks.accuracy import bench

    task = _task(args)
    try:
        jobs = bench.plan(task, args.parts, args.seeds, args.only)
    except ConfigurationError as error:
        raise SystemExit(f"benchmarks.accuracy: error: {error}") from None
    failed = bench.run(task, jobs, results, together=args.jobs)
    if failed:
        say(f"{failed} runs failed; the same command tries them again")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="benchmarks.accuracy", description=_WHAT)
    commands = result.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what is not among the results yet")
    show = commands.add_parser("table", help="print the results in Markdown")
    for one in (run, show):
        one.add_argument("--folder", default=_FOLDER, help=f"where data is kept (default {_FOLDER})")
        one.add_argument("--results", help="file of results (default: accuracy.jsonl in the folder)")
    run.add_argument("--parts", type=_parts, default=("peers", "on", "off"), help="peers,on,off")
    run.add_argument("--only", type=_names, default=(), help="names of peers and ingredients: a,b")
    run.add_argument("--seeds", type=_numbers, default=(0, 1, 2), help="one run each: 0,1,2")
    run.add_argument("--jobs", type=int, default=2, help="runs at the same time (default 2)")
    run.add_argument("--threads", type=int, default=1, help="of each run (default 1)")
    run.add_argument("--naip", help="folder with scenes/ and labels/ by date, in place of the fields")
    run.add_argument("--reverse", action="store_true", help="with --naip: validate on the first dates")
    run.add_argument("--recipe", help="YAML file in place of the recommended recipe")
    run.add_argument("--tiles", type=int, default=1152, help="invented tiles (default 1152)")
    run.add_argument("--size", type=int, default=128, help="of an invented tile (default 128)")
    run.add_argument("--steps", type=int, help="budget in steps")
    run.add_argument("--seconds", type=float, help="budget in seconds instead")
    run.add_argument("--batch", type=int, help="crops in a step")
    run.add_argument("--crop", type=int, help="side of a crop in pixels")
    run.add_argument("--base", dest="base_channels", type=int, help="channels of its first level")
    run.add_argument("--depth", type=int, help="of the UNet")
    run.add_argument("--quick", action="store_true", help="everything tiny: does it run at all")
    return result


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _parts(text: str) -> tuple[str, ...]:
    names = _names(text)
    if not names or not set(names) <= _PARTS:
        raise argparse.ArgumentTypeError(f"{text!r}: some of peers,on,off")
    return names


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in _names(text))


def _task(args: argparse.Namespace) -> Task:
    """The data, made if it is not there yet, and the budget."""
    from benchmarks.accuracy.task import Budget, Task, scenes, synthetic

    usual = _QUICK if args.quick else _SCENES if args.naip else _FIELDS
    given = {name: getattr(args, name) for name in usual}
    budget = Budget(
        **{name: usual[name] if value is None else value for name, value in given.items()},
        seconds=args.seconds,
    )
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if args.naip:
        name = "NAIP, first dates held back" if args.reverse else "NAIP, last dates held back"
        dataset, recipe = scenes(folder, Path(args.naip), reverse=args.reverse), "naip.yaml"
    else:
        tiles, size = _QUICK_TILES if args.quick else (args.tiles, args.size)
        name, dataset, recipe = "invented fields", synthetic(folder, tiles, size), "fields.yaml"
    return Task(
        name=name,
        dataset=dataset.resolve(),
        budget=budget,
        plain=_HERE / "plain.yaml",
        recommended=Path(args.recipe) if args.recipe else _HERE / recipe,
    )


if __name__ == "__main__":
    sys.exit(main())
