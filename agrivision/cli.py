"""The commands; each reads its arguments, calls one function of the package and prints the result.

Importing this module does not import torch: `agrivision train` must have its signal handlers in place
before that takes its seconds.
"""

from __future__ import annotations

import os
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path

import jsonargparse

from agrivision import __version__
from agrivision.ending import report_ending
from agrivision.errors import AgrivisionError, BadInput, ExitCode, without_passwords
from agrivision.options import parse_train, refuse_passwords, shortened, train_parser
from agrivision.training.preemption import StopRequest

_Parser = jsonargparse.ArgumentParser
_PART_HELP = "I/N: this task's share of the work, beside N - 1 other tasks"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: what follows `agrivision`; None takes the process's arguments.

    Returns:
        The exit code, see `agrivision.errors.ExitCode`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        refuse_passwords(arguments)
        code = _dispatch(arguments)
    except AgrivisionError as error:
        return _complain(str(error), error.exit_code)
    except ArgumentError as error:
        return _complain(str(shortened(error)), ExitCode.BAD_INPUT)
    except KeyboardInterrupt:
        return _complain("interrupted", ExitCode.FAILED)
    except MemoryError:
        return _complain("out of memory: use smaller batches or fewer workers", ExitCode.HOPELESS)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; naming the class would import torch
            line = "out of GPU memory: use smaller batches or crops, or training.micro_batch_size"
            return _complain(line, ExitCode.HOPELESS)
        report_ending(ExitCode.FAILED, f"{type(error).__name__}: {error}", traceback.format_exc())
        raise
    report_ending(code, "")
    return int(code)


def _complain(line: str, code: ExitCode) -> int:
    line = without_passwords(" ".join(line.split()))
    sys.stderr.write(f"agrivision: error: {line}\n")
    report_ending(code, line)
    return int(code)


def _dispatch(arguments: list[str]) -> ExitCode:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        sys.stdout.write(_usage())
        return ExitCode.DONE
    if name == "--version":
        sys.stdout.write(f"agrivision {__version__}\n")
        return ExitCode.DONE
    if name not in _COMMANDS:
        raise BadInput(f"there is no command {name!r}; the commands are {', '.join(_COMMANDS)}")
    return _COMMANDS[name][1](arguments[1:])


def _usage() -> str:
    lines = [f"  {name:12} {text}" for name, (text, _) in _COMMANDS.items()]
    return "\n".join(
        ["usage: agrivision COMMAND …", "", *lines, "", "agrivision COMMAND --help says more.\n"]
    )


def _parser(command: str) -> _Parser:
    return _Parser(prog=f"agrivision {command}", description=_COMMANDS[command][0], exit_on_error=False)


def _synthesize(argv: list[str]) -> ExitCode:
    parser = _parser("synthesize")
    parser.add_argument("out", type=str, help="folder to make")
    parser.add_argument("--tiles", type=int, default=96, help="number of tiles over all splits")
    parser.add_argument("--size", type=int, default=256, help="side of a tile in pixels")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    parser.add_argument("--workers", type=int, default=None, help="processes; default: all cores")
    args = parser.parse_args(argv)
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
            workers=_cores() if args.workers is None else args.workers,
            report=bar.advance,
        )
    say(f"{args.tiles} tiles in {args.out}")
    return ExitCode.DONE


def _prepare(argv: list[str]) -> ExitCode:
    parser = _parser("prepare")
    parser.add_argument("source", type=str, help="Agriculture-Vision folder, scenes/ + labels/, or CSV")
    parser.add_argument("out", type=str, help="data set to make")
    parser.add_argument("--workers", type=int, default=None, help="processes; default: all cores")
    parser.add_argument("--val", type=str, default="", help="fields or scenes that validate: a,b")
    parser.add_argument("--val_fraction", type=float, default=0.2, help="else this share validates")
    parser.add_argument("--tile", type=int, default=256, help="side of the tiles cut from scenes")
    parser.add_argument("--stride", type=int, default=None, help="between tiles; default: --tile")
    parser.add_argument("--classes", type=str, default="", help="label values: 0:vegetation,1:water")
    parser.add_argument("--bands", type=str, default="", help="names of the bands: red,green,blue,nir")
    parser.add_argument("--ignore", type=int, default=None, help="label value that does not count")
    parser.add_argument("--edition", type=str, default=None, help="of Agriculture-Vision: 2020 or 2021")
    parser.add_argument(
        "--assume_valid", action="store_true", help="without boundaries or masks: all valid"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first problem")
    parser.add_argument("--shard_tiles", type=int, default=128, help="tiles in a shard")
    parser.add_argument(
        "--raw",
        action="store_true",
        help="uncompressed pixels, for fast local disks: far larger files",
    )
    _add_allow_vrt(parser)
    parser.add_argument("--part", type=str, default=None, help=_PART_HELP)
    parser.add_argument(
        "--repair",
        action="store_true",
        help="of a finished data set, make the damaged shards again, byte for byte",
    )
    args = parser.parse_args(argv)
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
        val=_names(args.val),
        val_fraction=args.val_fraction,
        tile=args.tile,
        stride=args.stride,
        classes=parse_classes(args.classes) if args.classes else None,
        bands=_names(args.bands) or None,
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


def _inspect(argv: list[str]) -> ExitCode:
    parser = _parser("inspect")
    parser.add_argument("dataset", type=str, help="a prepared data set")
    parser.add_argument("--verify", action="store_true", help="read and decode every record")
    parser.add_argument("--json", type=str, default=None, help="write what was found to this file")
    args = parser.parse_args(argv)
    from agrivision.console import ProgressReport, say, write_json
    from agrivision.data.inspect import inspect_dataset
    from agrivision.monitor.log import configure_log
    from agrivision.monitor.progress import progress

    configure_log(0, None)
    with progress("verifying", unit="tile", show=args.verify) as bar:
        found = inspect_dataset(Path(args.dataset), verify=args.verify, report=ProgressReport(bar))
    for line in found.lines():
        say(line)
    if args.json:
        write_json(Path(args.json), found.to_dict())
    return ExitCode.BAD_INPUT if found.damaged else ExitCode.DONE


def _train(argv: list[str]) -> ExitCode:
    if {"-h", "--help"} & set(argv) or any(word.startswith("--print_config") for word in argv):
        train_parser().parse_args(argv)  # prints and exits
    stop = StopRequest().listen()
    options = parse_train(argv)
    from agrivision.training.run import train

    return train(
        options.config,
        options.run_dir,
        stop=stop,
        resume_with_changes=options.resume_with_changes,
        profile=options.profile,
    )


def _evaluate(argv: list[str]) -> ExitCode:
    parser = _parser("evaluate")
    _add_checkpoint(parser)
    parser.add_argument("--data", type=str, required=True, help="a prepared data set")
    parser.add_argument("--split", type=str, default="val", help="of the data set")
    parser.add_argument("--json", type=str, default=None, help="write the scores to this file")
    args = parser.parse_args(argv)
    stop = StopRequest().listen()
    from agrivision.console import print_scores, write_json
    from agrivision.inference.scoring import evaluate_run

    found = evaluate_run(
        Path(args.checkpoint),
        Path(args.data),
        args.split,
        batch_size=args.batch_size,
        threads=args.threads,
        precision=args.precision,
        stop=lambda: stop.made,
    )
    if found is not None:  # rank 0
        print_scores(found)
        if args.json:
            write_json(Path(args.json), found)
    return ExitCode.DONE


def _score(argv: list[str]) -> ExitCode:
    parser = _parser("score")
    parser.add_argument("predictions", type=str, help="folder or zip of class-id PNGs, one a tile")
    parser.add_argument("--data", type=str, required=True, help="a prepared data set")
    parser.add_argument("--split", type=str, default="val", help="of the data set")
    parser.add_argument("--json", type=str, default=None, help="write the scores to this file")
    args = parser.parse_args(argv)
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


def _predict(argv: list[str]) -> ExitCode:
    parser = _parser("predict")
    _add_checkpoint(parser)
    parser.add_argument(
        "inputs", type=str, nargs="+", help="data set, Agriculture-Vision folder, scenes"
    )
    parser.add_argument("--out", type=str, required=True, help="folder for the maps")
    parser.add_argument("--split", type=str, default=None, help="of a data set; default: all")
    parser.add_argument("--tile", type=int, default=None, help="side of a window on a scene, in pixels")
    parser.add_argument("--margin", type=int, default=None, help="read around each window, in pixels")
    _add_allow_vrt(parser)
    parser.add_argument("--part", type=str, default="0/1", help=_PART_HELP)
    args = parser.parse_args(argv)
    stop = StopRequest().listen()
    from agrivision.console import say
    from agrivision.inference.predict import PredictOptions, predict
    from agrivision.inference.trained import load_run
    from agrivision.monitor.log import configure_log
    from agrivision.monitor.progress import progress
    from agrivision.part import Part

    configure_log(0, None)
    part = Part.parse(args.part)
    options = PredictOptions(
        split=args.split,
        batch_size=args.batch_size,
        threads=args.threads,
        precision=args.precision,
        tile=args.tile,
        margin=args.margin,
        allow_vrt=args.allow_vrt,
    )
    inputs = [Path(path) for path in args.inputs]
    with progress("predicting", unit="tile") as bar:
        summary = predict(
            load_run(args.checkpoint),
            inputs,
            Path(args.out),
            options,
            bar,
            part=part,
            stop=lambda: stop.made,
        )
    for line in summary.lines():
        say(line)
    return ExitCode.DONE


def _add_checkpoint(parser: _Parser) -> None:
    parser.add_argument("--checkpoint", type=str, required=True, help="run directory or checkpoint")
    parser.add_argument("--batch_size", type=int, default=8, help="tiles in one forward pass")
    parser.add_argument("--threads", type=int, default=2, help="decoding threads")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network")


def _add_allow_vrt(parser: _Parser) -> None:
    parser.add_argument(
        "--allow_vrt", action="store_true", help="take VRTs, too, whose sources are plain files"
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _cores() -> int:
    return len(os.sched_getaffinity(0))


_Command = Callable[[list[str]], ExitCode]
_COMMANDS: dict[str, tuple[str, _Command]] = {
    "synthesize": ("invent fields in Agriculture-Vision's layout", _synthesize),
    "prepare": ("turn a source of imagery and labels into shards", _prepare),
    "inspect": ("what is in a data set, and is it whole", _inspect),
    "train": ("train, or go on with a run", _train),
    "evaluate": ("score a run on a split", _evaluate),
    "score": ("score anybody's class-id PNGs", _score),
    "predict": ("tiles and scenes to class-id maps", _predict),
}
