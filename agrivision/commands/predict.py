"""`agrivision predict`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from agrivision.commands.parsing import (
    PART_HELP,
    SYMMETRIES_HELP,
    Command,
    Parser,
    add_allow_vrt,
    add_network,
    add_postprocess,
    make_parser,
    names,
)
from agrivision.errors import ExitCode
from agrivision.training.preemption import StopRequest

if TYPE_CHECKING:
    from agrivision.inference.predict import PredictOptions

_SUMMARY = "tiles and scenes to class-id maps"
_EXAMPLES = [
    "--checkpoint runs/farm new_scenes/ --out maps",
    "--checkpoint runs/farm scene.tif --out maps --polygons --smallest 100 --fields fields.gpkg",
    "--checkpoint runs/first data/av2021 --split test --out submission",
]


def _parser() -> Parser:
    made = make_parser("predict", _SUMMARY, _EXAMPLES)
    made.add_argument(
        "--checkpoint",
        type=str,
        action="append",
        required=True,
        help="run directory, checkpoint or exported network; given several times, they are averaged",
    )
    made.add_argument(
        "--batch_size", type=int, default=None, help="tiles or windows in one forward pass"
    )
    add_network(made)
    made.add_argument(
        "inputs",
        type=str,
        nargs="+",
        help="data set, Agriculture-Vision folder, scenes, folder of scenes, list of paths (.txt)",
    )
    made.add_argument("--out", type=str, required=True, help="folder for the maps")
    made.add_argument("--split", type=str, default=None, help="of a data set; default: all")
    _add_scene_options(made)
    _add_product_options(made)
    add_postprocess(made)
    add_allow_vrt(made)
    made.add_argument("--part", type=str, default="0/1", help=PART_HELP)
    return made


def _run(argv: list[str]) -> ExitCode:
    args = _parser().parse_args(argv)
    stop = StopRequest().listen()
    from agrivision.console import say
    from agrivision.inference.exported import load_model
    from agrivision.inference.postprocessing import find_postprocessing
    from agrivision.inference.predict import predict
    from agrivision.inference.ranks import own_share
    from agrivision.monitor.log import configure_log
    from agrivision.monitor.progress import progress
    from agrivision.part import Part
    from agrivision.world import World

    world = World.from_environment()
    configure_log(world.rank, None)
    part, device = own_share(Part.parse(args.part), world)
    options = _options(args)
    networks = [load_model(Path(path), device) for path in args.checkpoint]
    if args.postprocess is not None:
        given = Path(args.postprocess) if args.postprocess else None
        after = find_postprocessing(networks, given, symmetries=options.symmetries)
        options = replace(options, postprocessing=after)
    inputs = [Path(path) for path in args.inputs]
    with progress("predicting", unit="tile", show=world.is_main) as bar:
        summary = predict(
            networks,
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


def _options(args: Namespace) -> PredictOptions:
    from agrivision.inference.predict import PredictOptions
    from agrivision.inference.products import Products
    from agrivision.inference.scene import Taking

    return PredictOptions(
        split=args.split,
        batch_size=args.batch_size,
        threads=args.threads,
        precision=args.precision,
        tile=args.tile,
        margin=args.margin,
        overlap=args.overlap,
        symmetries=args.symmetries,
        taking=Taking(
            bands=names(args.bands),
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


def _add_scene_options(parser: Parser) -> None:
    """How a scene is cut, and how it is taken where it is not like the tiles of the training."""
    parser.add_argument("--tile", type=int, default=None, help="side of a window on a scene, in pixels")
    parser.add_argument("--margin", type=int, default=None, help="read around each window, in pixels")
    parser.add_argument(
        "--overlap", type=int, default=None, help="shared by neighbouring windows, in pixels"
    )
    parser.add_argument("--symmetries", action="store_true", help=SYMMETRIES_HELP)
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


def _add_product_options(parser: Parser) -> None:
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


COMMAND = Command(summary=_SUMMARY, parser=_parser, run=_run)
