"""`make demo`: everything from invented fields to scored maps, on this machine, in minutes.

Each step is the command that a user would type; it is printed before it runs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from agrivision.config import Config
from agrivision.data.loader import evaluation_batches
from agrivision.data.order import Order
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.errors import ExitCode
from agrivision.evaluation.confusion import confusion_matrix, scores
from agrivision.inference.trained import load_run
from agrivision.monitor.pictures import save_png
from agrivision.options import read_config
from agrivision.rundir import RunDirectory
from agrivision.training.showcase import draw_panels
from agrivision.world import World

_RANKS = 2
_POLL_SECONDS = 0.2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo in a folder, which is made anew."""
    parser = argparse.ArgumentParser(prog="python -m launch.demo", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for everything that the demo makes")
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    args = parser.parse_args(argv)
    begin = time.monotonic()
    _demonstrate(args.out, args.config)
    _say(f"all of it took {time.monotonic() - begin:.0f} s")
    return 0


def _demonstrate(out: Path, file: Path) -> None:
    _clear(out)
    fields, dataset, run_dir = out / "fields", out / "dataset", out / "run"
    _agrivision("synthesize", str(fields), "--size", "128")  # a quarter of the pixels, and of the time
    _agrivision("prepare", str(fields), str(dataset))
    _agrivision("inspect", str(dataset), "--verify")
    config, schema, run = read_config(file), Schema.read(dataset), RunDirectory(run_dir)
    data, checkpoint = ["--data", str(dataset)], ["--checkpoint", str(run_dir)]
    train = ["train", "--config", str(file), "--data.path", str(dataset), "--run_dir", str(run_dir)]
    train = [sys.executable, "-m", "launch.local", "--ranks", str(_RANKS), *train]
    _stop_half_way(train, run, _total_steps(config, schema))
    _run(train)
    _check_samples(run, schema, config.training.epochs)
    _agrivision("evaluate", *checkpoint, *data, "--json", str(out / "score.json"))
    _agrivision("predict", *checkpoint, str(dataset), "--split", "val", "--out", str(out / "maps"))
    _agrivision("score", str(out / "maps"), *data)
    _draw(run_dir, dataset, out / "pictures")
    _tell(out, dataset)


def _clear(out: Path) -> None:
    """Remove what an earlier demo made, and nothing that it did not make."""
    mark = out / ".agrivision-demo"
    if out.exists():
        if not mark.is_file():
            sys.exit(f"{out} was not made by the demo: move it, or give another folder")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    mark.touch()


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _agrivision(*arguments: str) -> None:
    _run([sys.executable, "-m", "agrivision", *arguments])


def _show(command: Sequence[str]) -> None:
    _say(f"\n$ {shlex.join(['python', *command[1:]])}")


def _run(command: Sequence[str]) -> None:
    _show(command)
    done = subprocess.run(list(command), check=False)
    if done.returncode != 0:
        sys.exit(f"the demo ends here: that command returned {done.returncode}")


def _stop_half_way(command: Sequence[str], run: RunDirectory, steps: int) -> None:
    """Start training, wait until half of it is done, send SIGTERM as a scheduler would."""
    _show(command)
    process = subprocess.Popen(list(command))
    while process.poll() is None and _last_step(run) < steps // 2:
        time.sleep(_POLL_SECONDS)
    _say("… SIGTERM, as from a scheduler that needs the machine")
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    if code != ExitCode.STOPPED:
        sys.exit(f"training returned {code} instead of {int(ExitCode.STOPPED)} (checkpointed)")
    _say(f"… exit code {code}: checkpointed, wants another turn; the same command goes on:")


def _total_steps(config: Config, schema: Schema) -> int:
    order = Order(
        size=schema.split(config.data.train_split).tiles,
        batch_size=config.data.batch_size,
        seed=config.seed,
    )
    return order.steps_per_epoch * config.training.epochs


def _last_step(run: RunDirectory) -> int:
    """The last step in metrics.jsonl, 0 before there is one."""
    if not run.metrics.is_file():
        return 0
    lines = [line for line in run.metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _check_samples(run: RunDirectory, schema: Schema, epochs: int) -> None:
    """Over both attempts and both ranks, every epoch saw every tile exactly once."""
    rows = [
        json.loads(line)
        for file in sorted(run.log.glob("samples-*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    seen = Counter((row["epoch"], key) for row in rows for key in row["keys"])
    tiles = schema.split("train").tiles
    if len(seen) != epochs * tiles or set(seen.values()) != {1}:
        sys.exit("the interrupted run did not see every tile exactly once an epoch")
    _say(f"every one of {tiles} tiles was seen exactly once in each of {epochs} epochs")


def _draw(run_dir: Path, dataset: Path, folder: Path) -> None:
    """RGB, NIR-R-G, truth and prediction of some validation tiles, as PNG files."""
    trained = load_run(run_dir)
    reader = SplitReader(dataset, Schema.read(dataset), "val")
    folder.mkdir()
    normaliser = trained.description.normaliser
    panels = draw_panels(trained.module, reader, normaliser, trained.device, count=6)
    for tag, picture in panels.items():
        save_png(folder / f"{Path(tag).name}.png", picture)


def _background_miou(dataset: Path) -> float:
    """The score of always saying background."""
    schema = Schema.read(dataset)
    reader, classes = SplitReader(dataset, schema, "val"), schema.classes
    matrix = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    for batch in evaluation_batches(reader, World(), batch_size=8, threads=2):
        labels = batch.pixels.label_bits()
        matrix += confusion_matrix(torch.zeros_like(labels), labels, len(classes))
    miou = scores(matrix, classes).miou
    assert miou is not None
    return miou


def _tell(out: Path, dataset: Path) -> None:
    miou, background = json.loads((out / "score.json").read_text())["miou"], _background_miou(dataset)
    _say("")
    _say(f"mIoU:        {miou:.3f}, {miou / background:.1f} times that of always saying background")
    _say(f"pictures:    {out / 'pictures'}")
    _say(f"maps:        {out / 'maps'}")
    _say(f"TensorBoard: agrivision tensorboard {out / 'run'}")


if __name__ == "__main__":
    sys.exit(main())
