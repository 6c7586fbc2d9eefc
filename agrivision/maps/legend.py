"""What the values of a map mean, and in which colours they are shown."""

from __future__ import annotations

from dataclasses import dataclass

from agrivision.monitor.pictures import PALETTE, Color

NODATA = 255  # in a map of class ids: the scene has no data there


@dataclass(frozen=True, kw_only=True)
class Legend:
    """The classes of a map.

    Attributes:
        classes: names by id.
    """

    classes: tuple[str, ...]

    @property
    def colors(self) -> tuple[Color, ...]:
        """Red, green and blue (0 to 255) of each class, by id."""
        return PALETTE[: len(self.classes)]
