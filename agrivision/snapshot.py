"""A copy of the states of a run, in memory that is allocated once, made while training goes on.

Weights, the optimiser's moments and the weights' average change at the end of a step. There is time to
copy them until then, behind the forward and the backward pass, which only read them. What a forward
pass does change is copied at once, and so is all that is small.

A tensor keeps its own order of elements in the copy (channels last, for example), since to copy memory
as it lies takes a fifth of the time that it takes to put the elements into another order on the way.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

_ALIGNMENT = 64  # bytes; a cache line
_PIECE_BYTES = 8 << 20  # what a thread copies at a time
_MOST_THREADS = 8  # more do not copy faster: memory is the limit
# Tensors of fewer bytes are copied at once. A forward pass changes running statistics, four bytes for
# each channel of a layer, and no layer has 65,536: what is as large as this changes with the weights.
# A UNet with 64 base channels has all but 2 of its 497 MB in tensors that large.
_LARGE_BYTES = 256 << 10

States = Mapping[str, Mapping[str, Any]]
"""By name: flat mappings of tensors and JSON values."""

Form = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Shape, strides and dtype of a tensor's copy."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""As bytes: where a tensor's copy goes, and the tensor."""


class Snapshot:
    """Room for a copy of states, and the copy.

    A copy has two halves. `begin` copies at once what the next forward pass may change; `finish`, in
    another thread, the rest. Whoever is about to change the rest calls `wait` first.

    It takes as much of the host's memory as the tensors have bytes (497 MB for a UNet with 64 base
    channels, AdamW and an average), page-locked where one of them is on a GPU. All of it is touched
    here, so that the first copy does not wait for the operating system to find the pages.

    Args:
        states: of the shapes that will be copied.
    """

    def __init__(self, states: States) -> None:
        self._forms = _forms(states)
        size = sum(map(_room, self._forms.values()))
        devices = {tensor.device for tensor in _tensors(states).values() if tensor.is_cuda}
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=bool(devices)).zero_()
        self._bytes: dict[tuple[str, str], torch.Tensor] = {}
        self._copies: dict[tuple[str, str], torch.Tensor] = {}
        start = 0
        for place, (shape, strides, dtype) in self._forms.items():
            content = memory[start : start + shape.numel() * dtype.itemsize]
            self._bytes[place] = content
            self._copies[place] = content.view(dtype).as_strided(shape, strides)
            start += _room(self._forms[place])
        self._states: States = {}
        self._left: list[Pair] = []  # on the host, for `finish`
        self._copied = threading.Event()
        self._copied.set()
        self._streams = {device: torch.cuda.Stream(device) for device in devices}  # type: ignore[no-untyped-call]
        self._sent: list[Pair] = []  # on GPUs: nobody may free them on the way
        self._arrivals: dict[torch.device, torch.cuda.Event] = {}

    def fits(self, states: States) -> bool:
        """Whether these states have the names, shapes, strides and dtypes that there is room for."""
        return _forms(states) == self._forms

    def begin(self, states: States) -> None:
        """Copy JSON values and small tensors, so that they may change; the large ones are `finish`'s.

        On a GPU the copies are only asked for: the small ones before whatever it is asked next, the
        large ones beside it.

        Args:
            states: that fit. The copy before was finished.
        """
        pairs: list[Pair] = []
        for place, tensor in _tensors(states).items():
            if tensor.nbytes < _LARGE_BYTES:
                self._copies[place].copy_(tensor, non_blocking=True)
            else:
                pairs.append((self._bytes[place], _flat(tensor)))
        self._left = [pair for pair in pairs if pair[1].is_cpu]
        self._sent = [pair for pair in pairs if not pair[1].is_cpu]
        if self._left:
            self._copied.clear()
        self._arrivals = self._send(self._sent)
        self._states = {
            name: {
                key: self._copies[name, key] if (name, key) in self._copies else copy.deepcopy(value)
                for key, value in state.items()
            }
            for name, state in states.items()
        }

    def wait(self) -> None:
        """Wait until everything that was begun is copied; then the large tensors may change, too.

        On a GPU it is the device that waits, before whatever it is asked next, and not the caller.
        """
        for device, arrival in self._arrivals.items():
            torch.cuda.current_stream(device).wait_event(arrival)
        self._copied.wait()

    def finish(self) -> States:
        """Copy what `begin` left; in a thread of its own, once.

        Returns:
            The states as they were at `begin`; on the CPU, good until the next `begin`.
        """
        try:
            _copy_on_host(self._left)
        finally:  # nobody waits for a copy that has failed
            self._left = []
            self._copied.set()
        for arrival in self._arrivals.values():
            arrival.synchronize()
        self._arrivals, self._sent = {}, []
        return self._states

    def _send(self, pairs: list[Pair]) -> dict[torch.device, torch.cuda.Event]:
        """Ask for copies on streams of their own; gives what happens on each GPU when all are made.

        That includes copies that its current stream was asked for before.
        """
        arrivals = {}
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for target, source in pairs:
                    if source.device == device:
                        target.copy_(source, non_blocking=True)
            # Whoever waits for it sleeps; by default it would keep a core busy.
            arrivals[device] = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            arrivals[device].record(stream)
        return arrivals


def _tensors(states: States) -> dict[tuple[str, str], torch.Tensor]:
    """Each tensor by the names of its state and of itself, dense."""
    return {
        (name, key): _dense(value.detach())
        for name, state in states.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its elements lie side by side, each once; else a copy of that kind."""
    last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor if last else tensor.contiguous()


def _forms(states: States) -> dict[tuple[str, str], Form]:
    return {place: (t.shape, t.stride(), t.dtype) for place, t in _tensors(states).items()}


def _room(form: Form) -> int:
    """Bytes of a tensor, rounded up so that the next one is aligned."""
    shape, _, dtype = form
    return -(-shape.numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a dense tensor in the order in which they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _copy_on_host(pairs: list[Pair]) -> None:
    """Copy bytes into targets from sources, on some threads.

    NumPy hands a piece to memcpy, which writes around the cache; torch's own copy is half as fast.
    """
    work = iter([piece for target, source in pairs for piece in _cut(target.numpy(), source.numpy())])

    def copy_some() -> None:
        for target, source in work:  # a list's iterator gives each piece to one thread
            np.copyto(target, source)

    threads = min(_MOST_THREADS, torch.get_num_threads())
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(copy_some) for _ in range(threads)]:
            done.result()


def _cut(target: np.ndarray, source: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(target), _PIECE_BYTES):
        part = slice(start, start + _PIECE_BYTES)
        yield target[part], source[part]
