"""The loop: batches in, better weights out, and a moment between two steps when everything is whole.

Ranks agree once a step, in one small sum: the loss, whether somebody asked to stop, whether a rank has
met a damaged tile in its next batch. What follows from it (skip, isolate, save, leave) is then the same
decision everywhere. On a GPU the losses are summed there, and the program waits for it only when it
looks at them: whether a step counts is decided on the device.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from agrivision.config import Config
from agrivision.data.augment import Augment
from agrivision.data.fields import FieldStatistics, of_tiles
from agrivision.data.jpeg_pixels import JpegPixels
from agrivision.data.loader import Batch, TrainLoader
from agrivision.data.order import Stream, generator
from agrivision.data.quarantine import Damage, Quarantine
from agrivision.distributed import Ranks, peers_may_fail
from agrivision.errors import AgrivisionError, CheckpointError, DatasetError, StorageError
from agrivision.model.losses import LabelSetLoss, SampleLosses
from agrivision.model.precision import autocast
from agrivision.phase import WAITING, phase
from agrivision.training.ema import wanted_average
from agrivision.training.invariant import CanonicalGradients
from agrivision.training.optimizer import Optimizer
from agrivision.training.preemption import StopRequest
from agrivision.training.schedule import learning_rate, peak_rate
from agrivision.training.tally import Tally
from agrivision.training.upload import Upload


@dataclass(kw_only=True)
class Progress:
    """How far a run is.

    Attributes:
        step: optimiser steps done, skipped ones included.
        cursor: samples consumed by all ranks together.
    """

    step: int = 0
    cursor: int = 0


@dataclass(frozen=True, kw_only=True)
class Step:
    """What all ranks know of a step.

    Attributes:
        number: 1 for the first of the run.
        batch: this rank's part.
        stop: somebody asked to stop, or it is time.
        save: rank 0 wants a checkpoint (its clock says so).
        trouble: why the next step cannot be done: too much of the data is damaged, or out of reach.
        learning_rate: of this step.
    """

    number: int
    batch: Batch
    stop: bool
    save: bool
    trouble: AgrivisionError | None
    learning_rate: float


class Trainer:
    """Runs optimiser steps.

    Args:
        config: of the run.
        model: on its device, without a wrapper.
        loss: of label sets, on the same device.
        augment: of the training samples.
        loader: of the training split.
        ranks: connected.
        device: of this rank.
        fields: of the training split, where pixels are seen relative to their field.

    Attributes:
        progress: how far the run is.
        tally: losses and skipped steps.
        total_steps: of the whole run; set it before the first step.
        model: without a wrapper.
        loss: of label sets, as it was given.
        augment: of the training samples, likewise.
        optimizer: of its parameters.
        average: of its weights, None where the configuration wants none.
        quarantine: the training tiles that the run goes on without.
        isolated: called with tiles that were just put there, and the first step without them.
        before_change: called before weights, the optimiser's moments or the average change, so that
            somebody who still copies them can be waited for. Between two calls a step only computes
            gradients, and changes nothing but BatchNorm's running statistics.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        loss: LabelSetLoss,
        augment: Augment,
        *,
        loader: TrainLoader,
        ranks: Ranks,
        device: torch.device,
        fields: FieldStatistics | None = None,
    ) -> None:
        training = config.training
        self.progress = Progress()
        self.tally = Tally(device, loss.parts)
        self.total_steps = 0
        self.model, self.loss = model, loss
        self.optimizer = Optimizer(model, config.optimizer)
        self.average = wanted_average(model, training)
        self.quarantine = Quarantine(loader.reader, config.data.max_damaged_share)
        self.isolated: Callable[[Sequence[Damage], int], None] = lambda *_: None
        self.before_change: Callable[[], None] = lambda: None
        self._peak_rate = peak_rate(config.optimizer, config.data.batch_size)
        self._config, self.augment, self._loader = config, augment, loader
        self._fields = fields
        self._ranks, self._device, self._upload = ranks, device, Upload(device)
        self._places = loader.order.share(ranks.world.rank, ranks.world.size)
        self._micro = training.micro_batch_size or len(range(config.data.batch_size)[self._places])
        loader.isolate(self.quarantine, self._micro)
        self._canonical: CanonicalGradients | None = None
        if training.invariant:
            ranks.take_from_main(tensor.detach() for tensor in (*model.parameters(), *model.buffers()))
            self._canonical = CanonicalGradients(
                model, ranks, micro_batches=loader.order.units, losses=len(loss.parts)
            )
        self._wrapped = model if training.invariant else _wrap(model, ranks, device, self._how())
        self._network: Callable[..., Any] = self._wrapped
        self._loss: Callable[..., SampleLosses] = loss
        if training.compile:
            self._network = torch.compile(self._wrapped, dynamic=False)
            self._loss = torch.compile(loss, dynamic=False)
        self._statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated: the average of the weights where there is one."""
        return self.model if self.average is None else self.average.model

    def states(self) -> dict[str, Mapping[str, Any]]:
        """Everything that must survive, by name."""
        states: dict[str, Mapping[str, Any]] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": vars(self.progress)
            | self.tally.state_dict()
            | {"quarantine": self.quarantine.rows},
        }
        return states if self.average is None else states | {"ema": self.average.state_dict()}

    def load_states(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over the states of a checkpoint.

        Raises:
            CheckpointError: it belongs to another model or another optimiser.
        """
        self.before_change()
        try:
            self.model.load_state_dict(states["model"])
            if self.average is not None:
                # A run that switches the average on begins it with the weights.
                self.average.load_state_dict(states.get("ema", states["model"]))
            self.optimizer.load_state_dict(states["optimizer"])
            progress = states["progress"]
            self.tally.load_state_dict(progress)
            self.progress.step, self.progress.cursor = progress["step"], progress["cursor"]
            self.quarantine.load(progress.get("quarantine", ()))  # older versions kept none
        except KeyError as error:
            raise CheckpointError(f"the checkpoint has no state {error}") from None
        except RuntimeError as error:  # torch lists every tensor that does not fit; one is enough
            lines = str(error).strip().splitlines()
            raise CheckpointError(
                f"the checkpoint is of another model: {lines[min(1, len(lines) - 1)].strip()}"
            ) from None
        self._loader.seek(self.progress.cursor)

    def steps(self, stop: StopRequest, save_due: SaveClock) -> Iterator[Step]:
        """Train to the end of the run; between two steps the caller may save, evaluate or leave.

        Raises:
            DatasetError: too many tiles of the very first batch are damaged.
            StorageError: a rank can read none of it.
            PeerLost: another rank is gone.
        """
        if self.progress.step >= self.total_steps:
            return
        batch = self._fetch()
        if self._ranks.largest(int(bool(batch.found)))[0]:
            trouble = self._isolate(batch)
            if trouble is not None:
                raise trouble
        self._arrange_buckets(batch)
        while self.progress.step < self.total_steps:
            self.model.train()
            local = self._accumulate(batch)
            last = self.progress.step + 1 == self.total_steps
            following = batch if last else self._fetch()
            flags = (stop.made, save_due.passed(), not last and bool(following.found))
            losses, (stops, saves, damaged) = self._agree(local, flags)
            rate = self._finish(batch, losses)
            trouble = self._isolate(following) if damaged else None
            yield Step(
                number=self.progress.step,
                batch=batch,
                stop=stops > 0,
                save=saves > 0,
                trouble=trouble,
                learning_rate=rate,
            )
            batch = following

    def _how(self) -> _Exchange:
        training, order = self._config.training, self._loader.order
        largest = -(-order.units // self._ranks.world.size) * order.unit  # the same on all ranks
        return _Exchange(
            compression=training.gradient_compression,
            static=not training.compile and (training.micro_batch_size or largest) >= largest,
        )

    def _fetch(self) -> Batch:
        with phase("wait for data"):
            batch = self._loader.next_batch()
            try:
                return self._upload.send(batch)
            except DatasetError:
                if not isinstance(batch.pixels, JpegPixels):
                    raise
                failed = batch.pixels.undecodable(self._device)
                if not failed:
                    raise
                return self._upload.send(self._loader.without(batch, failed))

    def _isolate(self, batch: Batch) -> AgrivisionError | None:
        """Put what ranks have found in the coming step into quarantine; returns why that cannot be.

        What cannot be is not remembered either: with the data made whole, the run goes on as if nothing
        had been.
        """
        mine = {"cut_off": batch.cut_off, "found": [damage.to_dict() for damage in batch.found]}
        told = self._ranks.from_all(mine)
        found = [[Damage(**damage) for damage in rank["found"]] for rank in told]
        for rank, report in enumerate(told):
            if report["cut_off"]:
                return StorageError(
                    f"rank {rank} can read none of its tiles ({found[rank][0].why}): once the disk is"
                    " back, the same command goes on"
                )
        step = self.progress.step + 1
        try:
            new = self.quarantine.add((damage for damages in found for damage in damages), step)
        except DatasetError as refusal:
            return refusal
        self.isolated(new, step)
        return None

    def _arrange_buckets(self, batch: Batch) -> None:
        """Let DistributedDataParallel put gradients together as it will in every step of an attempt.

        It does so anew after its first backward passes. What travels together decides in which order
        the gradients of three or more ranks are added, and so a run that goes on would add those of its
        first steps in another order than the run that was never interrupted.
        """
        if not isinstance(self._wrapped, DistributedDataParallel):
            return
        self.model.train()
        before = [buffer.clone() for buffer in self.model.buffers()]
        self._upload.arrive(batch)
        images, labels = self._images(batch, list(self._parts(batch))[-1])
        for _ in range(2):  # of a static graph it learns the order in the second pass only
            how = autocast(self._device, self._config.training.precision)
            with phase("forward"), how, peers_may_fail():
                logits = self._network(images)
            with phase("backward"), peers_may_fail():
                self._loss(logits, labels).total.sum().backward()  # type: ignore[no-untyped-call]
            self.optimizer.zero_grad()
        for buffer, value in zip(self.model.buffers(), before, strict=True):
            buffer.copy_(value)

    def _accumulate(self, batch: Batch) -> torch.Tensor:
        """Gradients of this rank's part; returns the sums of the losses, in the order of `parts`.

        In the invariant mode both are those of all ranks.
        """
        self._before = [buffer.clone() for buffer in self._statistics]
        self.optimizer.zero_grad()
        self._upload.arrive(batch)
        parts = list(self._parts(batch))
        if self._canonical is not None:
            return self._accumulate_in_order(batch, parts, self._canonical)
        sums = torch.zeros(len(self.loss.parts), device=self._device)
        for part in parts:
            with self._unsynchronised(last=part is parts[-1]):
                sums += self._backward(batch, part)
        return sums

    def _accumulate_in_order(
        self, batch: Batch, parts: Sequence[slice], canonical: CanonicalGradients
    ) -> torch.Tensor:
        for index, part in zip(canonical.mine, parts, strict=True):
            canonical.begin()
            canonical.add(index, self._backward(batch, part))
        return canonical.finish()

    def _parts(self, batch: Batch) -> Iterator[slice]:
        """The micro-batches of this rank's part."""
        for start in range(0, len(batch.tiles), self._micro):
            yield slice(start, min(start + self._micro, len(batch.tiles)))

    def _backward(self, batch: Batch, part: slice) -> torch.Tensor:
        assert batch.whole is not None
        with phase("augment"):
            images, labels = self._images(batch, part)
        self._seed(part.start)
        with (
            phase("forward"),
            autocast(self._device, self._config.training.precision),
            peers_may_fail(),
        ):
            logits = self._network(images)
        with phase("loss"):
            losses = self._loss(logits, labels)
        counts = self._counts(batch, part)
        scale = self._scale / batch.whole.count
        with phase("backward"), peers_may_fail():
            ((losses.total * counts).sum() * scale).backward()  # type: ignore[no-untyped-call]
        return (self.loss.reported(losses).detach() * counts).sum(1)

    def _counts(self, batch: Batch, part: slice) -> torch.Tensor:
        """Which samples count, bool (samples of the part,).

        Those that only fill up the batch and those that are damaged have no weight, but keep the graph,
        the shapes and, in the loss, the denominators.
        """
        places = range(part.start, part.stop)
        counts = torch.arange(part.start, part.stop, device=self._device) < batch.count
        if batch.left_out.isdisjoint(places):
            return counts
        there = [place not in batch.left_out for place in places]
        return counts & torch.tensor(there, device=self._device)

    def _images(self, batch: Batch, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        assert batch.whole is not None
        pixels = batch.pixels.part(part)
        return self.augment(
            pixels.planes,
            pixels.labels,
            batch.whole.epoch,
            batch.samples[part],
            focus=[batch.focus.get(place) for place in range(part.start, part.stop)],
            statistics=of_tiles(self._fields, batch.tiles[part], self._device),
        )

    @property
    def _scale(self) -> int:
        """DDP averages over the ranks; the mean over the samples of all ranks is wanted."""
        return self._ranks.world.size if isinstance(self._wrapped, DistributedDataParallel) else 1

    def _seed(self, start: int) -> None:
        """Dropout depends on the step and the sample's place in the global batch, not on history."""
        place = self._places.start + start
        random = generator(self._config.seed, Stream.DROPOUT, self.progress.step, place)
        torch.manual_seed(int(random.integers(2**63)))

    def _unsynchronised(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Only the last micro-batch of a step sends gradients to the other ranks."""
        if last or not isinstance(self._wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._wrapped.no_sync()

    def _agree(
        self, local: torch.Tensor, flags: tuple[bool, ...]
    ) -> tuple[torch.Tensor, tuple[int, ...]]:
        """The losses summed over the ranks, float64, and on how many ranks each flag is up."""
        up = torch.tensor(flags, dtype=torch.float64)
        if self._canonical is not None:  # they are summed already
            losses, counts = local.double(), self._ranks.sum(up)
        elif self._device.type == "cpu":  # one message
            total = self._ranks.sum(torch.cat([local.double(), up]))
            losses, counts = total[: len(local)], total[len(local) :]
        else:  # flags travel between the programs, losses between the devices
            losses, counts = self._ranks.sum_in_place(local.double()), self._ranks.sum(up)
        return losses, tuple(int(count) for count in counts.tolist())

    def _finish(self, batch: Batch, losses: torch.Tensor) -> float:
        """Change the weights, unless the loss or the gradient is not finite; returns the rate."""
        assert batch.whole is not None
        progress = self.progress
        # Gradients are the same bits on all ranks by now, so this norm needs no agreement, and a loss
        # that is not finite on any rank has made it so.
        norm = self.optimizer.clip()
        good = self.tally.count(losses / batch.whole.count, norm, progress.step + 1)
        rate = self._learning_rate()
        self.before_change()
        with phase("optimiser"):
            self.optimizer.step(rate, good)
        for buffer, value in zip(self._statistics, self._before, strict=True):
            buffer.copy_(torch.where(good, buffer, value))  # they have seen what was not finite
        progress.step += 1
        progress.cursor = batch.whole.next_cursor
        if self.average is not None:
            self.average.update(self.model, progress.step, self.total_steps)
        return rate

    def _learning_rate(self) -> float:
        return learning_rate(
            self._config.schedule, self._peak_rate, self.progress.step, self.total_steps
        )


@dataclass
class SaveClock:
    """Says when it is time to save because of the minutes that passed; only rank 0's says so.

    Attributes:
        minutes: between two saves, None for never.
        last: `time.monotonic()` of the last save.
    """

    minutes: float | None
    last: float = field(default_factory=time.monotonic)

    def passed(self) -> bool:
        """Whether the time is over."""
        return self.minutes is not None and time.monotonic() - self.last >= 60 * self.minutes

    def restart(self) -> None:
        """A save was just made."""
        self.last = time.monotonic()


@dataclass(frozen=True, kw_only=True)
class _Exchange:
    """How gradients travel.

    Attributes:
        compression: see `TrainingConfig.gradient_compression`.
        static: each step runs the network once, and as it is.
    """

    compression: Literal["none", "bf16", "fp16"]
    static: bool


_SYNC_BUFFERS = (
    "forward_sync_buffers"  # its name since torch 2.15
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
_HOOKS = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}


def _wrap(model: nn.Module, ranks: Ranks, device: torch.device, how: _Exchange) -> nn.Module:
    if ranks.world.size == 1:
        return model
    keep: dict[str, Any] = {_SYNC_BUFFERS: False}
    with phase(WAITING), peers_may_fail():
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            static_graph=how.static,
            # Nothing is computed from running statistics while training. Those of rank 0 are saved and
            # evaluated, so the others need not hear of them at every step.
            **keep,
        )
    if how.compression != "none":
        wrapped.register_comm_hook(state=None, hook=_HOOKS[how.compression])
    return wrapped
