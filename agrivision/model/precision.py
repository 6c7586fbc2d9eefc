"""bfloat16 where it pays, float32 where it counts."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Run convolutions in bfloat16 inside of the block where `precision` is bf16.

    Weights, losses and statistics stay in float32; bfloat16 has float32's range, so nothing has to be
    scaled.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
