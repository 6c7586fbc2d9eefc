"""T1: the step against a plain fp32 loop, against segmentation-models-pytorch, and its own kernels.

All contestants live in one process and take turns, so that each round sees the same machine. Data is
ready: this is about the step alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from agrivision.config import Config
from benchmarks.common import Report, interleaved, missing, parser, say
from benchmarks.training import Loop, bare, config, contiguous, network, plain, rate, trainer

SMP = "segmentation_models_pytorch"
_WARM_UP = 2


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the report."""
    options = parser(__doc__, rounds=7)
    options.add_argument(
        "--base", type=int, default=32, help="channels of the first level (default 32)"
    )
    options.add_argument("--side", type=int, default=256, help="of the images in pixels (default 256)")
    options.add_argument("--batch", type=int, default=4, help="images a step (default 4)")
    options.add_argument("--steps", type=int, default=2, help="steps a turn (default 2)")
    options.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = options.parse_args(argv)
    if args.quick:
        args.base, args.side, args.batch, args.rounds, args.steps = 4, 32, 2, 2, 1
        args.no_compile = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report("T1: the step", args, packages=("segmentation-models-pytorch", "timm"))
    ours = config(base=args.base, side=args.side, batch=args.batch)
    bfloat = device.type == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if not bfloat:
        report.notes.append("bf16 is left out: this processor has no instructions for it")
    steps = _contestants(
        ours, device, args.side, args.batch, compiled=not args.no_compile, bfloat=bfloat
    )
    if missing(SMP):
        report.left_out("segmentation-models-pytorch's UNet", missing(SMP))
    else:
        steps["plain loop, smp.Unet (resnet34)"] = _smp(device, args.side, args.batch)
    for name, step in steps.items():
        say(f"warming up: {name}")
        for _ in range(_WARM_UP):
            step()
    rates = interleaved(
        args.rounds,
        {name: partial(rate, step, args.steps, args.batch, device) for name, step in steps.items()},
    )
    base = rates["plain loop, fp32"]
    report.header = ("loop", "images/s", "times plain fp32", "spread, %")
    report.rows += [(name, value, value / base, 100 * value.spread) for name, value in rates.items()]
    best = max((name for name in rates if name.startswith("ours")), key=lambda name: rates[name])
    report.goal("T1", f"{best} against the plain fp32 loop", rates[best] / base, at_least=2.4)
    for name in rates:
        if "smp" in name:
            report.goal("T1", f"{best} against {name}", rates[best] / rates[name], at_least=2.0)
    for name in rates:
        if name.startswith("bare"):
            mine = name.replace("bare", "ours")
            # Of each round by itself: neighbours in time share the machine's moods.
            shares = sorted(
                b / o - 1 for b, o in zip(rates[name].values, rates[mine].values, strict=True)
            )
            median = shares[len(shares) // 2]
            report.goal("T1", f"overhead of {mine} over its kernels", 100 * median, at_most=2, unit="%")
    report.notes.append(
        f"UNet-{args.base}, {args.side} x {args.side} pixels, batch {args.batch}, {device.type},"
        f" {torch.get_num_threads()} threads; `ours` computes cross-entropy on label sets and Dice,"
        " augments and clips; the plain loops compute cross-entropy alone on images that are ready"
    )
    report.finish()


def _contestants(
    ours: Config, device: torch.device, side: int, batch: int, *, compiled: bool, bfloat: bool
) -> dict[str, Callable[[], None]]:
    def how(**changes: object) -> Config:
        return replace(ours, training=replace(ours.training, **changes))  # type: ignore[arg-type]

    fp32, bf16 = how(deterministic=False), how(deterministic=False, precision="bf16")
    steps: dict[str, Callable[[], None]] = {
        "plain loop, fp32": plain(network(contiguous(ours), device), device, side=side, batch=batch),
        "bare, fp32": bare(fp32, device),
        "ours, fp32": Loop(trainer(fp32, device)),
    }
    if bfloat:
        steps |= {"bare, bf16": bare(bf16, device), "ours, bf16": Loop(trainer(bf16, device))}
    if compiled:
        for name in ("fp32", "bf16") if bfloat else ("fp32",):
            fused = how(deterministic=False, precision=name, compile=True)
            steps[f"ours, {name}, compiled"] = Loop(trainer(fused, device))
    return steps


def _smp(device: torch.device, side: int, batch: int) -> Callable[[], None]:
    import segmentation_models_pytorch as smp

    model = smp.Unet("resnet34", encoder_weights=None, in_channels=4, classes=9)
    return plain(model, device, side=side, batch=batch)


if __name__ == "__main__":
    main()
