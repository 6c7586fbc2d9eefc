from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from agrivision.data.prepare import PrepareOptions, PrepareSummary, prepare


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., PrepareSummary]:
    """`prepared(source, workers=2, …)`: a data set in a folder of its own."""
    numbers = iter(range(100))

    def run(source: Path, **options: object) -> PrepareSummary:
        out = tmp_path / f"prepared-{next(numbers)}"
        return prepare(source, out, PrepareOptions(**{"workers": 1, **options}))

    return run


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
