"""The score of a trained run on a split, on one process or on many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.distributed import connected, pick_device
from agrivision.errors import BadInput, Interrupted
from agrivision.evaluation.evaluate import evaluate
from agrivision.inference.exported import load_model
from agrivision.inference.trained import TrainedModel
from agrivision.model.precision import Precision
from agrivision.monitor.log import configure_log
from agrivision.monitor.progress import progress
from agrivision.part import Stop, never
from agrivision.world import World


def evaluate_run(
    checkpoint: Path,
    data: Path,
    split: str,
    *,
    batch_size: int = 8,
    threads: int = 2,
    precision: Precision = "fp32",
    world: World | None = None,
    stop: Stop = never,
) -> dict[str, Any] | None:
    """Score a run on a split of a data set.

    Args:
        checkpoint: a run directory, a checkpoint or a file in one, or an exported network.
        data: a prepared data set.
        split: with labels.
        batch_size: tiles in one forward pass.
        threads: decoding threads of each rank.
        precision: of the forward pass.
        world: this process among the ranks; None reads the environment.
        stop: asked between batches; once true on any rank, all leave within a few batches.

    Returns:
        What `Evaluation.to_dict` gives, and `checkpoint`, `step` and `split`, on rank 0; None on the
        others.

    Raises:
        Interrupted: a rank was asked to stop; nothing is kept.
        AgrivisionError: in one line, what is wrong and what to do.
    """
    if batch_size < 1 or threads < 0:
        raise BadInput(f"batch_size is {batch_size} and threads {threads}: at least 1 and at least 0")
    world = world or World.from_environment()
    configure_log(world.rank, None)
    device = pick_device(world)
    schema = Schema.read(data)
    schema.split(split, labelled=True)
    reader = SplitReader(data, schema, split)
    trained = load_model(checkpoint, device)
    check_fit(trained, schema, data)
    share = -(-len(reader) // world.size)
    with (
        connected(world, device, stop=stop) as ranks,
        progress("evaluating", share, unit="tile", show=world.is_main) as bar,
    ):
        found = evaluate(
            trained.module,
            reader,
            trained.normaliser,
            ranks,
            device,
            batch_size=batch_size,
            threads=threads,
            precision=precision,
            stop=stop,
            report=bar.advance,
        )
    if found is None:
        raise Interrupted(
            "stopped before the evaluation was done: the same command begins it anew; if that was the"
            " time limit, give it more time or more ranks"
        )
    if not world.is_main:
        return None
    return found.to_dict() | {"checkpoint": str(trained.folder), "step": trained.step, "split": split}


def check_fit(trained: TrainedModel, schema: Schema, data: Path) -> None:
    """A score over other bands or other classes would be a number without a meaning.

    Raises:
        BadInput: they are others.
    """
    description = trained.description
    if description.bands != schema.bands:
        raise BadInput(
            f"{data} has the bands {', '.join(schema.bands)}; the run was trained on"
            f" {', '.join(description.bands)}"
        )
    if description.dtype != schema.dtype:
        raise BadInput(
            f"{data} holds {schema.dtype} pixels; the run was trained on {description.dtype}"
        )
    if description.classes != schema.classes:
        raise BadInput(
            f"{data} has {len(schema.classes)} classes ({', '.join(schema.classes)}); the run was"
            f" trained on {len(description.classes)} ({', '.join(description.classes)})"
        )
