"""The following batch on its way to the GPU while the current one is computed."""

from __future__ import annotations

import dataclasses

import torch

from agrivision.data.loader import Batch


class Upload:
    """Copies batches to a device, on a CUDA stream of its own.

    Args:
        device: of this rank; on the CPU nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, batch: Batch) -> Batch:
        """Begin to copy a batch; nobody waits for it, nor for what the GPU still has to compute."""
        with torch.cuda.stream(self._stream):  # without one the block is any other
            return dataclasses.replace(batch, pixels=batch.pixels.to(self._device))

    def arrive(self, batch: Batch) -> None:
        """Let the computation wait for the batch; call it before the batch is used."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in (*batch.pixels.planes, batch.pixels.labels):
            tensor.record_stream(current)  # its memory is free again once the computation is past it
