"""Crops that grow over the epochs: early ones are cheap, late ones have context.

After the progressive resizing of M. Tan and Q. V. Le: EfficientNetV2, ICML 2021, arXiv:2104.00298; here
the pixels keep their size on the ground, and a larger crop shows more of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from agrivision.config import Config

_MOST_STAGES = 7  # and the full size: torch.compile makes its kernels anew for at most eight


@dataclass(frozen=True, kw_only=True)
class GrowingCrop:
    """The side of the crops as a function of the epoch.

    Attributes:
        start: side in pixels in the first epoch.
        end: side in pixels after the growth.
        unit: what sides differ by is a multiple of this.
        epochs: that the growth takes.
    """

    start: int
    end: int
    unit: int
    epochs: int

    @classmethod
    def of(cls, config: Config, unit: int) -> GrowingCrop | None:
        """As configured; None where all crops have one size.

        Args:
            config: of the run.
            unit: what the network needs sides to be a multiple of.
        """
        start, end = config.data.crop_start, config.data.crop
        if start is None or end is None:
            return None
        epochs = max(1, round(config.data.crop_growth * config.training.epochs))
        return cls(start=start, end=end, unit=unit, epochs=epochs)

    @property
    def sides(self) -> list[int]:
        """All sides in pixels, the smallest first."""
        return list(dict.fromkeys(self.at(epoch) for epoch in range(self.epochs + 1)))

    def at(self, epoch: int) -> int:
        """Side in pixels in an epoch, 0 for the first."""
        if epoch >= self.epochs:
            return self.end
        units = (self.end - self.start) // self.unit
        stages = min(units, self.epochs, _MOST_STAGES)
        return self.start + units * (epoch * stages // self.epochs) // stages * self.unit
