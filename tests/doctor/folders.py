"""What stands in a folder."""

from __future__ import annotations

from pathlib import Path


def tree(folder: Path) -> list[str]:
    """Paths of all that is below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
