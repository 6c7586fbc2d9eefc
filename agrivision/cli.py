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
    parser.add_argument(
        "--checkpoint",
        type=str,
        action="append",
        required=True,
        help="run directory, checkpoint or exported network; given several times, they are averaged",
    )
    parser.add_argument(
        "--batch_size", type=int, default=None, help="tiles or windows in one forward pass"
    )
    _add_network(parser)
    parser.add_argument(
        "inputs",
        type=str,
        nargs="+",
        help="data set, Agriculture-Vision folder, scenes, folder of scenes, list of paths (.txt)",
    )
    parser.add_argument("--out", type=str, required=True, help="folder for the maps")
    parser.add_argument("--split", type=str, default=None, help="of a data set; default: all")
    _add_scene_options(parser)
    _add_product_options(parser)
    _add_allow_vrt(parser)
    parser.add_argument("--part", type=str, default="0/1", help=_PART_HELP)
    args = parser.parse_args(argv)
    stop = StopRequest().listen()
    from agrivision.console import say
    from agrivision.inference.exported import load_model
    from agrivision.inference.predict import PredictOptions, predict
    from agrivision.inference.products import Products
    from agrivision.inference.ranks import own_share
    from agrivision.inference.scene import Taking
    from agrivision.monitor.log import configure_log
    from agrivision.monitor.progress import progress
    from agrivision.part import Part
    from agrivision.world import World

    world = World.from_environment()
    configure_log(world.rank, None)
    part, device = own_share(Part.parse(args.part), world)
    options = PredictOptions(
        split=args.split,
        batch_size=args.batch_size,
        threads=args.threads,
        precision=args.precision,
        tile=args.tile,
        margin=args.margin,
        overlap=args.overlap,
        symmetries=args.symmetries,
        taking=Taking(
            bands=_names(args.bands),
            scale=args.scale,
            fill_missing=args.fill_missing,
            resolution=args.resolution,
        ),
        products=Products(
            confidence=args.confidence,
            probabilities=args.probabilities,
            polygons=args.polygons,
            background=args.background,
            smallest=args.smallest,
            simplify=args.simplify,
            fields=None if args.fields is None else Path(args.fields),
            field_name=args.field_name,
        ),
        allow_vrt=args.allow_vrt,
    )
    inputs = [Path(path) for path in args.inputs]
    with progress("predicting", unit="tile", show=world.is_main) as bar:
        summary = predict(
            [load_model(Path(path), device) for path in args.checkpoint],
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


def _add_scene_options(parser: _Parser) -> None:
    """How a scene is cut, and how it is taken where it is not like the tiles of the training."""
    parser.add_argument("--tile", type=int, default=None, help="side of a window on a scene, in pixels")
    parser.add_argument("--margin", type=int, default=None, help="read around each window, in pixels")
    parser.add_argument(
        "--overlap", type=int, default=None, help="shared by neighbouring windows, in pixels"
    )
    parser.add_argument(
        "--symmetries", action="store_true", help="look from all eight sides and average: 8 x the work"
    )
    parser.add_argument(
        "--bands", type=str, default="", help="where each band of the training is: 4,1,2,3 or names"
    )
    parser.add_argument(
        "--scale", type=str, default=None, help="other types of pixels: a factor, range or statistics"
    )
    parser.add_argument(
        "--fill_missing", action="store_true", help="take a band that is missing as even"
    )
    parser.add_argument(
        "--resolution", type=float, default=None, help="resample scenes to so many metres a pixel"
    )


def _add_product_options(parser: _Parser) -> None:
    """What is made of a scene besides its map."""
    parser.add_argument(
        "--confidence", action="store_true", help="a layer with the probability of the class"
    )
    parser.add_argument(
        "--probabilities", action="store_true", help="a layer with the probabilities of all classes"
    )
    parser.add_argument("--polygons", action="store_true", help="as GeoPackage and GeoJSON")
    parser.add_argument("--background", action="store_true", help="polygons of class 0, too")
    parser.add_argument(
        "--smallest", type=float, default=0.0, help="m²: smaller areas join their largest neighbour"
    )
    parser.add_argument(
        "--simplify", type=float, default=0.0, help="metres that outlines may move; they stay joined"
    )
    parser.add_argument(
        "--fields", type=str, default=None, help="vector layer of fields: a table of hectares by field"
    )
    parser.add_argument(
        "--field_name", type=str, default=None, help="its column with the fields' names"
    )


def _export(argv: list[str]) -> ExitCode:
    parser = _parser("export")
    parser.add_argument("--checkpoint", type=str, required=True, help="run directory or checkpoint")
    parser.add_argument(
        "--format", choices=("safetensors", "torch-export", "onnx"), required=True, help="of the file"
    )
    parser.add_argument("--out", type=str, required=True, help="file: .safetensors, .pt2 or .onnx")
    parser.add_argument("--data", type=str, default=None, help="to compare on; default: the run's own")
    parser.add_argument("--split", type=str, default=None, help="of the data set; default: val")
    parser.add_argument("--tiles", type=int, default=8, help="tiles to compare on")
    args = parser.parse_args(argv)
    from agrivision.console import say
    from agrivision.inference.export import export, find_samples
    from agrivision.inference.exported import load_model
    from agrivision.monitor.log import configure_log

    configure_log(0, None)
    trained = load_model(args.checkpoint)
    samples = find_samples(trained, args.data and Path(args.data), args.split, args.tiles)
    for line in export(trained, Path(args.out), args.format, samples).lines():
        say(line)
    return ExitCode.DONE


def _add_checkpoint(parser: _Parser) -> None:
    parser.add_argument("--checkpoint", type=str, required=True, help="run directory or checkpoint")
    parser.add_argument("--batch_size", type=int, default=8, help="tiles in one forward pass")
    _add_network(parser)


def _add_network(parser: _Parser) -> None:
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
    "export": ("a trained network to one file: safetensors, torch.export or ONNX", _export),
}
