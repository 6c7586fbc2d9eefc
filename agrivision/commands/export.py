"""`agrivision export`."""

from __future__ import annotations

from pathlib import Path

from agrivision.commands.parsing import Command, Parser, make_parser
from agrivision.errors import ExitCode

_SUMMARY = "a trained network to one file: safetensors, torch.export or ONNX"
_EXAMPLES = [
    "--checkpoint runs/farm --format onnx --out farm.onnx",
]


def _parser() -> Parser:
    made = make_parser("export", _SUMMARY, _EXAMPLES)
    made.add_argument("--checkpoint", type=str, required=True, help="run directory or checkpoint")
    made.add_argument(
        "--format", choices=("safetensors", "torch-export", "onnx"), required=True, help="of the file"
    )
    made.add_argument("--out", type=str, required=True, help="file: .safetensors, .pt2 or .onnx")
    made.add_argument("--data", type=str, default=None, help="to compare on; default: the run's own")
    made.add_argument("--split", type=str, default=None, help="of the data set; default: val")
    made.add_argument("--tiles", type=int, default=8, help="tiles to compare on")
    return made


def _run(argv: list[str]) -> ExitCode:
    args = _parser().parse_args(argv)
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


COMMAND = Command(summary=_SUMMARY, parser=_parser, run=_run)
