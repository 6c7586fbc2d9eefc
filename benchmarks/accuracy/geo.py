"""torchgeo's SemanticSegmentationTask under lightning's Trainer, with its own optimiser and schedule.

The task lowers its rate when the loss on the validation split no longer falls, for which it looks at as
many validation crops as a tenth of an epoch has.
"""

from __future__ import annotations

import time
import warnings
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.accuracy.outcome import Outcome
from benchmarks.accuracy.plain import Normalise, scored
from benchmarks.accuracy.task import TRAIN, VAL, Task
from benchmarks.accuracy.tiles import IGNORED, Crops, read


def torchgeo(task: Task, seed: int) -> Outcome:
    """Its UNet with the smallest ResNet, from random weights."""
    warnings.simplefilter("ignore")  # lightning's, about workers and loggers
    from lightning.pytorch import Trainer, seed_everything
    from torchgeo.trainers import SemanticSegmentationTask

    seed_everything(seed, verbose=False)
    begin, budget, schema = time.perf_counter(), task.budget, task.schema
    module = SemanticSegmentationTask(
        model="unet",
        backbone="resnet18",
        in_channels=len(schema.bands),
        num_classes=len(schema.classes),
        loss="ce",
        ignore_index=IGNORED,
    ).to(memory_format=torch.channels_last)
    normalise = Normalise(task)

    def collated(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        images, masks = (torch.stack([one[name] for one in samples]) for name in ("image", "mask"))
        return {"image": normalise(images), "mask": masks}

    def loader(split: str) -> DataLoader[Any]:
        crops = Crops(read(task.dataset, split), budget.crop)
        return DataLoader(crops, budget.batch, shuffle=split == TRAIN, collate_fn=collated)

    train, limit = loader(TRAIN), budget.seconds
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        max_steps=budget.steps_of(budget.batch, budget.crop) if limit is None else -1,
        max_time=None if limit is None else timedelta(seconds=limit),
        limit_val_batches=max(1, len(train) // 10),
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, train, loader(VAL))
    seconds = time.perf_counter() - begin
    return scored(task, module.model, normalise, steps=trainer.global_step, seconds=seconds)
