"""Tensors as the bytes of a safetensors file, one piece after the other.

The library's own `save` makes all bytes of a file at once, and takes no tensor that shares memory with
another or is not laid out row by row. Here the same bytes leave in pieces that fit into a processor's
cache, where they are put into order, summed up and handed to the operating system.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import numpy as np
import torch

# Their names in the file. The library writes the tensors in the order of this table, and those of one
# kind by name, so that each stands at a multiple of its elements' size.
_KINDS = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_RANK = {dtype: rank for rank, dtype in enumerate(_KINDS)}
# NumPy moves the bytes, and knows neither bfloat16 nor float8: to it all are integers.
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE_BYTES = 1 << 20


def pieces(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """What `safetensors.torch.save` would return, in pieces; each is good until the next is asked for.

    Args:
        tensors: by name, on any device and of any memory layout: the file has their elements in the
            order of their indices.

    Raises:
        KeyError: the format has no such dtype.
    """
    ordered = sorted(tensors.items(), key=lambda item: (_RANK[item[1].dtype], item[0]))
    yield _header(ordered)
    for _, tensor in ordered:
        yield from _elements(tensor)


def _header(tensors: list[tuple[str, torch.Tensor]]) -> bytes:
    entries, end = {}, 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _KINDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _elements(tensor: torch.Tensor) -> Iterator[memoryview]:
    array = tensor.detach().cpu().view(_WORDS[tensor.element_size()]).numpy()
    if array.flags.c_contiguous:
        content = _bytes(array)
        for start in range(0, len(content), _PIECE_BYTES):
            yield content[start : start + _PIECE_BYTES]
        return
    # Channels last, for example. One thread of NumPy's does it twice as fast as torch, and leaves the
    # other cores to the training.
    count = max(1, _PIECE_BYTES * len(array) // array.nbytes)
    piece = np.empty((min(count, len(array)), *array.shape[1:]), array.dtype)
    for start in range(0, len(array), count):
        rows = array[start : start + count]
        np.copyto(piece[: len(rows)], rows)
        yield _bytes(piece[: len(rows)])


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
