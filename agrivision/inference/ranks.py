"""The ranks of a launcher share a prediction without a word to one another: each takes its blocks."""

from __future__ import annotations

import torch

from agrivision.part import Part
from agrivision.world import World


def own_share(part: Part, world: World) -> tuple[Part, torch.device]:
    """What a rank does of a part, and where.

    Args:
        part: of the task that all the ranks are in.
        world: this rank.

    Returns:
        Its part of all the parts' ranks, and its GPU, or the processor where there is none.
    """
    share = Part(number=part.number * world.size + world.rank, of=part.of * world.size)
    if not torch.cuda.is_available():
        return share, torch.device("cpu")
    return share, torch.device("cuda", world.local_rank % torch.cuda.device_count())
