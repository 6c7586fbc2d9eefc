"""The process group of a run, and the few things that ranks agree on.

Control messages (flags, small JSON) travel over gloo between CPUs, also where gradients travel over
NCCL, so that agreeing never waits for a GPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from agrivision.errors import ConfigurationError, PeerLost
from agrivision.phase import WAITING, phase
from agrivision.rendezvous import Meeting, meeting, meeting_file
from agrivision.world import World

_TIMEOUT = timedelta(minutes=30)  # a rank may wait that long for another one's evaluation or save
_FOREVER = timedelta(days=365)

# gloo raises plain RuntimeErrors; only their text tells them from others.
_TRANSPORT_WORDS = ("gloo", "connection", "nccl", "timed out", "peer")


def pick_device(world: World) -> torch.device:
    """This rank's GPU, or the CPU where there is none.

    Raises:
        ConfigurationError: more ranks on this node than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 1:  # the launcher shows each rank its own
        index = 0
    elif world.local_rank < visible:
        index = world.local_rank
    else:
        raise ConfigurationError(
            f"{world.local_size} ranks on this node, but {visible} GPUs: start one rank for each GPU"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def waiting_time(stall_minutes: float | None) -> timedelta:
    """How long a collective may take before it fails: longer than until a watchdog names who hangs.

    Args:
        stall_minutes: of the watchdog; None where there is none, and nobody wants to be ended.
    """
    return _FOREVER if stall_minutes is None else max(_TIMEOUT, 2 * timedelta(minutes=stall_minutes))


class Ranks:
    """What the ranks of a run do together; with one rank everything is answered at once.

    Attributes:
        world: this rank among them.
        store: where ranks leave notes for one another, on a connection of its own, so that another
            thread may use it; None with one rank.
    """

    def __init__(self, world: World, store: Store | None = None) -> None:
        self.world = world
        self.store = store

    def largest(self, *values: int) -> tuple[int, ...]:
        """The largest of each value over all ranks; all ranks get the same.

        Raises:
            PeerLost: another rank is gone.
        """
        tensor = torch.tensor(values, dtype=torch.int64)
        self._reduce(tensor, dist.ReduceOp.MAX)
        return tuple(tensor.tolist())

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks, on the CPU; integers are exact in any order.

        Raises:
            PeerLost: another rank is gone.
        """
        total = tensor.detach().to("cpu", copy=True)
        self._reduce(total, dist.ReduceOp.SUM)
        return total

    def sum_in_place(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks, where it is; on a GPU nobody waits for it.

        Raises:
            PeerLost: another rank is gone.
        """
        self._reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def from_main(self, value: Any) -> Any:
        """A JSON value of rank 0, on all ranks; the others' own value is ignored.

        Raises:
            PeerLost: another rank is gone.
        """
        if self.world.size == 1:
            return value
        text = json.dumps(value).encode() if self.world.is_main else b""
        length = torch.tensor([len(text)], dtype=torch.int64)
        with phase(WAITING), peers_may_fail():
            dist.broadcast(length, src=0)
            content = torch.zeros(int(length), dtype=torch.uint8)
            if text:
                content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
            dist.broadcast(content, src=0)
        return json.loads(content.numpy().tobytes())

    def from_all(self, value: Any) -> list[Any]:
        """A JSON value of each rank, in their order, on all ranks.

        Raises:
            PeerLost: another rank is gone.
        """
        if self.world.size == 1:
            return [value]
        text = json.dumps(value).encode()
        lengths = torch.zeros(self.world.size, dtype=torch.int64)
        lengths[self.world.rank] = len(text)
        lengths = self.sum(lengths)
        longest = int(lengths.max())
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world.size)]
        with phase(WAITING), peers_may_fail():
            dist.all_gather(texts, mine)
        return [
            json.loads(text[:length].numpy().tobytes())
            for text, length in zip(texts, lengths.tolist(), strict=True)
        ]

    def take_from_main(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite tensors, on their devices, with those of rank 0.

        Raises:
            PeerLost: another rank is gone.
        """
        if self.world.size > 1:
            with phase(WAITING), peers_may_fail():
                for tensor in tensors:
                    dist.broadcast(tensor, src=0)

    def _reduce(self, tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        if self.world.size > 1:
            with phase(WAITING), peers_may_fail():
                dist.all_reduce(tensor, op=operation)


@contextmanager
def connected(
    world: World,
    device: torch.device,
    folder: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    timeout: timedelta = _TIMEOUT,
) -> Iterator[Ranks]:
    """The ranks of a run, connected while the block runs.

    Args:
        world: this rank among them.
        device: of this rank.
        folder: that all nodes see, where the ranks of a Slurm step meet; None: the job's own, and
            without one an address and a port that every rank computes.
        stop: whether this rank was asked to stop, looked at while it waits for the others.
        timeout: after which a collective fails.

    Raises:
        PeerLost: the ranks did not find one another.
        ConfigurationError: ranks would share a GPU.
        Interrupted: asked to stop while waiting.
    """
    if world.size == 1:
        yield Ranks(world)
        return
    with ExitStack() as stack:
        with peers_may_fail():
            file = meeting_file(world, folder)
            met = None
            if file is not None:
                met = stack.enter_context(meeting(world, file, _identity(device), stop))
            if world.one_node:
                # Nothing has to listen on an interface that others reach.
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            ranks = _group(world, device, met, timeout)
        stack.callback(dist.destroy_process_group)
        yield ranks


def _group(world: World, device: torch.device, met: Meeting | None, timeout: timedelta) -> Ranks:
    """Make the process group, and close the port at which the ranks have met."""
    with phase(WAITING):
        if met is None:
            store, _, _ = next(rendezvous(world.rendezvous, world.rank, world.size))
        else:
            store = met.store
        notes = PrefixStore("notes", store.clone())
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
            store=PrefixStore("group", store),
        )
        if met is not None:
            # Then all have connected, the backends' own threads included.
            dist.all_reduce(torch.zeros(1, device=device))
            dist.all_reduce(torch.zeros(1))
            met.close()
    return Ranks(world, notes)


def _identity(device: torch.device) -> str:
    """Names a GPU among those of its node, however few of them this process sees."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


@contextmanager
def peers_may_fail() -> Iterator[None]:
    """Turn what a collective raises when a peer is gone into one line.

    Raises:
        PeerLost: the block raised a transport error.
    """
    try:
        yield
    except dist.DistError as error:
        raise PeerLost(f"lost the other ranks: {_first_line(error)}") from error
    except RuntimeError as error:
        if any(word in str(error).lower() for word in _TRANSPORT_WORDS):
            raise PeerLost(f"lost the other ranks: {_first_line(error)}") from error
        raise


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
