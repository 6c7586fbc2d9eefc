"""`agrivision models`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agrivision.commands.parsing import Command, Parser, add_json, make_parser, names
from agrivision.errors import BadInput, ExitCode

if TYPE_CHECKING:
    import torch

    from agrivision.config import ModelConfig
    from agrivision.model.measure import Size, Speed

_SUMMARY = "how large networks are, what they compute, how fast they are here"
_EXAMPLES = [
    "",
    "--encoders resnet34,convnext_tiny --bands 5",
    "--config configs/demo.yaml --tile 256 --batch 8",
    "--list 'convnext*'",
]
_WIDTHS = (16, 32, 64)
_ENCODERS = ("mobilenetv3_large_100", "resnet34", "efficientnet_b3", "convnext_tiny")
_DECODER = 32  # channels of the encoders' way up at full resolution

Network = tuple[str, "ModelConfig"]


def _parser() -> Parser:
    made = make_parser("models", _SUMMARY, _EXAMPLES)
    made.add_argument("--config", type=str, default=None, help="YAML: measure its network only")
    made.add_argument(
        "--encoders", type=str, default=None, help="models of timm, with commas; default: a few"
    )
    made.add_argument("--tile", type=int, default=512, help="side of the images in pixels")
    made.add_argument(
        "--bands", type=int, default=4, help="of the images; a configuration's indices are added"
    )
    made.add_argument("--classes", type=int, default=9, help="of the logits")
    made.add_argument("--batch", type=int, default=1, help="images at once")
    made.add_argument("--device", type=str, default=None, help="default: the GPU where there is one")
    made.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network")
    made.add_argument("--no-speed", action="store_true", help="count only, run nothing")
    made.add_argument(
        "--list",
        type=str,
        default=None,
        help="instead: the models of timm like this pattern that can be encoders; each is tried",
    )
    add_json(made, "the table, or the list,")
    return made


def _run(argv: list[str]) -> ExitCode:
    args = _parser().parse_args(argv)
    for name in ("tile", "bands", "classes", "batch"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name} is {getattr(args, name)}: give at least 1")
    if args.config and args.encoders is not None:
        raise BadInput("--config names its own encoder: give it or --encoders")
    if args.list is not None:
        return _list(args.list, args.json)
    from agrivision.console import say, write_json
    from agrivision.monitor.progress import progress

    networks, bands = _networks(args.config, args.encoders, args.bands)
    device = None if args.no_speed else _device(args.device)
    rows: list[dict[str, Any]] = []
    with progress("measuring", unit="network", show=device is not None) as bar:
        bar.total(len(networks))
        for name, config in networks:
            size, speed = _measured(config, bands, device, args)
            rows.append(_row(name, size, speed))
            bar.advance(1)
    _print(rows, with_speed=device is not None)
    for line in _notes(bands, device, args):
        say(line)
    if args.json:
        about = {key: getattr(args, key) for key in ("tile", "classes", "batch", "precision")}
        head = {"device": None if device is None else str(device), "bands": bands, **about}
        write_json(Path(args.json), {**head, "networks": rows})
    return ExitCode.DONE


def _networks(file: str | None, encoders: str | None, bands: int) -> tuple[list[Network], int]:
    """What is measured, and for how many channels."""
    from agrivision.config import ModelConfig
    from agrivision.options import read_config

    if file is not None:
        config = read_config(Path(file))
        return [(Path(file).name, config.model)], bands + len(config.data.index_names)
    wanted = names(encoders) if encoders is not None else _ENCODERS if find_spec("timm") else ()
    made: list[Network] = []
    for width in _WIDTHS:
        made.append((f"UNet-{width}", ModelConfig(base_channels=width)))
        made.append((f"UNet-{width} residual", ModelConfig(base_channels=width, block="residual")))
    return made + [(name, ModelConfig(encoder=name, base_channels=_DECODER)) for name in wanted], bands


def _device(name: str | None) -> torch.device:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise BadInput(f"--device is {name!r}, which cannot be used here: {reason}") from None
    return device


def _measured(
    config: ModelConfig, bands: int, device: torch.device | None, args: Any
) -> tuple[Size, Speed | None]:
    """The size of a network and its speed; no speed where none is wanted, or the GPU is too small."""
    import torch

    from agrivision.model.measure import size_of, speed_of

    size = size_of(config, bands, args.classes, args.tile)
    if device is None:
        return size, None
    try:
        speed = speed_of(
            config,
            bands,
            args.classes,
            size.side,
            batch=args.batch,
            device=device,
            precision=args.precision,
        )
    except torch.OutOfMemoryError:
        return size, None
    return size, speed


def _row(name: str, size: Size, speed: Speed | None) -> dict[str, Any]:
    return {
        "network": name,
        "parameters": size.parameters,
        "weight_bytes": size.weight_bytes,
        "flop": size.flop,
        "side": size.side,
        "predict_images_per_second": None if speed is None else speed.predict,
        "train_images_per_second": None if speed is None else speed.train,
        "peak_bytes": None if speed is None else speed.peak_bytes,
    }


def _print(rows: Sequence[dict[str, Any]], *, with_speed: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from agrivision.console import is_watched

    on_gpu = any(row["peak_bytes"] is not None for row in rows)
    columns = ["network", "M parameters", "MB", "GFLOP"]
    columns += ["predict/s", "train/s"] if with_speed else []
    columns += ["peak GB"] if on_gpu else []
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name == "network" else "right", no_wrap=True)
    for row in rows:
        counts = (row["parameters"] / 1e6, row["weight_bytes"] / 1e6, row["flop"] / 1e9)
        cells = [f"{counts[0]:.2f}", f"{counts[1]:.1f}", f"{counts[2]:.1f}"]
        speeds = ("predict", "train") if with_speed else ()
        cells += [_number(row[f"{kind}_images_per_second"]) for kind in speeds]
        if on_gpu:
            cells.append(_number(row["peak_bytes"] and row["peak_bytes"] / 1e9))
        table.add_row(row["network"], *cells)
    seen = is_watched()
    # Names in files and of timm are printed as they are: no marks, no colours.
    Console(width=None if seen else 120, force_terminal=seen, markup=False).print(table)


def _number(value: float | None) -> str:
    return "no memory" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _notes(bands: int, device: torch.device | None, args: Any) -> Iterator[str]:
    """What the columns are."""
    yield (
        f"images of {args.tile} x {args.tile} pixels with {bands} channels, {args.classes} classes;"
        " 1 GFLOP = 10^9 floating-point operations of one image forward, a multiply-add counted as two"
    )
    if device is not None:
        import torch

        where = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else f" {where}"
        yield (
            f"images a second on {device}{threads}, {args.precision}, {args.batch} at once; train is"
            " forward and backward"
        )


def _list(pattern: str, file: str | None) -> ExitCode:
    from agrivision.console import say, write_json
    from agrivision.model.encoders import list_encoders

    found: list[dict[str, Any]] = []
    for name, unit in list_encoders(pattern):
        found.append({"encoder": name, "multiple": unit})
        say(f"{name:44} sides are multiples of {unit}")
    if not found:
        raise BadInput(f"timm has no encoder like {pattern!r}: try 'resnet*'")
    if file is not None:
        write_json(Path(file), {"encoders": found})
    return ExitCode.DONE


COMMAND = Command(summary=_SUMMARY, parser=_parser, run=_run)
