"""What the steps since the last look gave, kept where it was computed.

A GPU runs far behind the program that feeds it. Whoever asks it for a number waits until it has caught
up, and it then waits for work. Losses are therefore added up on the device, whether a step counts is
decided there, and the program looks once in a while.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from agrivision.errors import CheckpointError

LOSSES = ("total", "cross_entropy", "dice")
MEANS = (*LOSSES, "gradient_norm")  # without further parts of the loss
_COUNTS = ("counted", "missed", "last_missed", "in_a_row", "most_in_a_row", "skipped")


@dataclass(frozen=True, kw_only=True)
class Look:
    """The steps since the last time.

    Attributes:
        means: of the loss, its parts and the gradient norm over the steps that counted; empty without.
        missed: steps whose loss or gradient was not finite: they changed nothing.
        last_missed: number of the last of them.
        most_in_a_row: the longest row of them, also with those before the last time.
    """

    means: dict[str, float]
    missed: int
    last_missed: int
    most_in_a_row: int


class Tally:
    """Sums and counts of steps, on a device.

    Args:
        device: where losses are.
        losses: names of those that are counted.
    """

    def __init__(self, device: torch.device, losses: Sequence[str] = LOSSES) -> None:
        self._means = (*losses, "gradient_norm")
        self._sums = torch.zeros(len(self._means), dtype=torch.float64, device=device)
        self._counts = torch.zeros(len(_COUNTS), dtype=torch.int64, device=device)

    def count(self, losses: torch.Tensor, norm: torch.Tensor, step: int) -> torch.Tensor:
        """Add a step, without waiting for the device.

        Args:
            losses: float64 (losses,) on the device: means over the global batch, the same on all ranks.
            norm: of the gradient, a scalar on the device, the same on all ranks.
            step: its number.

        Returns:
            Whether all of it is finite and the step thus counts: a bool scalar on the device.
        """
        values = torch.cat([losses, norm.double().view(1)])
        good = torch.isfinite(values).all()
        self._sums += torch.where(good, values, 0.0)
        counted, missed, last, row, most, skipped = self._counts.unbind()
        bad = (~good).long()
        row = (row + bad) * bad
        self._counts = torch.stack(
            [
                counted + 1 - bad,
                missed + bad,
                torch.where(good, last, step),
                row,
                torch.maximum(most, row),
                skipped + bad,
            ]
        )
        return good

    def look(self) -> Look:
        """Wait for the device and read what there is; nothing is forgotten."""
        sums, counts = self._sums.tolist(), self.counts
        means = (
            {name: value / counts["counted"] for name, value in zip(self._means, sums, strict=True)}
            if counts["counted"]
            else {}
        )
        return Look(
            means=means,
            missed=counts["missed"],
            last_missed=counts["last_missed"],
            most_in_a_row=counts["most_in_a_row"],
        )

    def restart(self) -> None:
        """Begin anew; a row of bad steps goes on, and so does the count of all of them."""
        self._sums.zero_()
        keep = torch.tensor([name in ("in_a_row", "skipped") for name in _COUNTS])
        self._counts *= keep.to(self._counts.device)

    @property
    def counts(self) -> dict[str, int]:
        """All counts by name; waits for the device."""
        return dict(zip(_COUNTS, self._counts.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """As JSON values; waits for the device."""
        return {"sums": dict(zip(self._means, self._sums.tolist(), strict=True)), **self.counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state. Where the loss had other parts, the means begin anew.

        Raises:
            CheckpointError: it has other entries.
        """
        try:
            known = {name: state["sums"][name] for name in (*MEANS, *state["sums"])}
            counts = {name: state[name] for name in _COUNTS}
        except (KeyError, TypeError):
            raise CheckpointError(
                f"the checkpoint's progress has the entries {', '.join(state)}"
            ) from None
        if known.keys() != set(self._means):
            known, counts["counted"] = dict.fromkeys(self._means, 0.0), 0
        sums = [known[name] for name in self._means]
        self._sums.copy_(torch.tensor(sums, dtype=torch.float64))
        self._counts.copy_(torch.tensor(list(counts.values()), dtype=torch.int64))
