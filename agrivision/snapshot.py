"""A copy of the states of a run, in memory that is allocated once.

Training goes on as soon as the copy is made; what is written to the disk afterwards is the copy. A
tensor keeps its own order of elements in it (channels last, for example), since to copy memory as it
lies takes a fifth of the time that it takes to put the elements into another order on the way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

_ALIGNMENT = 64  # bytes; a cache line
_PIECE_BYTES = 8 << 20  # what a thread copies at a time
_MOST_THREADS = 8  # more do not copy faster: memory is the limit

States = Mapping[str, Mapping[str, Any]]
"""By name: flat mappings of tensors and JSON values."""

Form = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Shape, strides and dtype of a tensor's copy."""


class Snapshot:
    """Room for a copy of states, and the copy.

    It takes as much of the host's memory as the tensors have bytes (497 MB for a UNet with 64 base
    channels, AdamW and an average), page-locked where one of them is on a GPU. All of it is touched
    here, so that the first copy does not wait for the operating system to find the pages.

    Args:
        states: of the shapes that will be copied.

    Attributes:
        states: the copy, of the time of the last `take`; on the CPU.
    """

    def __init__(self, states: States) -> None:
        self._forms = _forms(states)
        size = sum(map(_room, self._forms.values()))
        pinned = any(tensor.is_cuda for tensor in _tensors(states).values())
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned).zero_()
        self._bytes: dict[tuple[str, str], torch.Tensor] = {}
        self._copies: dict[tuple[str, str], torch.Tensor] = {}
        start = 0
        for place, (shape, strides, dtype) in self._forms.items():
            content = memory[start : start + shape.numel() * dtype.itemsize]
            self._bytes[place] = content
            self._copies[place] = content.view(dtype).as_strided(shape, strides)
            start += _room(self._forms[place])
        self.states: States = {}

    def fits(self, states: States) -> bool:
        """Whether these states have the names, shapes, strides and dtypes that there is room for."""
        return _forms(states) == self._forms

    def take(self, states: States) -> None:
        """Copy the states; what changes in them afterwards changes nothing here.

        Args:
            states: that fit.
        """
        tensors = _tensors(states)
        on_host: list[tuple[torch.Tensor, torch.Tensor]] = []
        devices = set()
        for place, target in self._bytes.items():
            source = _flat(tensors[place])
            if source.is_cpu:
                on_host.append((target, source))
            else:
                target.copy_(source, non_blocking=True)
                devices.add(source.device)
        _copy_on_host(on_host)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        self.states = {
            name: {
                key: self._copies[name, key] if (name, key) in self._copies else copy.deepcopy(value)
                for key, value in state.items()
            }
            for name, state in states.items()
        }


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


def _copy_on_host(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
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
